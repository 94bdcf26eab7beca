// A narrow linear layer in float32 over an input of another dtype, which is read as it is.
// Letters: N rows, D features, E outputs.
#include <vector>

#include "narrow.h"

namespace moe {

// The weight in whole blocks of outputs, zeros behind the last one.
inline Buffer in_blocks(const float* weight, int64_t outputs, int64_t features) {
    Buffer whole(whole_ranks(outputs) * features);
    std::fill(std::copy_n(weight, outputs * features, static_cast<float*>(whole)),
              whole + whole_ranks(outputs) * features, 0.0f);
    return whole;
}

template <class T>
void wide_linear_forward(const T* x, const float* weight, float* y, int64_t rows, int64_t features, int64_t outputs,
                         int64_t threads) {
    Buffer whole = in_blocks(weight, outputs, features);
    int64_t stride = whole_ranks(outputs);
    parallel_with((rows + TILE - 1) / TILE, threads, [&] { return Buffer(TILE * stride); },
                  [&](int64_t task, Buffer& found) {
                      int64_t first = task * TILE, count = std::min(TILE, rows - first);
                      dots(x + first * features, count, whole, outputs, features, found, stride);
                      for (int64_t row = 0; row < count; ++row)
                          std::copy_n(found + row * stride, outputs, y + (first + row) * outputs);
                  });
}

// dx and d_weight: either may be missing.
template <class T>
void wide_linear_backward(const float* dy, const T* x, const float* weight, T* dx, float* d_weight, int64_t rows,
                          int64_t features, int64_t outputs, int64_t threads) {
    Buffer whole = in_blocks(weight, outputs, features);
    int64_t stride = whole_ranks(outputs), slices = (rows + SLICE - 1) / SLICE;
    std::vector<Buffer> partials(slices);
    parallel_with(
        slices, threads, [&] { return Buffer(TILE * stride); },
        [&](int64_t task, Buffer& own_dy) {
            if (d_weight) partials[task] = zeros(stride * features);
            for (int64_t first = task * SLICE, last = std::min(rows, first + SLICE); first < last; first += TILE) {
                int64_t count = std::min(TILE, last - first);
                for (int64_t row = 0; row < count; ++row)
                    std::copy_n(dy + (first + row) * outputs, outputs, own_dy + row * stride);
                if (d_weight) add_outer(own_dy, stride, x + first * features, count, outputs, features, partials[task]);
                if (dx) combine(own_dy, stride, count, whole, outputs, features, dx + first * features);
            }
        });
    if (!d_weight) return;
    std::fill_n(d_weight, outputs * features, 0.0f);
    for (const Buffer& partial : partials) add(d_weight, partial, outputs * features);
}

#define MOE_WIDE_LINEAR(T, NAME)                                                                                      \
    MOE_EXPORT int wide_linear_forward_##NAME(const T* x, const float* weight, float* y, int64_t rows,                \
                                              int64_t features, int64_t outputs, int64_t threads) {                   \
        return guarded([&] { wide_linear_forward(x, weight, y, rows, features, outputs, threads); });                 \
    }                                                                                                                 \
    MOE_EXPORT int wide_linear_backward_##NAME(const float* dy, const T* x, const float* weight, T* dx,               \
                                               float* d_weight, int64_t rows, int64_t features, int64_t outputs,      \
                                               int64_t threads) {                                                     \
        return guarded([&] { wide_linear_backward(dy, x, weight, dx, d_weight, rows, features, outputs, threads); }); \
    }
MOE_WIDE_LINEAR(float, float32)
MOE_WIDE_LINEAR(bfloat16, bfloat16)

}  // namespace moe
