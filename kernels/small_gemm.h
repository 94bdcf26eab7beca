// Matrix products small enough for a core's own cache, of numbers F (lanes.h) with float32 results.
//
// The right factor lies in panels of PANEL columns, DEPTH rows of a panel beside each other and these one behind the
// other: what the inner loop reads is one stream. Letters: M rows, K contracted, C columns.
#pragma once

#include "lanes.h"

namespace moe {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int PANEL_VECTORS = 4;  // with 6 rows 24 of 32 registers add up
#else
constexpr int PANEL_VECTORS = 2;
#endif
constexpr int PANEL = PANEL_VECTORS * W;
constexpr int MICRO_ROWS = 6;

MOE_INLINE int64_t whole_panels(int64_t columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

// Rows of T as the right factor [rows, columns], zeros behind the last column and the last row.
template <class F, class T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, F* panels) {
    constexpr int DEPTH = Lanes<F>::DEPTH;
    for (int64_t start = 0; start < columns; start += PANEL) {
        F* to = panels + start * whole_depths<F>(rows);
        int64_t width = std::min<int64_t>(PANEL, columns - start);
        for (int64_t row = 0; row < rows; row += DEPTH, to += PANEL * DEPTH) {
            const T *own = from + row * stride + start, *next = own + stride;
            const bool is_there = DEPTH > 1 && row + 1 < rows;
            for (int64_t i = 0; i < PANEL; i += W) {
                int64_t count = std::clamp<int64_t>(width - i, 0, W);
                Lanes<F>::store_beside(to + i * DEPTH, load(own + i, count),
                                       is_there ? load(next + i, count) : Vector{});
            }
        }
    }
}

// Rows of T as the columns of the right factor [size, rows], zeros behind the last column; size is in whole DEPTHs.
template <class F, class T>
void pack_columns(const T* from, int64_t stride, int64_t rows, int64_t size, F* panels) {
    constexpr int DEPTH = Lanes<F>::DEPTH;
    for (int64_t start = 0; start < rows; start += PANEL) {
        F* to = panels + start * size;
        int64_t width = std::min<int64_t>(PANEL, rows - start);
        if (width < PANEL) std::fill(to, to + size * PANEL, F{});
        for (int64_t column = 0; column < width; ++column) {
            const T* own = from + (start + column) * stride;
            for (int64_t i = 0; i < size; i += DEPTH) copy(own + i, DEPTH, to + i * PANEL + column * DEPTH);
        }
    }
}

template <int ROWS, bool ADD, class F>
MOE_INLINE void multiply_rows(const F* a, int64_t row_stride, int64_t stride, const F* panel, int64_t contracted,
                              float* out, int64_t out_stride) {
    using L = Lanes<F>;
    Vector sums[ROWS][PANEL_VECTORS] = {};
    for (int64_t k = 0; k < contracted; k += L::DEPTH, a += stride, panel += PANEL * L::DEPTH) {
        typename L::Packed right[PANEL_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < PANEL_VECTORS; ++v) right[v] = L::load(panel + v * W * L::DEPTH);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
            typename L::Packed left = L::broadcast(a + row * row_stride);
#pragma GCC unroll 8
            for (int v = 0; v < PANEL_VECTORS; ++v) L::add_product(sums[row][v], left, right[v]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            float* to = out + row * out_stride + v * W;
            store(to, ADD ? load(to, Whole()) + sums[row][v] : sums[row][v], Whole());
        }
    }
}

// out[M, C] = (or += with ADD) a[M, K] right[K, C]; out has whole panels of columns.
//
// a's numbers [m, k] to [m, k + DEPTH - 1] are at m * row_stride + k / DEPTH * stride, zeros behind the last one.
// `right` begins at the row that meets a's first column and has `right_rows` rows a panel, of which `contracted` are
// read, in whole DEPTHs.
template <bool ADD, class F>
void multiply(const F* a, int64_t row_stride, int64_t stride, int64_t rows, const F* right, int64_t right_rows,
              int64_t contracted, int64_t columns, float* out, int64_t out_stride) {
    for (int64_t start = 0; start < columns; start += PANEL) {
        const F* panel = right + start * right_rows;
        int64_t row = 0;
        auto next = [&](auto count) {
            multiply_rows<count.value, ADD>(a + row * row_stride, row_stride, stride, panel, contracted,
                                            out + row * out_stride + start, out_stride);
            row += count.value;
        };
        while (rows - row >= MICRO_ROWS) next(std::integral_constant<int, MICRO_ROWS>());
        while (rows - row >= 2) next(std::integral_constant<int, 2>());
        if (row < rows) next(std::integral_constant<int, 1>());
    }
}

}  // namespace moe
