// Sums that tiles add to: over a block's tokens while a task runs, and over all columns when every task is done.
#pragma once

#include "pieces.h"

namespace moe::mixlora_ffn {

constexpr int64_t TOKENS = 64;  // a thread takes at a time to add up shares

// Of a block's tokens, [BLOCK, C].
struct BlockSums {
    int64_t width;
    Buffer memory;

    explicit BlockSums(const Chunks& chunks) : width(chunks.width), memory(BLOCK * width) {}

    void clear(const Block& block) {
        std::fill_n(static_cast<float*>(memory), (block.end - block.start) * width, 0.0f);
    }

    float* row(const Block& block, int64_t token) const { return memory + (token - block.start) * width; }

    template <class T>
    void write(const Block& block, const Columns& columns, T* to, int64_t features) const {
        for (int64_t t = block.start; t < block.end; ++t)
            across(columns.size, [&](int64_t i, auto count) {
                store(to + t * features + columns.start + i, load(row(block, t) + i, count), count);
            });
    }
};

// What each chunk adds to numbers of every choice, [chunks, T, K, size]; added up in one order afterwards.
struct Shares {
    int64_t choices, size, chunks;
    Buffer memory;

    Shares(int64_t choices, int64_t size, int64_t chunks)
        : choices(choices), size(size), chunks(chunks), memory(choices * size * chunks) {}

    float* of(int64_t chunk, int64_t choice) const { return memory + (chunk * choices + choice) * size; }

    // From number `at` on.
    template <class Count>
    MOE_INLINE Vector total(int64_t choice, int64_t at, Count count) const {
        Vector sum{};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load(of(chunk, choice) + at, count);
        return sum;
    }

    // Each token's at the ranks of its experts, zeros at all others, in rows of [T, ER] that are `stride` apart.
    template <class T>
    void scatter(const Group<T>& group, const Part<T>& part, float factor, T* to, int64_t stride,
                 int64_t threads) const {
        parallel_runs(part.end - part.start, TOKENS, threads, [&](int64_t first, int64_t last) {
            for (int64_t t = part.start + first; t < part.start + last; ++t) {
                std::memset(to + t * stride, 0, group.all_ranks() * sizeof(T));
                for (int64_t choice = t * group.top_k; choice < (t + 1) * group.top_k; ++choice) {
                    T* own = to + t * stride + group.experts[choice] * size;
                    across(size,
                           [&](int64_t i, auto count) { store(own + i, total(choice, i, count) * factor, count); });
                }
            }
        });
    }
};

}  // namespace moe::mixlora_ffn
