// Causal grouped-query attention over samples laid end to end, a key-value head of a sample after the other.
//
// All that a head of a sample touches stays in a core's cache: its keys and values, and the scores of a block of
// queries. Scores and all sums are float32; what is multiplied, probabilities too, is of numbers F (lanes.h). Letters:
// L tokens of a sample, H query heads, G key-value heads, d features of a head, B queries of a block.
#include <cmath>

#include "../small_gemm.h"

namespace moe {

constexpr int64_t BLOCK = 64;  // B

struct Shape {
    int64_t heads, groups, size, window;  // no window: 0
    int64_t padded;                       // d in whole panels
    float scale;

    Shape(int64_t heads, int64_t groups, int64_t size, int64_t window)
        : heads(heads),
          groups(groups),
          size(size),
          window(window),
          padded(whole_panels(size)),
          scale(1.0f / std::sqrt(static_cast<float>(size))) {}

    int64_t share() const { return heads / groups; }
    int64_t query_stride() const { return heads * size; }
    int64_t key_stride() const { return groups * size; }
    // First key that a query sees.
    int64_t first_key(int64_t query) const { return window && query >= window ? query - window + 1 : 0; }
};

struct Sample {
    int64_t start, length, group;

    Sample(const int64_t* boundaries, int64_t task, const Shape& shape)
        : start(boundaries[task / shape.groups]),
          length(boundaries[task / shape.groups + 1] - start),
          group(task % shape.groups) {}
};

// Queries of a block, and the keys that any of them sees, in whole panels.
struct Block {
    int64_t start, end, first, last;

    Block(int64_t start, const Sample& sample, const Shape& shape)
        : start(start),
          end(std::min(start + BLOCK, sample.length)),
          first(shape.first_key(start) / PANEL * PANEL),
          last(end) {}

    int64_t rows() const { return end - start; }
    int64_t keys() const { return last - first; }
    // Keys in whole vectors.
    int64_t room() const { return (keys() + W - 1) / W * W; }
};

// Rows of T as what is multiplied: in `room`, or where they are.
template <class F, class T>
const F* as_factors(const T* rows, int64_t& stride, int64_t count, int64_t size, const Numbers<F>& room) {
    if constexpr (std::is_same_v<T, F>) return rows;
    for (int64_t row = 0; row < count; ++row)
        across(size, [&](int64_t i, auto n) { store(room + row * size + i, load(rows + row * stride + i, n), n); });
    stride = size;
    return room;
}

// Scores [B, keys] as what is multiplied, rows as they are; keys in whole vectors.
template <class F>
const F* as_rows(const float* scores, int64_t stride, int64_t rows, int64_t keys, const Numbers<F>& room) {
    if constexpr (std::is_same_v<F, float>) return scores;
    for (int64_t row = 0; row < rows; ++row)
        across(keys, [&](int64_t i, auto) {
            store(room + row * stride + i, load(scores + row * stride + i, Whole()), Whole());
        });
    return room;
}

// The same with DEPTH queries beside each other, [B / DEPTH, keys, DEPTH].
template <class F>
const F* turned(const float* scores, int64_t stride, int64_t rows, int64_t keys, const Numbers<F>& room) {
    if constexpr (std::is_same_v<F, float>) return scores;
    constexpr int DEPTH = Lanes<F>::DEPTH;
    for (int64_t row = 0; row < rows; row += DEPTH)
        for (int64_t i = 0; i < keys; i += W) {
            const float* own = scores + row * stride + i;
            Vector next = row + 1 < rows ? load(own + stride, Whole()) : Vector{};
            Lanes<F>::store_beside(room + row * stride + i * DEPTH, load(own, Whole()), next);
        }
    return room;
}

// Rows [rows, padded] in float32, times a factor, as T.
template <class T>
void narrow(const float* from, int64_t padded, int64_t rows, int64_t size, float factor, T* to, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row)
        across(size, [&](int64_t i, auto count) {
            store(to + row * stride + i, load(from + row * padded + i, count) * factor, count);
        });
}

// A block's products [B, keys] of queries and keys to exponentials, 0 where a query does not look; each row's sum is
// returned in `sums`.
inline void exponentials(float* scores, int64_t stride, const Block& block, const Shape& shape, float* sums) {
    for (int64_t row = 0; row < block.rows(); ++row) {
        float* own = scores + row * stride;
        int64_t query = block.start + row;
        int64_t low = shape.first_key(query) - block.first, high = query + 1 - block.first;
        std::fill(own, own + low, 0.0f);
        float most = own[low];
        Vector highest = splat(most);
        across(high - low, [&](int64_t i, auto count) {
            if constexpr (std::is_same_v<decltype(count), Whole>)
                highest = larger(highest, load(own + low + i, count));
            else
                for (int64_t k = 0; k < count; ++k) most = std::max(most, own[low + i + k]);
        });
        most = std::max(most, largest(highest));
        Vector total{};
        across(high - low, [&](int64_t i, auto count) {
            Vector p = first(exp((load(own + low + i, count) - most) * shape.scale), count);
            store(own + low + i, p, count);
            total += p;
        });
        sums[row] = sum(total);
        std::fill(own + high, own + block.room(), 0.0f);
    }
}

template <class F, class T>
void causal_attention_forward(const T* q, const T* k, const T* v, T* out, const int64_t* boundaries,
                              int64_t num_samples, int64_t longest, const Shape& shape, int64_t threads) {
    constexpr int DEPTH = Lanes<F>::DEPTH;
    struct Scratch {
        Numbers<F> keys, values, queries, p;
        Buffer scores, mixed;
    };
    int64_t room = whole_panels(longest);
    auto make = [&] {
        return Scratch{Numbers<F>(shape.size * room),  Numbers<F>(whole_depths<F>(longest) * shape.padded),
                       Numbers<F>(BLOCK * shape.size), Numbers<F>(BLOCK * room),
                       Buffer(BLOCK * room),           Buffer(BLOCK * shape.padded)};
    };
    parallel_with(num_samples * shape.groups, threads, make, [&](int64_t task, Scratch& s) {
        Sample sample(boundaries, task, shape);
        if (!sample.length) return;
        int64_t at = sample.start * shape.key_stride() + sample.group * shape.size;
        pack_columns<F>(k + at, shape.key_stride(), sample.length, shape.size, s.keys);
        pack_rows<F>(v + at, shape.key_stride(), sample.length, shape.size, s.values);
        for (int64_t head = sample.group * shape.share(); head < (sample.group + 1) * shape.share(); ++head) {
            for (int64_t start = 0; start < sample.length; start += BLOCK) {
                Block block(start, sample, shape);
                int64_t stride = shape.query_stride();
                int64_t own = (sample.start + start) * stride + head * shape.size;
                const F* queries = as_factors<F>(q + own, stride, block.rows(), shape.size, s.queries);
                multiply<false, F>(queries, stride, DEPTH, block.rows(), s.keys + block.first * shape.size, shape.size,
                                   shape.size, block.keys(), s.scores, room);
                float sums[BLOCK];
                exponentials(s.scores, room, block, shape, sums);
                const F* p = as_rows<F>(s.scores, room, block.rows(), block.keys(), s.p);
                multiply<false, F>(p, room, DEPTH, block.rows(), s.values + block.first * PANEL,
                                   whole_depths<F>(sample.length), block.keys(), shape.size, s.mixed, shape.padded);
                for (int64_t row = 0; row < block.rows(); ++row)
                    narrow(s.mixed + row * shape.padded, shape.padded, 1, shape.size, 1.0f / sums[row],
                           out + own + row * shape.query_stride(), 0);
            }
        }
    });
}

// Exponentials to probabilities, and the gradient of probabilities to that of scores: p * (dp - the row's sum of p *
// dp).
inline void score_gradients(float* p, float* dp, int64_t stride, const Block& block, const float* sums) {
    for (int64_t row = 0; row < block.rows(); ++row) {
        float *own_p = p + row * stride, *own_dp = dp + row * stride;
        float inverse = 1.0f / sums[row];
        Vector products{};
        across(block.keys(), [&](int64_t i, auto count) {
            Vector x = load(own_p + i, count) * inverse, d = load(own_dp + i, count);
            store(own_p + i, x, count);
            products += x * d;
        });
        float total = sum(products);
        across(block.keys(), [&](int64_t i, auto count) {
            store(own_dp + i, load(own_p + i, count) * (load(own_dp + i, count) - total), count);
        });
    }
}

template <class F, class T>
void causal_attention_backward(const T* d_out, const T* q, const T* k, const T* v, T* dq, T* dk, T* dv,
                               const int64_t* boundaries, int64_t num_samples, int64_t longest, const Shape& shape,
                               int64_t threads) {
    constexpr int DEPTH = Lanes<F>::DEPTH;
    struct Scratch {
        Numbers<F> keys, key_rows, values, queries, query_rows, d_rows, d_panels, rows, turned;
        Buffer p, dp, dq, dk, dv;
    };
    int64_t room = whole_panels(longest);
    auto make = [&] {
        auto sums = [&](int64_t count) { return Buffer(count * shape.padded); };
        auto panels = [&](int64_t count) { return Numbers<F>(whole_depths<F>(count) * shape.padded); };
        auto numbers = [](int64_t count) { return Numbers<F>(count); };
        return Scratch{numbers(shape.size * room),
                       panels(longest),
                       numbers(shape.size * room),
                       numbers(BLOCK * shape.size),
                       panels(BLOCK),
                       numbers(BLOCK * shape.size),
                       panels(BLOCK),
                       numbers(BLOCK * room),
                       numbers(BLOCK * room),
                       Buffer(BLOCK * room),
                       Buffer(BLOCK * room),
                       sums(BLOCK),
                       sums(longest),
                       sums(longest)};
    };
    parallel_with(num_samples * shape.groups, threads, make, [&](int64_t task, Scratch& s) {
        Sample sample(boundaries, task, shape);
        if (!sample.length) return;
        int64_t at = sample.start * shape.key_stride() + sample.group * shape.size;
        pack_columns<F>(k + at, shape.key_stride(), sample.length, shape.size, s.keys);
        pack_rows<F>(k + at, shape.key_stride(), sample.length, shape.size, s.key_rows);
        pack_columns<F>(v + at, shape.key_stride(), sample.length, shape.size, s.values);
        std::fill_n(static_cast<float*>(s.dk), sample.length * shape.padded, 0.0f);
        std::fill_n(static_cast<float*>(s.dv), sample.length * shape.padded, 0.0f);
        for (int64_t head = sample.group * shape.share(); head < (sample.group + 1) * shape.share(); ++head) {
            for (int64_t start = 0; start < sample.length; start += BLOCK) {
                Block block(start, sample, shape);
                int64_t rows = block.rows(), keys = block.keys(), stride = shape.query_stride();
                int64_t own = (sample.start + start) * stride + head * shape.size, q_stride = stride, d_stride = stride;
                const F* queries = as_factors<F>(q + own, q_stride, rows, shape.size, s.queries);
                const F* d_rows = as_factors<F>(d_out + own, d_stride, rows, shape.size, s.d_rows);
                pack_rows<F>(q + own, stride, rows, shape.size, s.query_rows);
                pack_rows<F>(d_out + own, stride, rows, shape.size, s.d_panels);
                multiply<false, F>(queries, q_stride, DEPTH, rows, s.keys + block.first * shape.size, shape.size,
                                   shape.size, keys, s.p, room);
                multiply<false, F>(d_rows, d_stride, DEPTH, rows, s.values + block.first * shape.size, shape.size,
                                   shape.size, keys, s.dp, room);
                float sums[BLOCK];
                exponentials(s.p, room, block, shape, sums);
                score_gradients(s.p, s.dp, room, block, sums);
                multiply<false, F>(as_rows<F>(s.dp, room, rows, keys, s.rows), room, DEPTH, rows,
                                   s.key_rows + block.first * PANEL, whole_depths<F>(sample.length), keys, shape.size,
                                   s.dq, shape.padded);
                narrow(s.dq, shape.padded, rows, shape.size, shape.scale, dq + own, stride);
                multiply<true, F>(turned<F>(s.p, room, rows, keys, s.turned), DEPTH, room * DEPTH, keys, s.d_panels,
                                  whole_depths<F>(rows), rows, shape.size, s.dv + block.first * shape.padded,
                                  shape.padded);
                multiply<true, F>(turned<F>(s.dp, room, rows, keys, s.turned), DEPTH, room * DEPTH, keys, s.query_rows,
                                  whole_depths<F>(rows), rows, shape.size, s.dk + block.first * shape.padded,
                                  shape.padded);
            }
        }
        narrow(s.dk, shape.padded, sample.length, shape.size, shape.scale, dk + at, shape.key_stride());
        narrow(s.dv, shape.padded, sample.length, shape.size, 1.0f, dv + at, shape.key_stride());
    });
}

// Calls `body` with a number of what is multiplied: of pairs only where a head's features make whole ones.
template <class T, class Body>
void with_factors(int64_t size, Body body) {
    if (size % Lanes<Multiplied<T>>::DEPTH)
        body(float());
    else
        body(Multiplied<T>());
}

#define MOE_CAUSAL_ATTENTION(T, NAME)                                                                                 \
    MOE_EXPORT int causal_attention_forward_##NAME(                                                                   \
        const T* q, const T* k, const T* v, T* out, const int64_t* boundaries, int64_t num_samples, int64_t longest,  \
        int64_t heads, int64_t groups, int64_t size, int64_t window, int64_t threads) {                               \
        return guarded([&] {                                                                                          \
            with_factors<T>(size, [&](auto number) {                                                                  \
                causal_attention_forward<decltype(number)>(q, k, v, out, boundaries, num_samples, longest,            \
                                                           Shape(heads, groups, size, window), threads);              \
            });                                                                                                       \
        });                                                                                                           \
    }                                                                                                                 \
    MOE_EXPORT int causal_attention_backward_##NAME(const T* d_out, const T* q, const T* k, const T* v, T* dq, T* dk, \
                                                    T* dv, const int64_t* boundaries, int64_t num_samples,            \
                                                    int64_t longest, int64_t heads, int64_t groups, int64_t size,     \
                                                    int64_t window, int64_t threads) {                                \
        return guarded([&] {                                                                                          \
            with_factors<T>(size, [&](auto number) {                                                                  \
                causal_attention_backward<decltype(number)>(d_out, q, k, v, dq, dk, dv, boundaries, num_samples,      \
                                                            longest, Shape(heads, groups, size, window), threads);    \
            });                                                                                                       \
        });                                                                                                           \
    }
MOE_CAUSAL_ATTENTION(float, float32)
MOE_CAUSAL_ATTENTION(bfloat16, bfloat16)

}  // namespace moe
