// What the mixture of LoRA experts is computed from on a CPU, and in which pieces.
//
// A task is a chunk of a part's features; a part is an adapter's tokens. It walks the tokens in blocks, and a block
// expert by expert, so that all that chose an expert read its factors from the nearest cache. Pieces depend on sizes
// and routing alone and no two tasks add to one number: results are the same on any number of threads.
// Letters: T tokens, P parts, F ffn, E experts, K top-k, R rank, C columns of a chunk in whole bands.
#pragma once

#include <vector>

#include "../lanes.h"

namespace moe::mixlora_ffn {

constexpr int64_t CHUNK = 256;  // most columns of a chunk: a block's values of so many stay in a core's cache
constexpr int64_t BLOCK = 256;  // tokens
constexpr int64_t LINE = 64;    // bytes of a cache's line
static_assert(CHUNK % BAND == 0);

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

    // Calls `body(offset, count, count)` for their bands, with the counts of both vectors.
    template <class Body>
    MOE_INLINE void bands(Body body) const {
        int64_t offset = 0;
        for (; offset + BAND <= size; offset += BAND) body(offset, Whole(), Whole());
        int64_t rest = size - offset;
        if (rest) body(offset, std::min<int64_t>(rest, W), std::max<int64_t>(rest - W, 0));
    }

    int64_t whole_bands() const { return (size + BAND - 1) / BAND * BAND; }
};

struct Chunks {
    int64_t features, width, count;

    explicit Chunks(int64_t features) : features(features) {
        int64_t wanted = std::max<int64_t>(1, (features + CHUNK - 1) / CHUNK);
        width = Columns{0, (features + wanted - 1) / wanted}.whole_bands();
        count = (features + width - 1) / width;
    }

    Columns operator[](int64_t chunk) const {
        int64_t start = chunk * width;
        return {start, std::min(width, features - start)};
    }
};

// A block's choices of one expert.
struct Run {
    int64_t expert, size;
    int64_t place, row;  // of the first: among the block's, and among all that has rows of its own for each run
    const int64_t* choices;
};

// Neighbouring tokens of one part, and their choices: a choice is t * K + its slot.
struct Block {
    int64_t start, end, row;
    std::vector<int64_t> choices;  // by expert, then by token
    std::vector<int64_t> bounds;   // of each expert's, [E + 1]
    std::vector<int64_t> places;   // of each token's choices among all, [tokens, K]

    template <class T>
    Block(int64_t start, int64_t end, int64_t row, const Group<T>& group)
        : start(start),
          end(end),
          row(row),
          choices((end - start) * group.top_k),
          bounds(group.num_experts + 1),
          places(choices.size()) {
        const int64_t first = start * group.top_k, last = end * group.top_k;
        for (int64_t i = first; i < last; ++i) ++bounds[group.experts[i] + 1];
        for (int64_t e = 0; e < group.num_experts; ++e) bounds[e + 1] += bounds[e];
        std::vector<int64_t> next(bounds);
        for (int64_t i = first; i < last; ++i) {
            places[i - first] = next[group.experts[i]]++;
            choices[places[i - first]] = i;
        }
    }

    // Calls `body(run)` for every expert that any of the tokens chose.
    template <class Body>
    void runs(Body body) const {
        for (int64_t e = 0; e + 1 < static_cast<int64_t>(bounds.size()); ++e)
            if (bounds[e] < bounds[e + 1])
                body(Run{e, bounds[e + 1] - bounds[e], bounds[e], row + bounds[e] + e, &choices[bounds[e]]});
    }

    // Rows of all runs, and one behind each: where choices are taken two by two, the last may need it.
    int64_t rows() const { return bounds.back() + static_cast<int64_t>(bounds.size()) - 1; }
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
    int64_t room = 0;  // rows of all runs

    explicit Plan(const Group<T>& group) : chunks(group.features), parts(group.parts()) {
        for (const Part<T>& part : parts) {
            std::vector<Block>& own = blocks.emplace_back();
            std::vector<bool>& any = chosen.emplace_back(group.num_experts);
            for (int64_t start = part.start; start < part.end; start += BLOCK) {
                own.emplace_back(start, std::min(start + BLOCK, part.end), room, group);
                room += own.back().rows();
                own.back().runs([&](const Run& run) { any[run.expert] = true; });
            }
        }
    }

    // Calls `body(run)` for all runs.
    template <class Body>
    void each_run(int64_t threads, Body body) const {
        for (const auto& own : blocks) parallel(own.size(), threads, [&](int64_t i) { own[i].runs(body); });
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
