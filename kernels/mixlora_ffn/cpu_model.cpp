// The products over D of the mixture: of each token with the factors of the experts that it chose, and no others.
//
// Letters as in pieces.h, and S stacks of factors that one input meets, or that add to one result: A of gate and up,
// or B of down.
#include "lowered.h"

namespace moe::mixlora_ffn {
namespace {

constexpr int64_t CHUNK = 96;   // most columns of a chunk of gradients: a small model has several
constexpr int64_t TOKENS = 64;  // a thread takes at a time

// A part's own.
template <class T>
struct ModelPart {
    int64_t start, end;     // its tokens
    const T* mask;          // of x, [its tokens, D]; null without
    const int64_t* stacks;  // addresses of its factors, [S]: A [E, R, D], or turned B [E, D, R]
    float scaling;          // of every factor
};

template <class T>
struct ModelGroup {
    const int64_t* experts;    // [T, K]
    const int64_t* described;  // [P, 2 + S]: a part's length, and its addresses in the order of `ModelPart`
    const float* scalings;     // [P]
    int64_t tokens, features, num_parts, num_experts, top_k, rank, num_stacks, is_turned;

    int64_t all_ranks() const { return num_experts * rank; }
    Columns columns() const { return {0, features}; }

    std::vector<ModelPart<T>> parts() const {
        std::vector<ModelPart<T>> found;
        int64_t start = 0;
        for (int64_t i = 0; i < num_parts; ++i) {
            const int64_t* own = described + (2 + num_stacks) * i;
            found.push_back({start, start + own[0], reinterpret_cast<const T*>(own[1]), own + 2, scalings[i]});
            start += own[0];
        }
        return found;
    }
};

// The factors of every part and stack, [P * S].
template <class T, class F>
std::vector<Factors<F>> all_factors(const ModelGroup<T>& group, const Plan<ModelPart<T>>& plan, Read read,
                                    int64_t threads) {
    std::vector<Factors<F>> found;
    const Columns columns = group.columns();
    for (int64_t i = 0; i < group.num_parts * group.num_stacks; ++i)
        found.emplace_back(group.num_experts, group.rank, columns.whole_bands(), read);
    parallel(found.size(), threads, [&](int64_t i) {
        const int64_t part = i / group.num_stacks;
        const auto* factors = reinterpret_cast<const float*>(plan.parts[part].stacks[i % group.num_stacks]);
        const float scaling = plan.parts[part].scaling;
        if (group.is_turned)
            found[i].fill_turned(factors, plan.chosen[part], columns, group.features, scaling);
        else
            found[i].fill(factors, plan.chosen[part], columns, group.features, scaling);
    });
    return found;
}

// x times its mask as what is multiplied, in rows of whole bands; or x itself, where it is just that.
template <class T, class F>
struct Input {
    const F* rows;
    int64_t stride;
    Numbers<F> own;

    Input(const T* x, const ModelGroup<T>& group, int64_t threads)
        : rows(nullptr), stride(group.columns().whole_bands()) {
        const auto parts = group.parts();
        if constexpr (std::is_same_v<T, F>)
            if (stride == group.features &&
                std::none_of(parts.begin(), parts.end(), [](auto& part) { return part.mask; })) {
                rows = x;
                return;
            }
        own = Numbers<F>(group.tokens * stride);
        rows = own;
        for (const ModelPart<T>& part : parts)
            parallel_runs(part.end - part.start, TOKENS, threads, [&](int64_t start, int64_t end) {
                const int64_t first = part.start + start;
                write_factors<F>(x + first * group.features, part.mask ? part.mask + start * group.features : nullptr,
                                 end - start, group.columns(), own + first * stride);
            });
    }

    // What finds a run's rows.
    auto of(const Run& run, int64_t top_k, int64_t offset) const {
        return [=, rows = rows, stride = stride](int64_t i) { return rows + run.choices[i] / top_k * stride + offset; };
    }
};

// Inner products of every token with the rows of its experts, zeros for all others: of each stack, [T, ER].
template <class T>
void lower(const ModelGroup<T>& group, const T* x, const int64_t* results, int64_t threads) {
    using F = Multiplied<T>;
    const Plan<ModelPart<T>> plan(group, group.features);
    const Input<T, F> input(x, group, threads);
    const auto factors = all_factors<T, F>(group, plan, Read::DOTS, threads);
    const int64_t rank = group.rank, all = group.all_ranks();
    plan.each_block(threads, [&](size_t part, const Block& block) {
        Buffer products(block.bounds.back() * rank);
        for (int64_t stack = 0; stack < group.num_stacks; ++stack) {
            T* result = reinterpret_cast<T*>(results[stack]);
            std::memset(result + block.start * all, 0, (block.end - block.start) * all * sizeof(T));
            block.runs([&](const Run& run) {
                dots(input.of(run, group.top_k, 0), run.size, factors[part * group.num_stacks + stack].dotted,
                     run.expert, group.columns(), products);
                for (int64_t i = 0; i < run.size; ++i) {
                    T* to = result + run.choices[i] / group.top_k * all + run.expert * rank;
                    across(rank,
                           [&](int64_t r, auto count) { store(to + r, load(products + i * rank + r, count), count); });
                }
            });
        }
    });
}

// Every token's sum, over its experts and all stacks, of their factors weighted by `lowered`, [T, S, ER]; times the
// mask: [T, D].
template <class T>
void raise_all(const ModelGroup<T>& group, const T* lowered, T* result, int64_t threads) {
    using F = Multiplied<T>;
    const Plan<ModelPart<T>> plan(group, group.features);
    const auto factors = all_factors<T, F>(group, plan, Read::RAISING, threads);
    const int64_t rank = group.rank, ranks = whole_depths<F>(rank), top_k = group.top_k, stacks = group.num_stacks;
    for (const ModelPart<T>& part : plan.parts) {
        const Factors<F>* own = &factors[(&part - plan.parts.data()) * stacks];
        parallel_runs(part.end - part.start, TOKENS, threads, [&](int64_t start, int64_t end) {
            Numbers<F> weights(top_k * stacks * ranks);
            for (int64_t t = part.start + start; t < part.start + end; ++t) {
                const int64_t* experts = group.experts + t * top_k;
                for (int64_t k = 0; k < top_k; ++k)
                    for (int64_t stack = 0; stack < stacks; ++stack)
                        read_ranks(lowered + ((t * stacks + stack) * group.num_experts + experts[k]) * rank, rank,
                                   weights + (k * stacks + stack) * ranks);
                group.columns().bands([&](int64_t offset, auto first, auto second) {
                    Vector sums[1][2] = {};
                    for (int64_t k = 0; k < top_k; ++k)
                        for (int64_t stack = 0; stack < stacks; ++stack)
                            raise<1>(weights + (k * stacks + stack) * ranks, ranks,
                                     own[stack].raising.band(experts[k], offset), sums);
                    const int64_t at = (t - part.start) * group.features + offset;
                    mask_band(sums[0], part.mask ? part.mask + at : nullptr, first, second);
                    store_band(result + t * group.features + offset, sums[0][0], sums[0][1], first, second);
                });
            }
        });
    }
}

// The gradients of the factors, without their scaling, [P, S, E, R, D], or turned [P, S, E, D, R]: of each token's
// `lowered` [T, S, ER], at the ranks of its experts, times its row of x.
template <class T>
void outer(const ModelGroup<T>& group, const T* lowered, const T* x, float* gradients, int64_t threads) {
    using F = Multiplied<T>;
    const Plan<ModelPart<T>> plan(group, CHUNK);
    const Input<T, F> input(x, group, threads);
    const int64_t stacks = group.num_stacks, factors = group.all_ranks() * group.features;
    std::vector<Lowered<F>> turned;
    for (int64_t stack = 0; stack < stacks; ++stack)
        turned.emplace_back(lowered + stack * group.all_ranks(), stacks * group.all_ranks(), group, plan, threads,
                            [](int64_t) { return 1.0f; });
    auto make = [&] { return FactorSums<F>(group.num_experts, group.rank, plan.chunks.width); };
    plan.run(threads, make, [&](const Task<ModelPart<T>>& task, const FactorSums<F>& sums) {
        for (int64_t stack = 0; stack < stacks; ++stack) {
            sums.clear(group.num_experts);
            for (const Block& block : task.blocks)
                block.runs([&](const Run& run) {
                    add_outer(turned[stack].of_run(run), input.of(run, group.top_k, task.columns.start), run.size,
                              sums.sums, run.expert, task.columns);
                });
            float* to = gradients + (task.index * stacks + stack) * factors;
            if (group.is_turned)
                sums.write_turned(to, group.num_experts, task.columns, group.features);
            else
                sums.write(to, group.num_experts, task.columns, group.features);
        }
    });
}

}  // namespace

#define MOE_MODEL_GROUP                                                                                        \
    const int64_t *experts, const int64_t *described, const float *scalings, int64_t tokens, int64_t features, \
        int64_t num_parts, int64_t num_experts, int64_t top_k, int64_t rank, int64_t num_stacks, int64_t is_turned
#define MOE_GIVEN_GROUP \
    {experts, described, scalings, tokens, features, num_parts, num_experts, top_k, rank, num_stacks, is_turned}
#define MOE_MIXLORA_MODEL(T, NAME)                                                                              \
    MOE_EXPORT int mixlora_lower_##NAME(MOE_MODEL_GROUP, const T* x, const int64_t* results, int64_t threads) { \
        return guarded([&] { lower<T>(MOE_GIVEN_GROUP, x, results, threads); });                                \
    }                                                                                                           \
    MOE_EXPORT int mixlora_raise_##NAME(MOE_MODEL_GROUP, const T* lowered, T* result, int64_t threads) {        \
        return guarded([&] { raise_all<T>(MOE_GIVEN_GROUP, lowered, result, threads); });                       \
    }                                                                                                           \
    MOE_EXPORT int mixlora_outer_##NAME(MOE_MODEL_GROUP, const T* lowered, const T* x, float* gradients,        \
                                        int64_t threads) {                                                      \
        return guarded([&] { outer<T>(MOE_GIVEN_GROUP, lowered, x, gradients, threads); });                     \
    }
MOE_MIXLORA_MODEL(float, float32)
MOE_MIXLORA_MODEL(bfloat16, bfloat16)

}  // namespace moe::mixlora_ffn
