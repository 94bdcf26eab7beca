// The mixture of LoRA experts between the frozen products of a SwiGLU layer: all that is F wide, forward and backward.
//
// Letters as in pieces.h; F also names the type of what is multiplied.
#include "ffn_group.h"
#include "lowered.h"
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
    int64_t at[ROWS], next[ROWS];
    const T* masks[ROWS];
    for (int row = 0; row < ROWS; ++row) {
        const Place<T> place(group, task, run.choices[i + row]);
        at[row] = place.at;
        masks[row] = place.mask;
        next[row] = Place<T>(group, task, run.choices[std::min(i + row + AHEAD, run.size - 1)]).at;
    }
    task.columns.bands([&](int64_t offset, auto first, auto second) {
        Vector u1[ROWS][2], u3[ROWS][2];
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            const T *p1 = group.p1 + at[row] + offset, *p3 = group.p3 + at[row] + offset;
            fetch(group.p1 + next[row] + offset);
            fetch(group.p3 + next[row] + offset);
            u1[row][0] = load(p1, first);
            u1[row][1] = load(p1 + W, second);
            u3[row][0] = load(p3, first);
            u3[row][1] = load(p3 + W, second);
        }
        if (s.of_gate.is_there) raise<ROWS>(a1.row(run, i), a1.ranks, s.of_gate.raising.band(run.expert, offset), u1);
        if (s.of_up.is_there) raise<ROWS>(a3.row(run, i), a3.ranks, s.of_up.raising.band(run.expert, offset), u3);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            Vector h[2], s1[2];
            sigmoid(u1[row], s1);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) h[v] = u1[row][v] * s1[v] * u3[row][v];
            const int64_t place = run.place + i + row;
            Lanes<F>::store(s.h.row(place) + offset, h[0], h[1]);
            if (!masks[row]) continue;
            const T* mask = masks[row] + offset;
            Lanes<F>::store(s.masked_h.row(place) + offset, h[0] * load(mask, first), h[1] * load(mask + W, second));
        }
    });
}

template <class T>
void forward(const Group<T>& group, T* hidden, T* lowered, int64_t threads) {
    using F = Multiplied<T>;
    const Plan<Part<T>> plan(group, CHUNK);
    const int64_t rank = group.rank;
    const int64_t stride = group.all_ranks();
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
                by_twos(run, [&](int64_t i, auto rows) { forward_rows<rows.value>(group, task, run, i, a1, a3, s); });
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
        if (lowered) shares.scatter(group, part, lowered, group.all_ranks(), threads);
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
    int64_t at[ROWS], next[ROWS];
    const T* masks[ROWS];
    float gates[ROWS];
    for (int row = 0; row < ROWS; ++row) {
        const Place<T> place(group, task, run.choices[i + row]);
        at[row] = place.at;
        masks[row] = place.mask;
        gates[row] = group.gates[run.choices[i + row]];
        next[row] = Place<T>(group, task, run.choices[std::min(i + row + AHEAD, run.size - 1)]).at;
    }
    Vector dgates[ROWS] = {};
    task.columns.bands([&](int64_t offset, auto first, auto second) {
        Vector u1[ROWS][2], u3[ROWS][2], down[ROWS][2] = {};
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            const T *p1 = group.p1 + at[row] + offset, *p3 = group.p3 + at[row] + offset;
            fetch(group.p1 + next[row] + offset);
            fetch(group.p3 + next[row] + offset);
            fetch(grads.dhidden + next[row] + offset);
            u1[row][0] = load(p1, first);
            u1[row][1] = load(p1 + W, second);
            u3[row][0] = load(p3, first);
            u3[row][1] = load(p3 + W, second);
        }
        if (s.of_gate.is_there)
            raise<ROWS>(low.a1.row(run, i), low.a1.ranks, s.of_gate.raising.band(run.expert, offset), u1);
        if (s.of_up.is_there)
            raise<ROWS>(low.a3.row(run, i), low.a3.ranks, s.of_up.raising.band(run.expert, offset), u3);
        if (s.of_down.is_there)
            raise<ROWS>(low.z.row(run, i), low.z.ranks, s.of_down.raising.band(run.expert, offset), down);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            const T* dhidden = grads.dhidden + at[row] + offset;
            Vector dh[2] = {load(dhidden, first), load(dhidden + W, second)}, mask[2] = {splat(1.0f), splat(1.0f)};
            if (masks[row]) {
                mask[0] = load(masks[row] + offset, first);
                mask[1] = load(masks[row] + offset + W, second);
            }
            Vector du1[2], du3[2], h[2], s1[2];
            sigmoid(u1[row], s1);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                Vector all = dh[v] + mask[v] * down[row][v];
                Vector silu = u1[row][v] * s1[v];
                h[v] = silu * u3[row][v];
                dgates[row] += all * h[v];
                all *= gates[row];
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
    const int64_t experts = group.num_experts, factors = group.all_ranks() * features;
    auto one = [](int64_t) { return 1.0f; };
    const int64_t stride = group.all_ranks();
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
                by_twos(run,
                        [&](int64_t i, auto rows) { backward_rows<rows.value>(group, grads, task, run, i, low, s); });
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
