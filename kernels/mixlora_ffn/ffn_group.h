// What of the mixture is F wide, as Python describes it.
//
// Letters as in pieces.h.
#pragma once

#include "pieces.h"

namespace moe::mixlora_ffn {

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

}  // namespace moe::mixlora_ffn
