// The low-rank products of several adapters on projections of one input: what they add to the frozen products' results,
// and their gradients.
//
// Rows are taken in tiles that stay in a core's cache, so that x, each y and each gradient pass through memory once.
// Letters: I input features, O output features, R rank, n rows of a range, J projections; F also names the type of what
// is multiplied.
#include "../factor_products.h"

namespace moe {

constexpr int64_t TILE = 24;    // rows of a task's inner step, which stay in a core's cache
constexpr int64_t SLICE = 256;  // rows whose gradients of the factors are summed in one place

// One adapter's factors on one projection.
template <class F>
struct Pair {
    const float *lora_a, *lora_b;       // [R, I], [O, R]
    int64_t rank, out_features, place;  // where its ranks stand among the range's
    float scaling;
    Factors<F> of_a, of_b;  // A, and s B^T

    Pair(const int64_t* described, int64_t features, int64_t out_features, int64_t place, float scaling, Read read_a,
         Read read_b)
        : lora_a(reinterpret_cast<const float*>(described[0])),
          lora_b(reinterpret_cast<const float*>(described[1])),
          rank(described[2]),
          out_features(out_features),
          place(place),
          scaling(scaling),
          of_a(1, rank, Columns{0, features}.whole_bands(), read_a),
          of_b(1, rank, Columns{0, out_features}.whole_bands(), read_b) {}

    void pack(int64_t features) {
        of_a.fill(lora_a, {true}, {0, features}, features);
        of_b.fill_turned(lora_b, {true}, {0, out_features}, out_features, scaling);
    }

    int64_t room() const { return whole_depths<F>(rank); }
    Columns outputs() const { return {0, out_features}; }
};

// One adapter's rows.
template <class T, class F>
struct Range {
    int64_t start, rows, ranks;
    const T* mask;  // [n, I] or none
    T* lowered;     // [n, sum R]
    std::vector<Pair<F>> pairs;
};

// As Python lays it out, all int64: of a range its first row, n, mask, lowered; of each of its pairs A, B and R.
template <class T, class F>
std::vector<Range<T, F>> read_ranges(const int64_t* table, const double* scalings, const int64_t* widths,
                                     int64_t features, int64_t num_ranges, int64_t num_projections, Read read_a,
                                     Read read_b, int64_t threads) {
    std::vector<Range<T, F>> ranges(num_ranges);
    std::vector<Pair<F>*> all;
    for (Range<T, F>& range : ranges) {
        range.start = table[0];
        range.rows = table[1];
        range.mask = reinterpret_cast<const T*>(table[2]);
        range.lowered = reinterpret_cast<T*>(table[3]);
        range.ranks = 0;
        table += 4;
        for (int64_t j = 0; j < num_projections; ++j, table += 3, ++scalings) {
            range.pairs.emplace_back(table, features, widths[j], range.ranks, static_cast<float>(*scalings), read_a,
                                     read_b);
            range.ranks += table[2];
        }
        for (Pair<F>& pair : range.pairs)
            if (pair.rank) all.push_back(&pair);
    }
    parallel(all.size(), threads, [&](int64_t i) { all[i]->pack(features); });
    return ranges;
}

// Rows of T as what is multiplied, in whole bands and times a mask, `stride` apart: in `room`, or where they are.
template <class F, class T>
const F* as_factors(const T* from, const T* mask, int64_t rows, const Columns& columns, const Numbers<F>& room) {
    if constexpr (std::is_same_v<T, F>)
        if (!mask && columns.whole_bands() == columns.size) return from;
    write_factors<F>(from, mask, rows, columns, room);
    return room;
}

// Ranks of a tile's rows as what is multiplied, [n, R], and turned.
template <class F>
struct Ranks {
    Numbers<F> rows, turned;

    explicit Ranks(int64_t most) : rows(TILE * (most + Lanes<F>::DEPTH)), turned(whole_depths<F>(TILE) * most) {}

    template <class From>
    void read(const From* from, int64_t stride, int64_t size, int64_t rank) const {
        for (int64_t row = 0; row < size; ++row)
            read_ranks(from + row * stride, rank, rows + row * whole_depths<F>(rank));
    }

    void turn(int64_t size, int64_t rank) const {
        moe::turn<F>(rows, size, rank, turned, [](int64_t) { return 1.0f; });
    }
};

// Adds to rows of a band what `raise_all(row, offset, sums)` adds up for them, times a mask if there is one.
template <class T, class Raise>
void add_raised(T* to, const T* mask, int64_t rows, const Columns& columns, Raise raise_all) {
    by_groups<4>(rows, [&](int64_t row, auto count) {
        columns.bands([&](int64_t offset, auto first, auto second) {
            Vector sums[count.value][2] = {};
            const int64_t at = row * columns.size + offset;
            raise_all(row, offset, sums);
#pragma GCC unroll 4
            for (int i = 0; i < count.value; ++i) {
                const int64_t own = at + i * columns.size;
                Vector before[2];
                load_band(to + own, first, second, before);
                mask_band(sums[i], mask ? mask + own : nullptr, first, second);
                store_band(to + own, before[0] + sums[i][0], before[1] + sums[i][1], first, second);
            }
        });
    });
}

// Some rows of a range, counted from its own first.
struct Piece {
    int64_t range, first, last;
};

template <class Range>
std::vector<Piece> cut(const std::vector<Range>& ranges, int64_t rows) {
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < static_cast<int64_t>(ranges.size()); ++i)
        for (int64_t first = 0; first < ranges[i].rows; first += rows)
            pieces.push_back({i, first, std::min(first + rows, ranges[i].rows)});
    return pieces;
}

template <class Range>
int64_t most_ranks(const std::vector<Range>& ranges) {
    int64_t most = 0;
    for (const auto& range : ranges) most = std::max(most, range.ranks);
    return most;
}

template <class T>
void lora_linear_forward(const T* x, const int64_t* outputs, const int64_t* widths, const int64_t* table,
                         const double* scalings, int64_t features, int64_t num_ranges, int64_t num_projections,
                         int64_t threads) {
    using F = Multiplied<T>;
    const auto ranges = read_ranges<T, F>(table, scalings, widths, features, num_ranges, num_projections, Read::DOTS,
                                          Read::RAISING, threads);
    const auto pieces = cut(ranges, TILE);
    const int64_t most = most_ranks(ranges);
    const Columns inputs{0, features};
    struct Scratch {
        Numbers<F> x;
        Ranks<F> lowered;
        Buffer products;
    };
    auto make = [&] { return Scratch{Numbers<F>(TILE * inputs.whole_bands()), Ranks<F>(most), Buffer(TILE * most)}; };
    parallel_with(pieces.size(), threads, make, [&](int64_t task, Scratch& s) {
        const Piece& piece = pieces[task];
        const auto& range = ranges[piece.range];
        const int64_t rows = piece.last - piece.first, stride = inputs.whole_bands();
        const F* input = as_factors<F>(x + (range.start + piece.first) * features,
                                       range.mask ? range.mask + piece.first * features : nullptr, rows, inputs, s.x);
        for (const auto& pair : range.pairs) {
            if (!pair.rank) continue;
            dots([&](int64_t i) { return input + i * stride; }, rows, pair.of_a.dotted, 0, inputs, s.products);
            T* kept =
                range.lowered + piece.first * range.ranks + pair.place;  // what is added is what backward will read
            for (int64_t row = 0; row < rows; ++row)
                across(pair.rank, [&](int64_t r, auto count) {
                    store(kept + row * range.ranks + r, load(s.products + row * pair.rank + r, count), count);
                });
            s.lowered.read(kept, range.ranks, rows, pair.rank);
            T* y = reinterpret_cast<T*>(outputs[&pair - range.pairs.data()]) +
                   (range.start + piece.first) * pair.out_features;
            add_raised<T>(y, nullptr, rows, pair.outputs(), [&](int64_t row, int64_t offset, auto& sums) {
                raise(s.lowered.rows + row * pair.room(), pair.room(), pair.of_b.raising.band(0, offset), sums);
            });
        }
    });
}

// The factors' gradients of one slice of rows, of each pair.
template <class F>
struct Partial {
    std::vector<FactorSums<F>> d_as, d_bs;  // of A, and of B without the scaling

    template <class T>
    void begin(const Range<T, F>& range, int64_t features) {
        for (const Pair<F>& pair : range.pairs) {
            d_as.emplace_back(1, pair.rank, Columns{0, features}.whole_bands()).clear(1);
            d_bs.emplace_back(1, pair.rank, pair.outputs().whole_bands()).clear(1);
        }
    }
};

template <class T>
void lora_linear_backward(const T* x, const int64_t* d_outputs, const int64_t* widths, const int64_t* table,
                          const double* scalings, T* dx, const int64_t* gradients, int64_t features, int64_t num_ranges,
                          int64_t num_projections, int64_t threads) {
    using F = Multiplied<T>;
    const auto ranges = read_ranges<T, F>(table, scalings, widths, features, num_ranges, num_projections, Read::RAISING,
                                          Read::DOTS, threads);
    const auto slices = cut(ranges, SLICE);
    const int64_t most = most_ranks(ranges);
    const Columns inputs{0, features};
    int64_t widest = 0;
    for (int64_t j = 0; j < num_projections; ++j) widest = std::max(widest, Columns{0, widths[j]}.whole_bands());
    std::vector<Partial<F>> partials(slices.size());
    struct Scratch {
        Numbers<F> x, dy;
        Ranks<F> lowered;
        std::vector<Ranks<F>> da;  // of each projection
        Buffer products;
    };
    auto make = [&] {
        Scratch s{Numbers<F>(TILE * inputs.whole_bands()),
                  Numbers<F>(TILE * widest),
                  Ranks<F>(most),
                  {},
                  Buffer(TILE * most)};
        for (int64_t j = 0; j < num_projections; ++j) s.da.emplace_back(most);
        return s;
    };
    parallel_with(slices.size(), threads, make, [&](int64_t task, Scratch& s) {
        const Piece& slice = slices[task];
        const auto& range = ranges[slice.range];
        Partial<F>& partial = partials[task];
        partial.begin(range, features);
        for (int64_t first = slice.first; first < slice.last; first += TILE) {
            const int64_t rows = std::min(TILE, slice.last - first), stride = inputs.whole_bands();
            const T* mask = range.mask ? range.mask + first * features : nullptr;
            const F* input = as_factors<F>(x + (range.start + first) * features, mask, rows, inputs, s.x);
            for (int64_t j = 0; j < num_projections; ++j) {
                const Pair<F>& pair = range.pairs[j];
                if (!pair.rank) continue;
                const Columns columns = pair.outputs();
                const T* given = reinterpret_cast<const T*>(d_outputs[j]) + (range.start + first) * pair.out_features;
                const F* dy = as_factors<F, T>(given, nullptr, rows, columns, s.dy);
                auto dy_row = [&](int64_t i) { return dy + i * columns.whole_bands(); };
                dots(dy_row, rows, pair.of_b.dotted, 0, columns, s.products);
                s.da[j].read(static_cast<const float*>(s.products), pair.rank, rows, pair.rank);
                s.da[j].turn(rows, pair.rank);
                s.lowered.read(range.lowered + first * range.ranks + pair.place, range.ranks, rows, pair.rank);
                s.lowered.turn(rows, pair.rank);
                add_outer<F>(s.lowered.turned, dy_row, rows, partial.d_bs[j].sums, 0, columns);
                add_outer<F>(
                    s.da[j].turned, [&](int64_t i) { return input + i * stride; }, rows, partial.d_as[j].sums, 0,
                    inputs);
            }
            if (!dx) continue;
            add_raised<T>(dx + (range.start + first) * features, mask, rows, inputs,
                          [&](int64_t row, int64_t offset, auto& sums) {
                              for (int64_t j = 0; j < num_projections; ++j) {
                                  const Pair<F>& pair = range.pairs[j];
                                  if (pair.rank)
                                      raise(s.da[j].rows + row * pair.room(), pair.room(),
                                            pair.of_a.raising.band(0, offset), sums);
                              }
                          });
        }
    });
    // Each factor's own gradient, its slices added up in their order.
    parallel(num_ranges * num_projections, threads, [&](int64_t task) {
        const int64_t i = task / num_projections, j = task % num_projections;
        const Pair<F>& pair = ranges[i].pairs[j];
        if (!pair.rank) return;
        FactorSums<F> d_a(1, pair.rank, inputs.whole_bands()), d_b(1, pair.rank, pair.outputs().whole_bands());
        d_a.clear(1);
        d_b.clear(1);
        for (size_t slice = 0; slice < slices.size(); ++slice) {
            if (slices[slice].range != i) continue;
            d_a.add(partials[slice].d_as[j]);
            d_b.add(partials[slice].d_bs[j]);
        }
        d_b.scale(pair.scaling);
        d_a.write(reinterpret_cast<float*>(gradients[2 * task]), 1, inputs, features);
        d_b.write_turned(reinterpret_cast<float*>(gradients[2 * task + 1]), 1, pair.outputs(), pair.out_features);
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
