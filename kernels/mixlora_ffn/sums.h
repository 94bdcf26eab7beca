// Sums over each token's choices within a task, and over all columns when every task is done.
#pragma once

#include "pieces.h"

namespace moe::mixlora_ffn {

constexpr int64_t TOKENS = 64;  // a thread takes at a time to add up shares

// Of a block's choices, in their order by expert, [BLOCK * K, C].
template <class F>
struct Rows {
    int64_t width;
    Numbers<F> numbers;

    template <class Group>
    Rows(const Group& group, int64_t width) : width(width), numbers(BLOCK * group.top_k * width) {}

    F* row(int64_t place) const { return numbers + place * width; }

    // What finds a run's rows.
    auto of(const Run& run) const {
        return [first = row(run.place), width = width](int64_t i) { return first + i * width; };
    }

    // Every token's sum over its choices, each times what `weight(choice)` says, to [T, F].
    template <class T, class Group, class Weight>
    void write_sums(const Block& block, const Columns& columns, const Group& group, T* to, Weight weight) const {
        const int64_t top_k = group.top_k;
        const bool streams = group.tokens * group.features * static_cast<int64_t>(sizeof(T)) >= STREAMED;
        for (int64_t t = block.start; t < block.end; ++t) {
            const int64_t* places = &block.places[(t - block.start) * top_k];
            T* own = to + t * group.features + columns.start;
            columns.bands([&](int64_t i, auto first, auto second) {
                Vector sums[2] = {};
                for (int64_t k = 0; k < top_k; ++k) {
                    const F* more = row(places[k]) + i;
                    const float factor = weight(t * top_k + k);
                    sums[0] += load(more, Whole()) * factor;
                    sums[1] += load(more + W, Whole()) * factor;
                }
                if (streams)
                    stream_band(own + i, sums[0], sums[1], first, second);
                else
                    store_band(own + i, sums[0], sums[1], first, second);
            });
        }
        if (streams) finish_streams();
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
    template <class T, class Group, class Part>
    void scatter(const Group& group, const Part& part, T* to, int64_t stride, int64_t threads) const {
        parallel_runs(part.end - part.start, TOKENS, threads, [&](int64_t first, int64_t last) {
            for (int64_t t = part.start + first; t < part.start + last; ++t) {
                std::memset(to + t * stride, 0, group.all_ranks() * sizeof(T));
                for (int64_t choice = t * group.top_k; choice < (t + 1) * group.top_k; ++choice) {
                    T* own = to + t * stride + group.experts[choice] * size;
                    across(size, [&](int64_t i, auto count) { store(own + i, total(choice, i, count), count); });
                }
            }
        });
    }
};

}  // namespace moe::mixlora_ffn
