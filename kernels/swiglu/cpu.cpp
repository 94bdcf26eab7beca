// The gated product silu(gate) * up, forward and backward, in one pass.
#include "../compiled.h"

namespace moe {

constexpr int64_t RUN = 8192;  // numbers a thread takes at a time

template <class T>
void swiglu_forward(const T* gate, const T* up, T* h, int64_t size, int64_t threads) {
    parallel_runs(size, RUN, threads, [&](int64_t first, int64_t last) {
        across(last - first, [&](int64_t i, auto count) {
            i += first;
            Vector g = load(gate + i, count);
            store(h + i, g * sigmoid(g) * load(up + i, count), count);
        });
    });
}

template <class T>
void swiglu_backward(const T* dh, const T* gate, const T* up, T* dgate, T* dup, int64_t size, int64_t threads) {
    parallel_runs(size, RUN, threads, [&](int64_t first, int64_t last) {
        across(last - first, [&](int64_t i, auto count) {
            i += first;
            Vector d = load(dh + i, count), g = load(gate + i, count), s = sigmoid(g);
            Vector du = d * g * s;
            store(dgate + i, d * load(up + i, count) * s * (1.0f + g * (1.0f - s)), count);
            store(dup + i, du, count);
        });
    });
}

#define MOE_SWIGLU(T, NAME)                                                                                        \
    MOE_EXPORT int swiglu_forward_##NAME(const T* gate, const T* up, T* h, int64_t size, int64_t threads) {        \
        return guarded([&] { swiglu_forward(gate, up, h, size, threads); });                                       \
    }                                                                                                              \
    MOE_EXPORT int swiglu_backward_##NAME(const T* dh, const T* gate, const T* up, T* dgate, T* dup, int64_t size, \
                                          int64_t threads) {                                                       \
        return guarded([&] { swiglu_backward(dh, gate, up, dgate, dup, size, threads); });                         \
    }
MOE_SWIGLU(float, float32)
MOE_SWIGLU(bfloat16, bfloat16)

}  // namespace moe
