// Some choices of a run side by side: where their columns of a chunk are, and what every walk over them begins with.
//
// Letters as in pieces.h; F also names the type of what is multiplied.
#pragma once

#include "ffn_group.h"
#include "lowered.h"

namespace moe::mixlora_ffn {

constexpr int64_t AHEAD = 2;  // choices

// ROWS choices of a run from its number `i` on.
template <int ROWS, class T>
struct Choices {
    const Run& run;
    int64_t i;
    int64_t at[ROWS], next[ROWS];  // in [T, F]: their own columns, and those of the choices AHEAD
    const T* masks[ROWS];          // null without

    Choices(const Group<T>& group, const Task<Part<T>>& task, const Run& run, int64_t i) : run(run), i(i) {
        auto columns_of = [&](int64_t number) {
            return run.choices[number] / group.top_k * group.features + task.columns.start;
        };
        for (int row = 0; row < ROWS; ++row) {
            at[row] = columns_of(i + row);
            next[row] = columns_of(std::min(i + row + AHEAD, run.size - 1));
            masks[row] = task.part.h_mask ? task.part.h_mask + at[row] - task.part.start * group.features : nullptr;
        }
    }

    // Fetch a band of x, [T, F], of the choices AHEAD: no processor foresees their order.
    MOE_INLINE void fetch(const T* x, int64_t offset) const {
        for (int row = 0; row < ROWS; ++row)
            for (int64_t k = 0; k < BAND; k += LINE / sizeof(T)) __builtin_prefetch(x + next[row] + offset + k);
    }

    // A band of `p + s B a`, with the next one of p fetched; p itself without factors.
    template <class F, class First, class Second>
    MOE_INLINE void preactivations(const T* p, const Factors<F>& of, const Lowered<F>& a, int64_t offset, First first,
                                   Second second, Vector (&u)[ROWS][2]) const {
        fetch(p, offset);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) load_band(p + at[row] + offset, first, second, u[row]);
        add_raised(of, a, offset, u);
    }

    // Adds a band of the factors' products with the choices' ranks; nothing without factors.
    template <class F>
    MOE_INLINE void add_raised(const Factors<F>& of, const Lowered<F>& lowered, int64_t offset,
                               Vector (&sums)[ROWS][2]) const {
        if (of.is_there) raise(lowered.row(run, i), lowered.ranks, of.raising.band(run.expert, offset), sums);
    }
};

}  // namespace moe::mixlora_ffn
