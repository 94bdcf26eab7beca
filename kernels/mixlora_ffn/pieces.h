// What the mixture of LoRA experts is computed from on a CPU, and in which pieces.
//
// A task is a chunk of a part's features; a part is an adapter's tokens. It walks the tokens in blocks, and a block
// expert by expert, so that all that chose an expert read its factors from the nearest cache. Pieces depend on sizes
// and routing alone and no two tasks add to one number: results are the same on any number of threads.
// Letters: T tokens, P parts, D model, F ffn, E experts, K top-k, R rank, C columns of a chunk in whole bands.
#pragma once

#include <vector>

#include "../factors.h"

namespace moe::mixlora_ffn {

constexpr int64_t BLOCK = 256;  // tokens
constexpr int64_t LINE = 64;    // bytes of a cache's line

struct Chunks {
    int64_t features, width, count;

    Chunks(int64_t features, int64_t most) : features(features) {
        int64_t wanted = std::max<int64_t>(1, (features + most - 1) / most);
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

    template <class Group>
    Block(int64_t start, int64_t end, int64_t row, const Group& group)
        : start(start),
          end(end),
          row(row),
          choices((end - start) * group.top_k),
          bounds(group.num_experts + 1),
          places(choices.size()) {
        const int64_t first = start * group.top_k, last = end * group.top_k;
        for (int64_t i = first; i < last; ++i) {
            if (group.experts[i] < 0 || group.experts[i] >= group.num_experts) throw std::out_of_range("expert");
            ++bounds[group.experts[i] + 1];
        }
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

// What a task works on. `Part` has the `start` and `end` of its tokens.
template <class Part>
struct Task {
    const Part& part;
    const std::vector<Block>& blocks;
    const std::vector<bool>& chosen;  // whether an expert has any token, [E]
    int64_t index, chunk;             // the part's, the columns'
    Columns columns;
};

template <class Part>
struct Plan {
    const Chunks chunks;
    const std::vector<Part> parts;
    std::vector<std::vector<Block>> blocks;
    std::vector<std::vector<bool>> chosen;
    int64_t room = 0;  // rows of all runs

    template <class Group>
    Plan(const Group& group, int64_t chunk) : chunks(group.features, chunk), parts(group.parts()) {
        for (const Part& part : parts) {
            std::vector<Block>& own = blocks.emplace_back();
            std::vector<bool>& any = chosen.emplace_back(group.num_experts);
            for (int64_t start = part.start; start < part.end; start += BLOCK) {
                own.emplace_back(start, std::min(start + BLOCK, part.end), room, group);
                room += own.back().rows();
                own.back().runs([&](const Run& run) { any[run.expert] = true; });
            }
        }
    }

    // Calls `body(part's number, block)` for all blocks.
    template <class Body>
    void each_block(int64_t threads, Body body) const {
        for (size_t part = 0; part < blocks.size(); ++part)
            parallel(blocks[part].size(), threads, [&](int64_t i) { body(part, blocks[part][i]); });
    }

    // Calls `body(task, made)` for all tasks, with what each thread made.
    template <class Make, class Body>
    void run(int64_t threads, Make make, Body body) const {
        parallel_with(static_cast<int64_t>(parts.size()) * chunks.count, threads, make, [&](int64_t i, auto& made) {
            const int64_t part = i / chunks.count, chunk = i % chunks.count;
            body(Task<Part>{parts[part], blocks[part], chosen[part], part, chunk, chunks[chunk]}, made);
        });
    }
};

}  // namespace moe::mixlora_ffn
