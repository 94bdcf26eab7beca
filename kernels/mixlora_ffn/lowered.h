// Products of a run's choices with their expert's factors.
//
// Letters as in pieces.h, and N the choices of a run. What is multiplied is of numbers F, sums are float32.
#pragma once

#include "../factor_products.h"
#include "pieces.h"

namespace moe::mixlora_ffn {

// Of every run's choices their expert's ranks, from [T, ER] in rows `stride` apart: as rows [N, R] with zeros behind
// the last rank; and so turned that a choice lies beside the next, [N / DEPTH, R, DEPTH], each times a weight.
template <class F>
struct Lowered {
    static constexpr int DEPTH = Lanes<F>::DEPTH;
    int64_t rank, ranks;
    Numbers<F> rows, turned;

    // Rows alone.
    template <class T, class Group, class Plan>
    Lowered(const T* all, int64_t stride, const Group& group, const Plan& plan, int64_t threads)
        : rank(group.rank), ranks(whole_depths<F>(rank)), rows(all ? plan.room * ranks : 0) {
        if (!all) return;
        plan.each_block(threads, [&](size_t, const Block& block) {
            block.runs([&](const Run& run) {
                for (int64_t i = 0; i < run.size; ++i) {
                    copy(all + run.choices[i] / group.top_k * stride + run.expert * rank, rank, row(run, i));
                    std::fill(row(run, i) + rank, row(run, i) + ranks, F{});
                }
            });
        });
    }

    // Both; `weight(choice)` is of what is turned.
    template <class T, class Group, class Plan, class Weight>
    Lowered(const T* all, int64_t stride, const Group& group, const Plan& plan, int64_t threads, Weight weight)
        : Lowered(all, stride, group, plan, threads) {
        if (!all) return;
        turned = Numbers<F>(plan.room * rank);
        plan.each_block(threads,
                        [&](size_t, const Block& block) { block.runs([&](const Run& run) { turn(run, weight); }); });
    }

    F* row(const Run& run, int64_t i) const { return rows + (run.row + i) * ranks; }
    F* of_run(const Run& run) const { return turned + run.row * rank; }

private:
    template <class Weight>
    void turn(const Run& run, Weight weight) const {
        std::fill_n(of_run(run), (run.size + DEPTH - 1) / DEPTH * DEPTH * rank, F{});
        for (int64_t i = 0; i < run.size; ++i) {
            F* to = of_run(run) + i / DEPTH * DEPTH * rank + i % DEPTH;
            const float factor = weight(run.choices[i]);
            across(rank, [&](int64_t r, auto count) {
                F own[W];
                moe::store(own, load(row(run, i) + r, count) * factor, Whole());
                for (int64_t k = 0; k < count; ++k) to[(r + k) * DEPTH] = own[k];
            });
        }
    }
};

}  // namespace moe::mixlora_ffn
