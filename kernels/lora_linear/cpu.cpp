// The low-rank products of several adapters on projections of one input: what they add to the frozen products' results,
// and their gradients.
//
// Rows are taken in tiles that stay in a core's cache, so that x, each y and each gradient pass through memory once.
// Letters: I input features, O output features, R rank, n rows of a range, J projections.
#include <vector>

#include "../low_rank.h"

namespace moe {

// One adapter's factors on one projection.
struct Pair {
    const float *lora_a, *lora_b;       // [R, I], [O, R]
    int64_t rank, out_features, place;  // where its ranks stand among the range's
    float scaling;
};

// One adapter's rows.
template <class T>
struct Range {
    int64_t start, rows, ranks;
    const T* mask;  // [n, I] or none
    T* lowered;     // [n, sum R]
    std::vector<Pair> pairs;
    Buffer stacked_a;               // A of all, [sum R, I]
    std::vector<Buffer> scaled_bs;  // s B^T of each projection, [R, O]

    // Of a tile's rows of all ranks; a projection's last block of ranks may reach behind the last rank.
    int64_t stride() const { return whole_ranks(ranks) + RANKS; }
};

// As Python lays it out, all int64: of a range its first row, n, mask, lowered; of each of its pairs A, B and R.
template <class T>
std::vector<Range<T>> read_ranges(const int64_t* table, const double* scalings, const int64_t* widths,
                                  int64_t num_ranges, int64_t num_projections) {
    std::vector<Range<T>> ranges(num_ranges);
    for (Range<T>& range : ranges) {
        range.start = table[0];
        range.rows = table[1];
        range.mask = reinterpret_cast<const T*>(table[2]);
        range.lowered = reinterpret_cast<T*>(table[3]);
        range.ranks = 0;
        table += 4;
        for (int64_t j = 0; j < num_projections; ++j, table += 3, ++scalings) {
            range.pairs.push_back({reinterpret_cast<const float*>(table[0]), reinterpret_cast<const float*>(table[1]),
                                   table[2], widths[j], range.ranks, static_cast<float>(*scalings)});
            range.ranks += table[2];
        }
    }
    return ranges;
}

// Factors in whole blocks of ranks, zeros behind the last one.
template <class T>
void pack_factors(std::vector<Range<T>>& ranges, int64_t features, int64_t threads) {
    parallel(ranges.size(), threads, [&](int64_t i) {
        Range<T>& range = ranges[i];
        range.stacked_a = Buffer(whole_ranks(range.ranks) * features);
        float* end = range.stacked_a;
        for (const Pair& pair : range.pairs) {
            end = std::copy_n(pair.lora_a, pair.rank * features, end);
            Buffer& scaled = range.scaled_bs.emplace_back(whole_ranks(pair.rank) * pair.out_features);
            for (int64_t o = 0; o < pair.out_features; ++o)
                for (int64_t r = 0; r < pair.rank; ++r)
                    scaled[r * pair.out_features + o] = pair.lora_b[o * pair.rank + r] * pair.scaling;
            std::fill(scaled + pair.rank * pair.out_features, scaled + whole_ranks(pair.rank) * pair.out_features,
                      0.0f);
        }
        std::fill(end, range.stacked_a + whole_ranks(range.ranks) * features, 0.0f);
    });
}

// What the factors read of some rows of x: x itself, or its product with the mask in `room`.
template <class T, class Body>
void with_input(const Range<T>& range, const T* x, int64_t first, int64_t rows, int64_t features, float* room,
                Body body) {
    const T* own = x + (range.start + first) * features;
    if (!range.mask) return body(own);
    const T* mask = range.mask + first * features;
    across(rows * features,
           [&](int64_t i, auto count) { store(room + i, load(own + i, count) * load(mask + i, count), count); });
    body(static_cast<const float*>(room));
}

// Some rows of a range, counted from its own first.
struct Piece {
    int64_t range, first, last;
};

template <class T>
std::vector<Piece> cut(const std::vector<Range<T>>& ranges, int64_t rows) {
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < static_cast<int64_t>(ranges.size()); ++i)
        for (int64_t first = 0; first < ranges[i].rows; first += rows)
            pieces.push_back({i, first, std::min(first + rows, ranges[i].rows)});
    return pieces;
}

template <class T>
int64_t widest_stride(const std::vector<Range<T>>& ranges) {
    int64_t most = 0;
    for (const auto& range : ranges) most = std::max(most, range.stride());
    return most;
}

template <class T>
void lora_linear_forward(const T* x, const int64_t* outputs, const int64_t* widths, const int64_t* table,
                         const double* scalings, int64_t features, int64_t num_ranges, int64_t num_projections,
                         int64_t threads) {
    auto ranges = read_ranges<T>(table, scalings, widths, num_ranges, num_projections);
    pack_factors(ranges, features, threads);
    auto pieces = cut(ranges, TILE);
    struct Scratch {
        Buffer x, lowered;
    };
    auto make = [&] { return Scratch{Buffer(TILE * features), Buffer(TILE * widest_stride(ranges))}; };
    parallel_with(pieces.size(), threads, make, [&](int64_t task, Scratch& s) {
        const Piece& piece = pieces[task];
        const Range<T>& range = ranges[piece.range];
        int64_t rows = piece.last - piece.first, stride = range.stride();
        with_input(range, x, piece.first, rows, features, s.x,
                   [&](auto* input) { dots(input, rows, range.stacked_a, range.ranks, features, s.lowered, stride); });
        for (int64_t row = 0; row < rows; ++row)  // what is added is what backward will read
            across(range.ranks, [&](int64_t i, auto count) {
                T* kept = range.lowered + (piece.first + row) * range.ranks + i;
                store(kept, load(s.lowered + row * stride + i, count), count);
                store(s.lowered + row * stride + i, load(kept, count), count);
            });
        for (int64_t j = 0; j < num_projections; ++j) {
            if (!range.pairs[j].rank) continue;
            T* y = reinterpret_cast<T*>(outputs[j]) + (range.start + piece.first) * widths[j];
            add_combination<T>(s.lowered + range.pairs[j].place, stride, rows, range.scaled_bs[j], range.pairs[j].rank,
                               widths[j], nullptr, y);
        }
    });
}

// The factors' gradients of one slice of rows: dA of all pairs, [sum R, I], and dB^T of each, [R, O].
struct Partial {
    Buffer d_a;
    std::vector<Buffer> d_bs;
};

template <class T>
Partial nothing_for(const Range<T>& range, int64_t features) {
    Partial partial{zeros(whole_ranks(range.ranks) * features), {}};
    for (const Pair& pair : range.pairs) partial.d_bs.push_back(zeros(whole_ranks(pair.rank) * pair.out_features));
    return partial;
}

template <class T>
void lora_linear_backward(const T* x, const int64_t* d_outputs, const int64_t* widths, const int64_t* table,
                          const double* scalings, T* dx, const int64_t* gradients, int64_t features, int64_t num_ranges,
                          int64_t num_projections, int64_t threads) {
    auto ranges = read_ranges<T>(table, scalings, widths, num_ranges, num_projections);
    pack_factors(ranges, features, threads);
    auto slices = cut(ranges, SLICE);
    std::vector<Partial> partials(slices.size());
    struct Scratch {
        Buffer x, lowered, da;
    };
    auto make = [&] {
        int64_t size = TILE * widest_stride(ranges);
        return Scratch{Buffer(TILE * features), Buffer(size), Buffer(size)};
    };
    parallel_with(slices.size(), threads, make, [&](int64_t task, Scratch& s) {
        const Piece& slice = slices[task];
        const Range<T>& range = ranges[slice.range];
        Partial& partial = partials[task] = nothing_for(range, features);
        for (int64_t first = slice.first; first < slice.last; first += TILE) {
            int64_t rows = std::min(TILE, slice.last - first), stride = range.stride();
            for (int64_t row = 0; row < rows; ++row)
                across(range.ranks, [&](int64_t i, auto count) {
                    const T* kept = range.lowered + (first + row) * range.ranks + i;
                    store(s.lowered + row * stride + i, load(kept, count), count);
                });
            for (int64_t j = 0; j < num_projections; ++j) {  // in order: a last block reaches into the next one's place
                const Pair& pair = range.pairs[j];
                if (!pair.rank) continue;
                const T* dy = reinterpret_cast<const T*>(d_outputs[j]) + (range.start + first) * widths[j];
                dots(dy, rows, range.scaled_bs[j], pair.rank, widths[j], s.da + pair.place, stride);
                add_outer(s.lowered + pair.place, stride, dy, rows, pair.rank, widths[j], partial.d_bs[j]);
            }
            with_input(range, x, first, rows, features, s.x,
                       [&](auto* input) { add_outer(s.da, stride, input, rows, range.ranks, features, partial.d_a); });
            if (!dx) continue;
            const T* mask = range.mask ? range.mask + first * features : nullptr;
            add_combination(s.da, stride, rows, range.stacked_a, range.ranks, features, mask,
                            dx + (range.start + first) * features);
        }
    });
    // Each factor's own gradient, its slices added up in their order.
    parallel(num_ranges * num_projections, threads, [&](int64_t task) {
        int64_t i = task / num_projections, j = task % num_projections;
        const Pair& pair = ranges[i].pairs[j];
        if (!pair.rank) return;
        float *d_a = reinterpret_cast<float*>(gradients[2 * task]),
              *d_b = reinterpret_cast<float*>(gradients[2 * task + 1]);
        int64_t size_a = pair.rank * features, size_b = pair.rank * pair.out_features;
        Buffer turned = zeros(size_b);
        std::fill_n(d_a, size_a, 0.0f);
        for (size_t slice = 0; slice < slices.size(); ++slice) {
            if (slices[slice].range != i) continue;
            add(d_a, partials[slice].d_a + pair.place * features, size_a);
            add(turned, partials[slice].d_bs[j], size_b);
        }
        for (int64_t o = 0; o < pair.out_features; ++o)
            for (int64_t r = 0; r < pair.rank; ++r)
                d_b[o * pair.rank + r] = turned[r * pair.out_features + o] * pair.scaling;
    });
}

#define MOE_LORA_LINEAR(T, NAME)                                                                                      \
    MOE_EXPORT int lora_linear_forward_##NAME(const T* x, const int64_t* outputs, const int64_t* widths,              \
                                              const int64_t* table, const double* scalings, int64_t features,         \
                                              int64_t num_ranges, int64_t num_projections, int64_t threads) {         \
        return guarded([&] {                                                                                          \
            lora_linear_forward(x, outputs, widths, table, scalings, features, num_ranges, num_projections, threads); \
        });                                                                                                           \
    }                                                                                                                 \
    MOE_EXPORT int lora_linear_backward_##NAME(const T* x, const int64_t* d_outputs, const int64_t* widths,           \
                                               const int64_t* table, const double* scalings, T* dx,                   \
                                               const int64_t* gradients, int64_t features, int64_t num_ranges,        \
                                               int64_t num_projections, int64_t threads) {                            \
        return guarded([&] {                                                                                          \
            lora_linear_backward(x, d_outputs, widths, table, scalings, dx, gradients, features, num_ranges,          \
                                 num_projections, threads);                                                           \
        });                                                                                                           \
    }
MOE_LORA_LINEAR(float, float32)
MOE_LORA_LINEAR(bfloat16, bfloat16)

}  // namespace moe
