// The mixture of LoRA experts between the frozen products of a SwiGLU layer: all that is F wide, forward and backward.
//
// Letters as in pieces.h, and N the choices of a tile.
#include "sums.h"
#include "tiles.h"

namespace moe::mixlora_ffn {

// Where a choice's columns of one panel are.
template <class T>
struct Place {
    int64_t token, at;  // `at` in [T, F]
    const T* mask;

    Place(const Group<T>& group, const Task<T>& task, int64_t choice, int64_t offset)
        : token(choice / group.top_k), at(token * group.features + task.columns.start + offset) {
        mask = task.part.h_mask ? task.part.h_mask + at - task.part.start * group.features : nullptr;
    }
};

template <class T>
struct ForwardScratch {
    Table table1, table3, down;
    Buffer a1, a3, u1, u3, products;
    BlockSums sums;

    ForwardScratch(const Group<T>& group, const Chunks& chunks)
        : table1(group, chunks),
          table3(group, chunks),
          down(group, chunks),
          a1(TILE * group.rank),
          a3(TILE * group.rank),
          u1(TILE * chunks.width),
          u3(TILE * chunks.width),
          products(TILE * group.rank),
          sums(chunks) {}
};

// g h is added to the block's sums, and what the down experts read takes the place of u1.
template <class T>
void forward_panel(const Group<T>& group, const Task<T>& task, const Block& block, const Tile& tile, int64_t offset,
                   int64_t width, ForwardScratch<T>& s) {
    float *u1s = s.u1 + offset * TILE, *u3s = s.u3 + offset * TILE;
    raise(s.a1, tile, s.table1, offset, u1s);
    raise(s.a3, tile, s.table3, offset, u3s);
    const float scaling = task.part.scaling;
    for (int64_t i = 0; i < tile.size; ++i, u1s += PANEL, u3s += PANEL) {
        const Place<T> place(group, task, tile.choices[i], offset);
        const T *p1 = group.p1 + place.at, *p3 = group.p3 + place.at;
        const float gate = group.gates[tile.choices[i]];
        float* sums = s.sums.row(block, place.token) + offset;
        across(width, [&](int64_t j, auto count) {
            Vector u1 = load(p1 + j, count) + scaling * load(u1s + j, Whole());
            Vector u3 = load(p3 + j, count) + scaling * load(u3s + j, Whole());
            Vector h = u1 * sigmoid(u1) * u3;
            store(sums + j, load(sums + j, count) + gate * h, count);
            store(u1s + j, first(place.mask ? h * load(place.mask + j, count) : h, count), Whole());
        });
    }
}

template <class T>
void forward(const Group<T>& group, T* hidden, T* lowered, int64_t threads) {
    const Plan<T> plan(group);
    const Shares shares(group.tokens * group.top_k, lowered ? group.rank : 0, plan.chunks.count);
    auto make = [&] { return ForwardScratch<T>(group, plan.chunks); };
    plan.run(threads, make, [&](const Task<T>& task, ForwardScratch<T>& s) {
        s.table1.fill_turned(task.part.b1, task.chosen, task.columns);
        s.table3.fill_turned(task.part.b3, task.chosen, task.columns);
        s.down.fill(task.part.down_a, task.chosen, task.columns);
        for (const Block& block : task.blocks) {
            block.fetch(group.p1, task.columns, group.features);
            block.fetch(group.p3, task.columns, group.features);
            s.sums.clear(block);
            block.tiles([&](const Tile& tile) {
                if (s.table1.is_there) gather(group.a1, group, tile, s.a1);
                if (s.table3.is_there) gather(group.a3, group, tile, s.a3);
                task.columns.panels(
                    [&](int64_t offset, int64_t width) { forward_panel(group, task, block, tile, offset, width, s); });
                if (!s.down.is_there) return;
                inner_products(s.u1, tile, s.down, task.columns, s.products);
                for (int64_t i = 0; i < tile.size; ++i)
                    for (int64_t r = 0; r < group.rank; ++r)
                        shares.of(task.chunk, tile.choices[i])[r] =
                            group.gates[tile.choices[i]] * s.products[i * group.rank + r];
            });
            s.sums.write(block, task.columns, hidden, group.features);
        }
    });
    for (const Part<T>& part : plan.parts)
        if (lowered) shares.scatter(group, part, 1.0f, lowered, group.all_ranks(), threads);
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

template <class T>
struct BackwardScratch {
    Table table1, table3, down, db1, db3, ddown_a;
    Buffer a1, a3, z, gz, du1, du3, h, products;
    BlockSums dp1, dp3;

    BackwardScratch(const Group<T>& group, const Chunks& chunks)
        : table1(group, chunks),
          table3(group, chunks),
          down(group, chunks),
          db1(group, chunks),
          db3(group, chunks),
          ddown_a(group, chunks),
          a1(TILE * group.rank),
          a3(TILE * group.rank),
          z(TILE * group.rank),
          gz(TILE * group.rank),
          du1(TILE * chunks.width),
          du3(TILE * chunks.width),
          h(TILE * chunks.width),
          products(TILE * group.rank),
          dp1(chunks),
          dp3(chunks) {}
};

// du1 and du3 take the places of u1 and u3, and are added to the block's dp1 and dp3; what the down experts read takes
// that of their gradient. `dgates` has the choices' shares up to this panel.
template <class T>
void backward_panel(const Group<T>& group, const Gradients<T>& grads, const Task<T>& task, const Block& block,
                    const Tile& tile, int64_t offset, int64_t width, Vector* dgates, BackwardScratch<T>& s) {
    float *u1s = s.du1 + offset * TILE, *u3s = s.du3 + offset * TILE, *downs = s.h + offset * TILE;
    raise(s.a1, tile, s.table1, offset, u1s);
    raise(s.a3, tile, s.table3, offset, u3s);
    raise(s.z, tile, s.down, offset, downs);
    const float scaling = task.part.scaling;
    for (int64_t i = 0; i < tile.size; ++i, u1s += PANEL, u3s += PANEL, downs += PANEL) {
        const Place<T> place(group, task, tile.choices[i], offset);
        const T *p1 = group.p1 + place.at, *p3 = group.p3 + place.at, *dhidden = grads.dhidden + place.at;
        const float gate = group.gates[tile.choices[i]];
        float *dp1 = s.dp1.row(block, place.token) + offset, *dp3 = s.dp3.row(block, place.token) + offset;
        Vector dgate = dgates[i];
        across(width, [&](int64_t j, auto count) {
            Vector u1 = load(p1 + j, count) + scaling * load(u1s + j, Whole());
            Vector u3 = load(p3 + j, count) + scaling * load(u3s + j, Whole());
            Vector mask = place.mask ? load(place.mask + j, count) : splat(1.0f);
            Vector dh = load(dhidden + j, count) + mask * load(downs + j, Whole());
            Vector s1 = sigmoid(u1), silu = u1 * s1, h = silu * u3;
            dgate += first(dh * h, count);
            dh *= gate;
            Vector du3 = first(dh * silu, count);
            Vector du1 = first(dh * u3 * (s1 + silu * (1.0f - s1)), count);
            store(u1s + j, du1, Whole());
            store(u3s + j, du3, Whole());
            store(downs + j, first(mask * h, count), Whole());
            store(dp1 + j, load(dp1 + j, count) + du1, count);
            store(dp3 + j, load(dp3 + j, count) + du3, count);
        });
        dgates[i] = dgate;
    }
    if (s.table1.is_there) add_outer(s.a1, tile, s.du1 + offset * TILE, s.db1, offset);
    if (s.table3.is_there) add_outer(s.a3, tile, s.du3 + offset * TILE, s.db3, offset);
    if (s.down.is_there) add_outer(s.gz, tile, s.h + offset * TILE, s.ddown_a, offset);
}

template <class T>
void backward(const Group<T>& group, const Gradients<T>& grads, int64_t threads) {
    const Plan<T> plan(group);
    const int64_t choices = group.tokens * group.top_k, rank = group.rank, factors = group.all_ranks() * group.features;
    const Shares da1(choices, group.a1 ? rank : 0, plan.chunks.count);
    const Shares da3(choices, group.a3 ? rank : 0, plan.chunks.count);
    const Shares shares_of_gates(choices, 1, plan.chunks.count);
    auto make = [&] { return BackwardScratch<T>(group, plan.chunks); };
    plan.run(threads, make, [&](const Task<T>& task, BackwardScratch<T>& s) {
        s.table1.fill_turned(task.part.b1, task.chosen, task.columns);
        s.table3.fill_turned(task.part.b3, task.chosen, task.columns);
        s.down.fill(task.part.down_a, task.chosen, task.columns);
        for (Table* sums : {&s.db1, &s.db3, &s.ddown_a}) sums->clear();
        for (const Block& block : task.blocks) {
            for (const T* x : {group.p1, group.p3, grads.dhidden}) block.fetch(x, task.columns, group.features);
            s.dp1.clear(block);
            s.dp3.clear(block);
            block.tiles([&](const Tile& tile) {
                if (s.table1.is_there) gather(group.a1, group, tile, s.a1);
                if (s.table3.is_there) gather(group.a3, group, tile, s.a3);
                if (s.down.is_there) gather(grads.dlowered, group, tile, s.z);
                for (int64_t i = 0; i < tile.size && s.down.is_there; ++i)
                    for (int64_t r = i * rank; r < (i + 1) * rank; ++r) s.gz[r] = group.gates[tile.choices[i]] * s.z[r];
                Vector dgates[TILE] = {};
                task.columns.panels([&](int64_t offset, int64_t width) {
                    backward_panel(group, grads, task, block, tile, offset, width, dgates, s);
                });
                auto share = [&](const Table& table, const float* values, const Shares& shares) {
                    if (!table.is_there) return;
                    inner_products(values, tile, table, task.columns, s.products);
                    for (int64_t i = 0; i < tile.size; ++i)
                        std::copy_n(s.products + i * rank, rank, shares.of(task.chunk, tile.choices[i]));
                };
                share(s.table1, s.du1, da1);
                share(s.table3, s.du3, da3);
                for (int64_t i = 0; i < tile.size; i += W) {
                    Vector totals = sums_of(dgates + i);
                    for (int64_t j = i; j < std::min(i + W, tile.size); ++j)
                        *shares_of_gates.of(task.chunk, tile.choices[j]) = totals[j - i];
                }
            });
            s.dp1.write(block, task.columns, grads.dp1, group.features);
            s.dp3.write(block, task.columns, grads.dp3, group.features);
        }
        if (s.table1.is_there) s.db1.write_turned(grads.db1 + task.index * factors, task.columns);
        if (s.table3.is_there) s.db3.write_turned(grads.db3 + task.index * factors, task.columns);
        if (s.down.is_there) s.ddown_a.write(grads.ddown_a + task.index * factors, task.columns);
    });
    for (int64_t i = 0; i < choices; ++i) grads.dgates[i] = shares_of_gates.total(i, 0, int64_t(1))[0];
    const int64_t stride = ((group.a1 != nullptr) + (group.a3 != nullptr)) * group.all_ranks();
    for (const Part<T>& part : plan.parts) {
        if (group.a1) da1.scatter(group, part, part.scaling, grads.da, stride, threads);
        if (group.a3) da3.scatter(group, part, part.scaling, grads.da + stride - group.all_ranks(), stride, threads);
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
