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
    int64_t rank, ranks;
    Numbers<F> rows, turned;

    // Rows alone.
    template <class T, class Group, class Plan>
    Lowered(const T* all, int64_t stride, const Group& group, const Plan& plan, int64_t threads)
        : rank(group.rank), ranks(whole_depths<F>(rank)), rows(all ? plan.room * ranks : 0) {
        if (!all) return;
        plan.each_block(threads, [&](size_t, const Block& block) {
            block.runs([&](const Run& run) {
                for (int64_t i = 0; i < run.size; ++i)
                    read_ranks(all + run.choices[i] / group.top_k * stride + run.expert * rank, rank, row(run, i));
            });
        });
    }

    // Both; `weight(choice)` is of what is turned.
    template <class T, class Group, class Plan, class Weight>
    Lowered(const T* all, int64_t stride, const Group& group, const Plan& plan, int64_t threads, Weight weight)
        : Lowered(all, stride, group, plan, threads) {
        if (!all) return;
        turned = Numbers<F>(plan.room * rank);
        plan.each_block(threads, [&](size_t, const Block& block) {
            block.runs([&](const Run& run) {
                turn<F>(row(run, 0), run.size, rank, of_run(run), [&](int64_t i) { return weight(run.choices[i]); });
            });
        });
    }

    F* row(const Run& run, int64_t i) const { return rows + (run.row + i) * ranks; }
    F* of_run(const Run& run) const { return turned + run.row * rank; }
};

}  // namespace moe::mixlora_ffn
