// Products of rows with low-rank factors (factors.h), and the factors' gradients.
#pragma once

#include "factors.h"

namespace moe {

// Rows of T as what is multiplied: in whole bands, times a mask if there is one.
template <class F, class T>
void write_factors(const T* from, const T* mask, int64_t rows, const Columns& columns, F* to) {
    for (int64_t row = 0; row < rows; ++row, to += columns.whole_bands())
        columns.bands([&](int64_t offset, auto first, auto second) {
            const int64_t at = row * columns.size + offset;
            Vector band[2];
            load_band(from + at, first, second, band);
            mask_band(band, mask ? mask + at : nullptr, first, second);
            Lanes<F>::store(to + offset, band[0], band[1]);
        });
}

// A row's ranks as what is multiplied, zeros behind the last one.
template <class F, class From>
MOE_INLINE void read_ranks(const From* from, int64_t rank, F* to) {
    across(rank, [&](int64_t r, auto count) { store(to + r, load(from + r, count), count); });
    std::fill(to + rank, to + whole_depths<F>(rank), F{});
}

// Such ranks of `size` rows, each times `weight(row)`, so turned that a row lies beside the next: [size / DEPTH, R,
// DEPTH], zeros behind the last row.
template <class F, class Weight>
void turn(const F* rows, int64_t size, int64_t rank, F* to, Weight weight) {
    constexpr int DEPTH = Lanes<F>::DEPTH;
    std::fill_n(to, whole_depths<F>(size) * rank, F{});
    for (int64_t i = 0; i < size; ++i) {
        F* own = to + i / DEPTH * DEPTH * rank + i % DEPTH;
        const float factor = weight(i);
        across(rank, [&](int64_t r, auto count) {
            F weighted[W];
            store(weighted, load(rows + i * whole_depths<F>(rank) + r, count) * factor, Whole());
            for (int64_t k = 0; k < count; ++k) own[(r + k) * DEPTH] = weighted[k];
        });
    }
}

// Adds to a band of ROWS rows their ranks [ROWS, R] times an expert's factors of that band.
template <int ROWS, class F>
MOE_INLINE void raise(const F* lowered, int64_t ranks, const F* band, Vector (&sums)[ROWS][2]) {
    using L = Lanes<F>;
    for (int64_t r = 0; r < ranks; r += L::DEPTH, band += BAND * L::DEPTH) {
        typename L::Packed right[2] = {L::load(band), L::load(band + W * L::DEPTH)};
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            typename L::Packed left = L::broadcast(lowered + row * ranks + r);
            L::add_product(sums[row][0], left, right[0]);
            L::add_product(sums[row][1], left, right[1]);
        }
    }
}

template <int ROWS, int RANKS, class F>
MOE_INLINE void few_dots(const F* const (&rows)[ROWS], const F* band, int64_t next_band, int64_t columns, float* to,
                         int64_t to_stride) {
    using L = Lanes<F>;
    constexpr int N = ROWS * RANKS, WHOLE = (N + W - 1) / W * W;
    Vector totals[WHOLE] = {};
    for (int64_t offset = 0; offset < columns; offset += BAND, band += next_band)
#pragma GCC unroll 2
        for (int64_t i = 0; i < BAND; i += W * L::DEPTH) {
            typename L::Packed own[ROWS];
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; ++row) own[row] = L::load(rows[row] + offset + i);
#pragma GCC unroll 8
            for (int r = 0; r < RANKS; ++r) {
                typename L::Packed factor = L::load(band + r * BAND + i);
#pragma GCC unroll 4
                for (int row = 0; row < ROWS; ++row) L::add_product(totals[row * RANKS + r], own[row], factor);
            }
        }
    float sums[WHOLE];
#pragma GCC unroll 4
    for (int i = 0; i < WHOLE; i += W) store(sums + i, sums_of(totals + i), Whole());
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) std::copy_n(sums + row * RANKS, RANKS, to + row * to_stride);
}

// Inner products of `size` rows, which `row(i)` finds, with an expert's factors, over all columns: [N, R].
template <class F, class Row>
void dots(Row row, int64_t size, const Table<F>& table, int64_t expert, const Columns& columns, float* to) {
    const int64_t rank = table.ranks, end = columns.whole_bands();
    by_eights(rank, [&](int64_t r, auto count) {
        const F* band = table.band(expert, 0) + r * BAND;
        by_groups<2>(size, [&](int64_t i, auto rows) {
            const F* own[rows.value];
            for (int k = 0; k < rows.value; ++k) own[k] = row(i + k);
            few_dots<rows.value, count.value>(own, band, rank * BAND, end, to + i * rank + r, rank);
        });
    });
}

// Adds to the gradients of an expert's factors: ranks of `size` rows, turned, times these rows, which
// `row(i)` finds.
template <class F, class Row>
void add_outer(const F* turned, Row row, int64_t size, const Table<float>& sums, int64_t expert,
               const Columns& columns) {
    using L = Lanes<F>;
    static const F nothing[BAND] = {};
    for (int64_t offset = 0; offset < columns.size; offset += BAND) {
        float* band = sums.band(expert, offset);
        by_eights(sums.ranks, [&](int64_t first, auto count) {
            constexpr int RANKS = decltype(count)::value;
            Vector own[RANKS][2];
#pragma GCC unroll 8
            for (int r = 0; r < RANKS; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) own[r][v] = load(band + (first + r) * BAND + v * W, Whole());
            for (int64_t i = 0; i < size; i += L::DEPTH) {
                typename L::Packed values[2];
                L::beside(row(i) + offset, L::DEPTH > 1 && i + 1 < size ? row(i + 1) + offset : nothing, values);
                const F* left = turned + i * sums.ranks + first * L::DEPTH;
#pragma GCC unroll 8
                for (int r = 0; r < RANKS; ++r) {
                    typename L::Packed factor = L::broadcast(left + r * L::DEPTH);
#pragma GCC unroll 2
                    for (int v = 0; v < 2; ++v) L::add_product(own[r][v], factor, values[v]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < RANKS; ++r)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) store(band + (first + r) * BAND + v * W, own[r][v], Whole());
        });
    }
}

}  // namespace moe
