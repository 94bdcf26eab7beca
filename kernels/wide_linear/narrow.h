// Products of rows with few long vectors in float32, as a router has them.
//
// Factors lie as [ranks, features] in float32, whole blocks of RANKS ranks, so that every inner loop runs along the
// features. Rows are read as they are, in whatever type.
#pragma once

#include "../compiled.h"

namespace moe {

constexpr int RANKS = 8;
constexpr int64_t TILE = 24;    // rows of a task's inner step, which stay in a core's cache
constexpr int64_t SLICE = 256;  // rows whose gradients of the factors are summed in one place
// Rows whose sums with a block of ranks fill half of the registers.
constexpr int DOT_ROWS = W == 16 ? 2 : 1;

MOE_INLINE int64_t whole_ranks(int64_t ranks) { return (ranks + RANKS - 1) / RANKS * RANKS; }

// out[row, r] = <x[row], factors[r]> of ROWS rows and RANKS factors.
template <int ROWS, class T>
MOE_INLINE void dot_rows(const T* x, const float* factors, int64_t features, float* out, int64_t out_stride) {
    constexpr int SUMS = std::max(ROWS * RANKS, W);  // always added up in the same order, however many rows there are
    Vector sums[SUMS] = {};
    across(features, [&](int64_t i, auto count) {
        Vector rows[ROWS];
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) rows[row] = load(x + row * features + i, count);
#pragma GCC unroll 8
        for (int r = 0; r < RANKS; ++r) {
            Vector factor = load(factors + r * features + i, count);
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) sums[row * RANKS + r] += rows[row] * factor;
        }
    });
    float found[SUMS];
#pragma GCC unroll 8
    for (int i = 0; i < SUMS; i += W) store(found + i, sums_of(sums + i), Whole());
    for (int row = 0; row < ROWS; ++row) std::copy_n(found + row * RANKS, RANKS, out + row * out_stride);
}

// out[rows, ranks] = x[rows, features] factors[ranks, features]^T; whole blocks of ranks are written.
template <class T>
void dots(const T* x, int64_t rows, const float* factors, int64_t ranks, int64_t features, float* out,
          int64_t out_stride) {
    for (int64_t r = 0; r < ranks; r += RANKS) {
        int64_t row = 0;
        for (; row + DOT_ROWS <= rows; row += DOT_ROWS)
            dot_rows<DOT_ROWS>(x + row * features, factors + r * features, features, out + row * out_stride + r,
                               out_stride);
        for (; row < rows; ++row)
            dot_rows<1>(x + row * features, factors + r * features, features, out + row * out_stride + r, out_stride);
    }
}

// sums[ranks, features] += c[rows, ranks]^T x[rows, features]; whole blocks of ranks are read and written.
template <class T>
void add_outer(const float* c, int64_t c_stride, const T* x, int64_t rows, int64_t ranks, int64_t features,
               float* sums) {
    for (int64_t r = 0; r < ranks; r += RANKS) {
        auto columns = [&](int64_t i, auto vectors, auto count) {
            constexpr int V = decltype(vectors)::value;
            float* to = sums + r * features + i;
            Vector own[RANKS][V];
#pragma GCC unroll 8
            for (int k = 0; k < RANKS; ++k)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) own[k][v] = load(to + k * features + v * W, count);
            for (int64_t row = 0; row < rows; ++row) {
                Vector values[V];
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) values[v] = load(x + row * features + i + v * W, count);
#pragma GCC unroll 8
                for (int k = 0; k < RANKS; ++k)
#pragma GCC unroll 2
                    for (int v = 0; v < V; ++v) own[k][v] += c[row * c_stride + r + k] * values[v];
            }
#pragma GCC unroll 8
            for (int k = 0; k < RANKS; ++k)
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) store(to + k * features + v * W, own[k][v], count);
        };
        int64_t i = 0;
        for (; i + 2 * W <= features; i += 2 * W) columns(i, std::integral_constant<int, 2>(), Whole());
        across(features - i, [&](int64_t k, auto count) { columns(i + k, std::integral_constant<int, 1>(), count); });
    }
}

// x[rows, features] = c[rows, ranks] factors[ranks, features].
template <class T>
void combine(const float* c, int64_t c_stride, int64_t rows, const float* factors, int64_t ranks, int64_t features,
             T* x) {
    auto block = [&](int64_t row, auto height, int64_t i, auto vectors, auto count) {
        constexpr int H = decltype(height)::value, V = decltype(vectors)::value;
        Vector sums[H][V] = {};
        for (int64_t r = 0; r < ranks; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                Vector factor = load(factors + r * features + i + v * W, count);
#pragma GCC unroll 8
                for (int k = 0; k < H; ++k) sums[k][v] += c[(row + k) * c_stride + r] * factor;
            }
#pragma GCC unroll 8
        for (int k = 0; k < H; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) store(x + (row + k) * features + i + v * W, sums[k][v], count);
    };
    auto band = [&](int64_t row, auto height) {
        int64_t i = 0;
        for (; i + 2 * W <= features; i += 2 * W) block(row, height, i, std::integral_constant<int, 2>(), Whole());
        across(features - i,
               [&](int64_t k, auto count) { block(row, height, i + k, std::integral_constant<int, 1>(), count); });
    };
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6) band(row, std::integral_constant<int, 6>());
    for (; row < rows; ++row) band(row, std::integral_constant<int, 1>());
}

}  // namespace moe
