// What the mixture of LoRA experts is computed from on a CPU, and in which pieces.
//
// A task is a chunk of a part's features; a part is an adapter's tokens. It walks the tokens in blocks, and a block
// expert by expert, so that all that chose an expert read its factors from the nearest cache. Pieces depend on sizes
// and routing alone and no two tasks add to one number: results are the same on any number of threads.
// Letters: T tokens, P parts, F ffn, E experts, K top-k, R rank, C columns of a chunk in whole panels.
#pragma once

#include <vector>

#include "../small_gemm.h"

namespace moe::mixlora_ffn {

constexpr int64_t CHUNK = 256;  // most columns of a chunk: a block's sums of so many stay in a core's cache
constexpr int64_t BLOCK = 256;  // tokens
constexpr int64_t TILE = 32;    // choices of one expert that are computed together
constexpr int64_t LINE = 64;    // bytes of a cache's line
static_assert(CHUNK % PANEL == 0);

// A part's own; what it has not is null.
template <class T>
struct Part {
    int64_t start, end;    // its tokens
    const float *b1, *b3;  // [E, F, R]
    const float* down_a;   // [E, R, F]
    const T* h_mask;       // [its tokens, F]
    float scaling;
};

template <class T>
struct Group {
    const T *p1, *p3;          // [T, F]
    const T *a1, *a3;          // [T, ER], or null
    const float* gates;        // [T, K]
    const int64_t* experts;    // [T, K]
    const int64_t* described;  // [P, 5]: a part's length, and its addresses in the order of `Part`
    const float* scalings;     // [P]
    int64_t tokens, features, num_parts, num_experts, top_k, rank;

    int64_t all_ranks() const { return num_experts * rank; }

    std::vector<Part<T>> parts() const {
        std::vector<Part<T>> found;
        int64_t start = 0;
        for (int64_t i = 0; i < num_parts; ++i) {
            const int64_t* own = described + 5 * i;
            auto floats = [&](int field) { return reinterpret_cast<const float*>(own[field]); };
            found.push_back({start, start + own[0], floats(1), floats(2), floats(3), reinterpret_cast<const T*>(own[4]),
                             scalings[i]});
            start += own[0];
        }
        return found;
    }
};

// Columns of one chunk.
struct Columns {
    int64_t start, size;

    // Calls `body(offset, width)` for their panels.
    template <class Body>
    MOE_INLINE void panels(Body body) const {
        for (int64_t offset = 0; offset < size; offset += PANEL) body(offset, std::min<int64_t>(PANEL, size - offset));
    }
};

struct Chunks {
    int64_t features, width, count;

    explicit Chunks(int64_t features) : features(features) {
        int64_t wanted = std::max<int64_t>(1, (features + CHUNK - 1) / CHUNK);
        width = whole_panels((features + wanted - 1) / wanted);
        count = (features + width - 1) / width;
    }

    Columns operator[](int64_t chunk) const {
        int64_t start = chunk * width;
        return {start, std::min(width, features - start)};
    }
};

// Some choices of one expert, each t * K + its slot.
struct Tile {
    int64_t expert, size;
    const int64_t* choices;
};

// Neighbouring tokens of one part.
struct Block {
    int64_t start, end;
    std::vector<int64_t> choices;  // by expert, then by token
    std::vector<int64_t> bounds;   // of each expert's, [E + 1]

    template <class T>
    Block(int64_t start, int64_t end, const Group<T>& group)
        : start(start), end(end), choices((end - start) * group.top_k), bounds(group.num_experts + 1) {
        const int64_t first = start * group.top_k, last = end * group.top_k;
        for (int64_t i = first; i < last; ++i) ++bounds[group.experts[i] + 1];
        for (int64_t e = 0; e < group.num_experts; ++e) bounds[e + 1] += bounds[e];
        std::vector<int64_t> next(bounds);
        for (int64_t i = first; i < last; ++i) choices[next[group.experts[i]]++] = i;
    }

    // Fetch what the tiles will read in another order, which no processor foresees.
    template <class T>
    void fetch(const T* x, const Columns& columns, int64_t features) const {
        for (int64_t t = start; t < end; ++t)
            for (int64_t i = 0; i < columns.size; i += LINE / sizeof(T))
                __builtin_prefetch(x + t * features + columns.start + i, 0, 2);
    }

    template <class Body>
    void tiles(Body body) const {
        for (int64_t e = 0; e + 1 < static_cast<int64_t>(bounds.size()); ++e)
            for (int64_t i = bounds[e]; i < bounds[e + 1]; i += TILE)
                body(Tile{e, std::min(TILE, bounds[e + 1] - i), choices.data() + i});
    }
};

// One chunk's columns of the factors of a part's experts, [E, C / PANEL, R, PANEL]; or the gradients of them.
struct Table {
    int64_t experts, rank, features, width;
    Buffer memory;
    bool is_there = false;

    template <class T>
    Table(const Group<T>& group, const Chunks& chunks)
        : experts(group.num_experts), rank(group.rank), features(group.features), width(chunks.width), memory(size()) {}

    int64_t size() const { return experts * rank * width; }

    // The columns from `offset` on, a multiple of PANEL.
    float* panel(int64_t expert, int64_t offset) const { return memory + (expert * width + offset) * rank; }

    void clear() { std::fill_n(static_cast<float*>(memory), size(), 0.0f); }

    // From B, [E, F, R]; of the experts that were chosen.
    void fill_turned(const float* b, const std::vector<bool>& chosen, const Columns& columns) {
        is_there = b;
        for (int64_t e = 0; e < experts && b; ++e)
            if (chosen[e])
                pack_columns(b + (e * features + columns.start) * rank, rank, columns.size, rank, panel(e, 0));
    }

    // From A, [E, R, F].
    void fill(const float* a, const std::vector<bool>& chosen, const Columns& columns) {
        is_there = a;
        for (int64_t e = 0; e < experts && a; ++e)
            if (chosen[e])
                pack_rows(a + e * rank * features + columns.start, features, rank, columns.size, panel(e, 0));
    }

    // To [E, F, R].
    void write_turned(float* b, const Columns& columns) const {
        for (int64_t e = 0; e < experts; ++e)
            columns.panels([&](int64_t offset, int64_t count) {
                float* to = b + (e * features + columns.start + offset) * rank;
                const float* own = panel(e, offset);
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t r = 0; r < rank; ++r) to[i * rank + r] = own[r * PANEL + i];
            });
    }

    // To [E, R, F].
    void write(float* a, const Columns& columns) const {
        for (int64_t e = 0; e < experts; ++e)
            columns.panels([&](int64_t offset, int64_t count) {
                for (int64_t r = 0; r < rank; ++r)
                    std::copy_n(panel(e, offset) + r * PANEL, count,
                                a + (e * rank + r) * features + columns.start + offset);
            });
    }
};

// What a task works on.
template <class T>
struct Task {
    const Part<T>& part;
    const std::vector<Block>& blocks;
    const std::vector<bool>& chosen;  // whether an expert has any token, [E]
    int64_t index, chunk;             // the part's, the columns'
    Columns columns;
};

template <class T>
struct Plan {
    const Chunks chunks;
    const std::vector<Part<T>> parts;
    std::vector<std::vector<Block>> blocks;
    std::vector<std::vector<bool>> chosen;

    explicit Plan(const Group<T>& group) : chunks(group.features), parts(group.parts()) {
        for (const Part<T>& part : parts) {
            std::vector<Block>& own = blocks.emplace_back();
            std::vector<bool>& any = chosen.emplace_back(group.num_experts);
            for (int64_t start = part.start; start < part.end; start += BLOCK) {
                own.emplace_back(start, std::min(start + BLOCK, part.end), group);
                own.back().tiles([&](const Tile& tile) { any[tile.expert] = true; });
            }
        }
    }

    // Calls `body(task, made)` for all tasks, with what each thread made.
    template <class Make, class Body>
    void run(int64_t threads, Make make, Body body) const {
        parallel_with(static_cast<int64_t>(parts.size()) * chunks.count, threads, make, [&](int64_t i, auto& made) {
            const int64_t part = i / chunks.count, chunk = i % chunks.count;
            body(Task<T>{parts[part], blocks[part], chosen[part], part, chunk, chunks[chunk]}, made);
        });
    }
};

}  // namespace moe::mixlora_ffn
