// Rotary position embedding of whole heads, in one pass.
#include "../compiled.h"

namespace moe {

constexpr int64_t TOKENS = 16;  // a thread takes at a time

template <class T>
void rotary_forward(const T* x, const float* cos, const float* sin, T* y, int64_t tokens, int64_t heads, int64_t size,
                    int64_t token_stride, int64_t head_stride, float sign, int64_t threads) {
    int64_t half = size / 2;
    parallel_runs(tokens, TOKENS, threads, [&](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token) {
            for (int64_t head = 0; head < heads; ++head) {
                const T* from = x + token * token_stride + head * head_stride;
                T* to = y + (token * heads + head) * size;
                across(half, [&](int64_t i, auto count) {
                    Vector c = load(cos + token * size + i, count), s = load(sin + token * size + i, count) * sign;
                    Vector left = load(from + i, count), right = load(from + half + i, count);
                    store(to + i, left * c - right * s, count);
                    store(to + half + i, right * c + left * s, count);
                });
            }
        }
    });
}

#define MOE_ROTARY(T, NAME)                                                                                          \
    MOE_EXPORT int rotary_forward_##NAME(const T* x, const float* cos, const float* sin, T* y, int64_t tokens,       \
                                         int64_t heads, int64_t size, int64_t token_stride, int64_t head_stride,     \
                                         double sign, int64_t threads) {                                             \
        return guarded([&] {                                                                                         \
            rotary_forward(x, cos, sin, y, tokens, heads, size, token_stride, head_stride, static_cast<float>(sign), \
                           threads);                                                                                 \
        });                                                                                                          \
    }
MOE_ROTARY(float, float32)
MOE_ROTARY(bfloat16, bfloat16)

}  // namespace moe
