// Float32 matrix products small enough for a core's own cache.
//
// The right factor lies in panels of N columns, the rows of a panel one behind the other: what the inner loop reads is
// one stream. Letters: M rows, K contracted, C columns.
#pragma once

#include "compiled.h"

namespace moe {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int PANEL_VECTORS = 4;  // with 6 rows 24 of 32 registers add up
#else
constexpr int PANEL_VECTORS = 2;
#endif
constexpr int PANEL = PANEL_VECTORS * W;
constexpr int MICRO_ROWS = 6;

MOE_INLINE int64_t whole_panels(int64_t columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

// Rows of T as the right factor [rows, columns], zeros behind the last column.
template <class T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, float* panels) {
    for (int64_t start = 0; start < columns; start += PANEL) {
        float* to = panels + start * rows;
        int64_t width = std::min<int64_t>(PANEL, columns - start);
        for (int64_t row = 0; row < rows; ++row, to += PANEL) {
            const T* own = from + row * stride + start;
            across(width, [&](int64_t i, auto count) { store(to + i, load(own + i, count), count); });
            std::fill(to + width, to + PANEL, 0.0f);
        }
    }
}

// Rows of T as the columns of the right factor [size, rows], zeros behind the last one.
template <class T>
void pack_columns(const T* from, int64_t stride, int64_t rows, int64_t size, float* panels) {
    for (int64_t start = 0; start < rows; start += PANEL) {
        float* to = panels + start * size;
        int64_t width = std::min<int64_t>(PANEL, rows - start);
        if (width < PANEL) std::fill(to, to + size * PANEL, 0.0f);
        for (int64_t column = 0; column < width; ++column) {
            const T* own = from + (start + column) * stride;
            across(size, [&](int64_t i, auto count) {
                Vector values = load(own + i, count);
                for (int64_t k = 0; k < count; ++k) to[(i + k) * PANEL + column] = values[k];
            });
        }
    }
}

template <int ROWS, bool ADD>
MOE_INLINE void multiply_rows(const float* a, int64_t row_stride, int64_t stride, const float* panel,
                              int64_t contracted, float* out, int64_t out_stride) {
    Vector sums[ROWS][PANEL_VECTORS] = {};
    for (int64_t k = 0; k < contracted; ++k) {
        Vector right[PANEL_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < PANEL_VECTORS; ++v) right[v] = load(panel + k * PANEL + v * W, Whole());
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
            Vector left = splat(a[row * row_stride + k * stride]);
#pragma GCC unroll 8
            for (int v = 0; v < PANEL_VECTORS; ++v) sums[row][v] += left * right[v];
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
// a[m, k] is at m * row_stride + k * stride. `right` begins at the row that meets a's first column and has `right_rows`
// rows a panel, of which `contracted` are read.
template <bool ADD>
void multiply(const float* a, int64_t row_stride, int64_t stride, int64_t rows, const float* right, int64_t right_rows,
              int64_t contracted, int64_t columns, float* out, int64_t out_stride) {
    for (int64_t start = 0; start < columns; start += PANEL) {
        const float* panel = right + start * right_rows;
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
