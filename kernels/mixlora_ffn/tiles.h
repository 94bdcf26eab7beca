// Products of a tile's choices with their expert's factors.
//
// A tile's values are [C / PANEL, TILE, PANEL], so that a panel of them is a right factor as a panel of a table is.
// Letters as in pieces.h, and N the choices of a tile.
#pragma once

#include "pieces.h"

namespace moe::mixlora_ffn {

template <int CHOICES, int ROWS>
void few_products(const float* tile, const float* table, int64_t table_panel, const Columns& columns, float* to,
                  int64_t stride) {
    constexpr int N = CHOICES * ROWS, WHOLE = (N + W - 1) / W * W;
    Vector totals[WHOLE] = {};
    columns.panels([&](int64_t offset, int64_t width) {
        const float *left = tile + offset * TILE, *right = table + offset / PANEL * table_panel;
        for (int64_t i = 0; i < width; i += W) {
            Vector own[CHOICES];
#pragma GCC unroll 8
            for (int c = 0; c < CHOICES; ++c) own[c] = load(left + c * PANEL + i, Whole());
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) {
                Vector factor = load(right + row * PANEL + i, Whole());
#pragma GCC unroll 8
                for (int c = 0; c < CHOICES; ++c) totals[c * ROWS + row] += own[c] * factor;
            }
        }
    });
    float sums[WHOLE];
#pragma GCC unroll 4
    for (int i = 0; i < WHOLE; i += W) store(sums + i, sums_of(totals + i), Whole());
#pragma GCC unroll 8
    for (int c = 0; c < CHOICES; ++c) std::copy_n(sums + c * ROWS, ROWS, to + c * stride);
}

// Inner products of a tile's values with its expert's rows, over all columns, [N, R].
inline void inner_products(const float* values, const Tile& tile, const Table& table, const Columns& columns,
                           float* to) {
    const int64_t rank = table.rank;
    int64_t row = 0;
    auto rows = [&](auto count) {
        auto choices = [&](int64_t i, auto number) {
            few_products<number.value, count.value>(values + i * PANEL, table.panel(tile.expert, 0) + row * PANEL,
                                                    rank * PANEL, columns, to + i * rank + row, rank);
        };
        int64_t i = 0;
        for (; i + 2 <= tile.size; i += 2) choices(i, std::integral_constant<int, 2>());
        if (i < tile.size) choices(i, std::integral_constant<int, 1>());
        row += count.value;
    };
    while (rank - row >= 8) rows(std::integral_constant<int, 8>());
    if (rank - row >= 4) rows(std::integral_constant<int, 4>());
    if (rank - row >= 2) rows(std::integral_constant<int, 2>());
    if (rank - row >= 1) rows(std::integral_constant<int, 1>());
}

MOE_INLINE float value(float x) { return x; }
MOE_INLINE float value(bfloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// Of every choice its expert's own of [T, ER], [N, R].
template <class T>
void gather(const T* all, const Group<T>& group, const Tile& tile, float* to) {
    for (int64_t i = 0; i < tile.size; ++i, to += group.rank) {
        const T* own = all + tile.choices[i] / group.top_k * group.all_ranks() + tile.expert * group.rank;
        for (int64_t r = 0; r < group.rank; ++r) to[r] = value(own[r]);
    }
}

// [N, R] times the expert's rows of one panel, [N, PANEL]; zeros without a table.
inline void raise(const float* ranks, const Tile& tile, const Table& table, int64_t offset, float* values) {
    const int64_t rank = table.rank;
    if (table.is_there)
        multiply<false>(ranks, rank, 1, tile.size, table.panel(tile.expert, offset), rank, rank, PANEL, values, PANEL);
    else
        std::fill_n(values, tile.size * PANEL, 0.0f);
}

// Adds to the gradient of the expert's rows of one panel: [N, R] turned, times values [N, PANEL].
inline void add_outer(const float* ranks, const Tile& tile, const float* values, const Table& sums, int64_t offset) {
    const int64_t rank = sums.rank;
    multiply<true>(ranks, 1, rank, rank, values, tile.size, tile.size, PANEL, sums.panel(tile.expert, offset), PANEL);
}

}  // namespace moe::mixlora_ffn
