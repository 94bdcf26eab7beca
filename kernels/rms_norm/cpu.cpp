// Root-mean-square normalisation, forward and backward, a row after the other.
#include <cmath>

#include "../compiled.h"

namespace moe {

constexpr int64_t ROWS = 16;  // a thread takes at a time

// weight * round(x * rstd), rounded to T in between as LLaMA's own code does.
template <class T>
MOE_INLINE void scale_row(const T* x, float rstd, const T* weight, T* y, int64_t features) {
    across(features, [&](int64_t i, auto count) {
        store(y + i, load(weight + i, count) * through(y, load(x + i, count) * rstd), count);
    });
}

template <class T>
void rms_norm_forward(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t features, float eps,
                      int64_t threads) {
    parallel_runs(rows, ROWS, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const T* own = x + row * features;
            Vector squares{};
            across(features, [&](int64_t i, auto count) {
                Vector value = load(own + i, count);
                squares += value * value;
            });
            rstd[row] = 1.0f / std::sqrt(sum(squares) / features + eps);
            scale_row(own, rstd[row], weight, y + row * features, features);
        }
    });
}

template <class T>
void rms_norm_scaled(const T* x, const float* rstd, const T* weight, T* y, int64_t rows, int64_t features,
                     int64_t threads) {
    parallel_runs(rows, ROWS, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row)
            scale_row(x + row * features, rstd[row], weight, y + row * features, features);
    });
}

template <class T>
void rms_norm_backward(const T* dy, const T* x, const T* weight, const float* rstd, T* dx, int64_t rows,
                       int64_t features, int64_t threads) {
    parallel_runs(rows, ROWS, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const T *own_dy = dy + row * features, *own_x = x + row * features;
            Vector products{};
            across(features, [&](int64_t i, auto count) {
                products += load(own_dy + i, count) * load(weight + i, count) * load(own_x + i, count);
            });
            float r = rstd[row], share = sum(products) * r * r / features;
            across(features, [&](int64_t i, auto count) {
                Vector g = load(own_dy + i, count) * load(weight + i, count);
                store(dx + row * features + i, r * (g - load(own_x + i, count) * share), count);
            });
        }
    });
}

#define MOE_RMS_NORM(T, NAME)                                                                                   \
    MOE_EXPORT int rms_norm_forward_##NAME(const T* x, const T* weight, T* y, float* rstd, int64_t rows,        \
                                           int64_t features, double eps, int64_t threads) {                     \
        return guarded(                                                                                         \
            [&] { rms_norm_forward(x, weight, y, rstd, rows, features, static_cast<float>(eps), threads); });   \
    }                                                                                                           \
    MOE_EXPORT int rms_norm_scaled_##NAME(const T* x, const float* rstd, const T* weight, T* y, int64_t rows,   \
                                          int64_t features, int64_t threads) {                                  \
        return guarded([&] { rms_norm_scaled(x, rstd, weight, y, rows, features, threads); });                  \
    }                                                                                                           \
    MOE_EXPORT int rms_norm_backward_##NAME(const T* dy, const T* x, const T* weight, const float* rstd, T* dx, \
                                            int64_t rows, int64_t features, int64_t threads) {                  \
        return guarded([&] { rms_norm_backward(dy, x, weight, rstd, dx, rows, features, threads); });           \
    }
MOE_RMS_NORM(float, float32)
MOE_RMS_NORM(bfloat16, bfloat16)

}  // namespace moe
