// The mixture of LoRA experts between the frozen products of a SwiGLU layer: all that is F wide, forward and backward.
//
// Letters as in pieces.h; F also names the type of what is multiplied.
#include "choices.h"
#include "sums.h"

namespace moe::mixlora_ffn {

constexpr int64_t CHUNK = 256;  // most columns of a chunk: a block's values of so many stay in a core's cache

template <class T, class F>
struct ForwardScratch {
    Factors<F> of_gate, of_up, of_down;
    Rows<F> h, masked_h;
    Buffer products;

    ForwardScratch(const Group<T>& group, int64_t width)
        : of_gate(group.num_experts, group.rank, width, Read::RAISING),
          of_up(group.num_experts, group.rank, width, Read::RAISING),
          of_down(group.num_experts, group.rank, width, Read::DOTS),
          h(group, width),
          masked_h(group, width),
          products(BLOCK * group.top_k * group.rank) {}
};

// h of ROWS choices of a run, from number `i` on; where there is a mask, also what the down experts read.
template <int ROWS, class T, class F>
void forward_rows(const Group<T>& group, const Task<Part<T>>& task, const Run& run, int64_t i, const Lowered<F>& a1,
                  const Lowered<F>& a3, ForwardScratch<T, F>& s) {
    const Choices<ROWS, T> own(group, task, run, i);
    task.columns.bands([&](int64_t offset, auto first, auto second) {
        Vector u1[ROWS][2], u3[ROWS][2];
        own.preactivations(group.p1, s.of_gate, a1, offset, first, second, u1);
        own.preactivations(group.p3, s.of_up, a3, offset, first, second, u3);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            Vector h[2], s1[2];
            sigmoid(u1[row], s1);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) h[v] = u1[row][v] * s1[v] * u3[row][v];
            const int64_t place = run.place + i + row;
            Lanes<F>::store(s.h.row(place) + offset, h[0], h[1]);
            if (!own.masks[row]) continue;
            mask_band(h, own.masks[row] + offset, first, second);
            Lanes<F>::store(s.masked_h.row(place) + offset, h[0], h[1]);
        }
    });
}

template <class T>
void forward(const Group<T>& group, T* hidden, T* lowered, int64_t threads) {
    using F = Multiplied<T>;
    const Plan<Part<T>> plan(group, CHUNK);
    const int64_t rank = group.rank, stride = group.all_ranks();
    const Lowered<F> a1(group.a1, stride, group, plan, threads), a3(group.a3, stride, group, plan, threads);
    const Shares shares(group.tokens * group.top_k, lowered ? rank : 0, plan.chunks.count);
    auto make = [&] { return ForwardScratch<T, F>(group, plan.chunks.width); };
    plan.run(threads, make, [&](const Task<Part<T>>& task, ForwardScratch<T, F>& s) {
        s.of_gate.fill_turned(task.part.b1, task.chosen, task.columns, group.features, task.part.scaling);
        s.of_up.fill_turned(task.part.b3, task.chosen, task.columns, group.features, task.part.scaling);
        s.of_down.fill(task.part.down_a, task.chosen, task.columns, group.features);
        const Rows<F>& read = task.part.h_mask ? s.masked_h : s.h;
        for (const Block& block : task.blocks) {
            block.runs([&](const Run& run) {
                by_groups<2>(run.size,
                             [&](int64_t i, auto rows) { forward_rows<rows.value>(group, task, run, i, a1, a3, s); });
                if (!s.of_down.is_there) return;
                dots(read.of(run), run.size, s.of_down.dotted, run.expert, task.columns, s.products);
                for (int64_t i = 0; i < run.size; ++i)
                    for (int64_t r = 0; r < rank; ++r)
                        shares.of(task.chunk, run.choices[i])[r] =
                            group.gates[run.choices[i]] * s.products[i * rank + r];
            });
            s.h.write_sums(block, task.columns, group, hidden, [&](int64_t choice) { return group.gates[choice]; });
        }
    });
    for (const Part<T>& part : plan.parts)
        if (lowered) shares.scatter(group, part, lowered, stride, threads);
}

// What comes in, and what goes out; a null for what is not there.
template <class T>
struct Gradients {
    const T* dhidden;            // [T, F]
    const T* dlowered;           // [T, ER]
    T *dp1, *dp3;                // [T, F]
    float* dgates;               // [T, K]
    T* da;                       // [T, S, ER]: of a1 when there is one, then of a3
    float *db1, *db3, *ddown_a;  // [P, E, F, R] without the scaling, [P, E, R, F]
};

// `A1 x`, `A3 x`, and the gradient of C, whose turned ranks have the gates in them.
template <class F>
struct AllLowered {
    Lowered<F> a1, a3, z;
};

template <class T, class F>
struct BackwardScratch {
    Factors<F> of_gate, of_up, of_down;
    FactorSums<F> db1, db3, ddown_a;
    Rows<F> du1, du3, h;
    Buffer dgates, products;

    BackwardScratch(const Group<T>& group, int64_t width)
        : of_gate(group.num_experts, group.rank, width, Read::BOTH),
          of_up(group.num_experts, group.rank, width, Read::BOTH),
          of_down(group.num_experts, group.rank, width, Read::RAISING),
          db1(group.num_experts, group.rank, width),
          db3(group.num_experts, group.rank, width),
          ddown_a(group.num_experts, group.rank, width),
          du1(group, width),
          du3(group, width),
          h(group, width),
          dgates((BLOCK * group.top_k + W) * W),
          products(BLOCK * group.top_k * group.rank) {}
};

// du1, du3 and what the down experts read, of ROWS choices of a run from number `i` on; and the gates' gradients, each
// as a vector to be added up.
template <int ROWS, class T, class F>
void backward_rows(const Group<T>& group, const Gradients<T>& grads, const Task<Part<T>>& task, const Run& run,
                   int64_t i, const AllLowered<F>& low, BackwardScratch<T, F>& s) {
    const Choices<ROWS, T> own(group, task, run, i);
    Vector dgates[ROWS] = {};
    task.columns.bands([&](int64_t offset, auto first, auto second) {
        Vector u1[ROWS][2], u3[ROWS][2], down[ROWS][2] = {};
        own.fetch(grads.dhidden, offset);
        own.preactivations(group.p1, s.of_gate, low.a1, offset, first, second, u1);
        own.preactivations(group.p3, s.of_up, low.a3, offset, first, second, u3);
        own.add_raised(s.of_down, low.z, offset, down);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            Vector dh[2], mask[2] = {splat(1.0f), splat(1.0f)};
            load_band(grads.dhidden + own.at[row] + offset, first, second, dh);
            if (own.masks[row]) load_band(own.masks[row] + offset, first, second, mask);
            const float gate = group.gates[run.choices[i + row]];
            Vector du1[2], du3[2], h[2], s1[2];
            sigmoid(u1[row], s1);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                Vector all = dh[v] + mask[v] * down[row][v];
                Vector silu = u1[row][v] * s1[v];
                h[v] = silu * u3[row][v];
                dgates[row] += all * h[v];
                all *= gate;
                du3[v] = all * silu;
                du1[v] = all * u3[row][v] * (s1[v] + silu * (1.0f - s1[v]));
                h[v] *= mask[v];
            }
            const int64_t place = run.place + i + row;
            Lanes<F>::store(s.du1.row(place) + offset, du1[0], du1[1]);
            Lanes<F>::store(s.du3.row(place) + offset, du3[0], du3[1]);
            if (s.of_down.is_there) Lanes<F>::store(s.h.row(place) + offset, h[0], h[1]);
        }
    });
    for (int row = 0; row < ROWS; ++row) store(s.dgates + (i + row) * W, dgates[row], Whole());
}

template <class T>
void backward(const Group<T>& group, const Gradients<T>& grads, int64_t threads) {
    using F = Multiplied<T>;
    const Plan<Part<T>> plan(group, CHUNK);
    const int64_t choices = group.tokens * group.top_k, rank = group.rank, features = group.features;
    const int64_t experts = group.num_experts, stride = group.all_ranks(), factors = stride * features;
    auto one = [](int64_t) { return 1.0f; };
    const AllLowered<F> low{
        {group.a1, stride, group, plan, threads, one},
        {group.a3, stride, group, plan, threads, one},
        {grads.dlowered, stride, group, plan, threads, [&](int64_t choice) { return group.gates[choice]; }}};
    const Shares da1(choices, group.a1 ? rank : 0, plan.chunks.count);
    const Shares da3(choices, group.a3 ? rank : 0, plan.chunks.count);
    const Shares shares_of_gates(choices, 1, plan.chunks.count);
    auto make = [&] { return BackwardScratch<T, F>(group, plan.chunks.width); };
    plan.run(threads, make, [&](const Task<Part<T>>& task, BackwardScratch<T, F>& s) {
        s.of_gate.fill_turned(task.part.b1, task.chosen, task.columns, features, task.part.scaling);
        s.of_up.fill_turned(task.part.b3, task.chosen, task.columns, features, task.part.scaling);
        s.of_down.fill(task.part.down_a, task.chosen, task.columns, features);
        for (const auto* sums : {&s.db1, &s.db3, &s.ddown_a}) sums->clear(experts);
        for (const Block& block : task.blocks) {
            block.runs([&](const Run& run) {
                by_groups<2>(run.size, [&](int64_t i, auto rows) {
                    backward_rows<rows.value>(group, grads, task, run, i, low, s);
                });
                auto add = [&](const F* turned, const Rows<F>& rows, const FactorSums<F>& sums) {
                    add_outer(turned, rows.of(run), run.size, sums.sums, run.expert, task.columns);
                };
                auto reading_x = [&](const Factors<F>& of, const Lowered<F>& lowered, const Rows<F>& rows,
                                     const FactorSums<F>& sums, const Shares& shares) {
                    if (!of.is_there) return;
                    dots(rows.of(run), run.size, of.dotted, run.expert, task.columns, s.products);
                    for (int64_t i = 0; i < run.size; ++i)
                        copy(s.products + i * rank, rank, shares.of(task.chunk, run.choices[i]));
                    add(lowered.of_run(run), rows, sums);
                };
                reading_x(s.of_gate, low.a1, s.du1, s.db1, da1);
                reading_x(s.of_up, low.a3, s.du3, s.db3, da3);
                if (s.of_down.is_there) add(low.z.of_run(run), s.h, s.ddown_a);
                for (int64_t i = 0; i < run.size; i += W) {
                    Vector all[W];
                    for (int k = 0; k < W; ++k) all[k] = load(s.dgates + (i + k) * W, Whole());
                    Vector totals = sums_of(all);
                    for (int64_t k = i; k < std::min(i + W, run.size); ++k)
                        *shares_of_gates.of(task.chunk, run.choices[k]) = totals[k - i];
                }
            });
            s.du1.write_sums(block, task.columns, group, grads.dp1, one);
            s.du3.write_sums(block, task.columns, group, grads.dp3, one);
        }
        if (s.of_gate.is_there) s.db1.write_turned(grads.db1 + task.index * factors, experts, task.columns, features);
        if (s.of_up.is_there) s.db3.write_turned(grads.db3 + task.index * factors, experts, task.columns, features);
        if (s.of_down.is_there) s.ddown_a.write(grads.ddown_a + task.index * factors, experts, task.columns, features);
    });
    for (int64_t i = 0; i < choices; ++i) grads.dgates[i] = shares_of_gates.total(i, 0, int64_t(1))[0];
    const int64_t da_stride = ((group.a1 != nullptr) + (group.a3 != nullptr)) * stride;
    for (const Part<T>& part : plan.parts) {
        if (group.a1) da1.scatter(group, part, grads.da, da_stride, threads);
        if (group.a3) da3.scatter(group, part, grads.da + da_stride - stride, da_stride, threads);
    }
}

#define MOE_MIXLORA_GROUP(T)                                                                                  \
    const T *p1, const T *p3, const T *a1, const T *a3, const float *gates, const int64_t *experts,           \
        const int64_t *described, const float *scalings, int64_t tokens, int64_t features, int64_t num_parts, \
        int64_t num_experts, int64_t top_k, int64_t rank
#define MOE_MIXLORA_FFN(T, NAME)                                                                                       \
    MOE_EXPORT int mixlora_ffn_forward_##NAME(MOE_MIXLORA_GROUP(T), T* hidden, T* lowered, int64_t threads) {          \
        return guarded([&] {                                                                                           \
            forward<T>({p1, p3, a1, a3, gates, experts, described, scalings, tokens, features, num_parts, num_experts, \
                        top_k, rank},                                                                                  \
                       hidden, lowered, threads);                                                                      \
        });                                                                                                            \
    }                                                                                                                  \
    MOE_EXPORT int mixlora_ffn_backward_##NAME(MOE_MIXLORA_GROUP(T), const T* dhidden, const T* dlowered, T* dp1,      \
                                               T* dp3, float* dgates, T* da, float* db1, float* db3, float* ddown_a,   \
                                               int64_t threads) {                                                      \
        return guarded([&] {                                                                                           \
            backward<T>({p1, p3, a1, a3, gates, experts, described, scalings, tokens, features, num_parts,             \
                         num_experts, top_k, rank},                                                                    \
                        {dhidden, dlowered, dp1, dp3, dgates, da, db1, db3, ddown_a}, threads);                        \
        });                                                                                                            \
    }
MOE_MIXLORA_FFN(float, float32)
MOE_MIXLORA_FFN(bfloat16, bfloat16)

}  // namespace moe::mixlora_ffn
