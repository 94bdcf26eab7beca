// Losses of rows of logits, and the logits' gradient in their place.
#include <cmath>
#include <limits>

#include "../compiled.h"

namespace moe {

template <class T>
void cross_entropy_rows(T* logits, const int64_t* targets, float* nll, int64_t rows, int64_t words,
                        int64_t with_gradient, int64_t threads) {
    parallel(rows, threads, [&](int64_t row) {
        T* own = logits + row * words;
        Vector most = splat(-std::numeric_limits<float>::infinity());
        across(words, [&](int64_t i, auto count) {
            if constexpr (std::is_same_v<decltype(count), Whole>) {
                most = larger(most, load(own + i, count));
            } else {  // what stands behind the last word is no logit
                for (int64_t k = 0; k < count; ++k) most = larger(most, splat(load(own + i + k, int64_t(1))[0]));
            }
        });
        float highest = largest(most);
        Vector sums{};
        across(words, [&](int64_t i, auto count) { sums += first(exp(load(own + i, count) - highest), count); });
        float z = sum(sums), at_target = load(own + targets[row], int64_t(1))[0];
        nll[row] = std::log(z) + highest - at_target;
        if (!with_gradient) return;
        float inverse = 1.0f / z;
        float own_p = exp(splat(at_target - highest))[0] * inverse;
        across(words,
               [&](int64_t i, auto count) { store(own + i, exp(load(own + i, count) - highest) * inverse, count); });
        store(own + targets[row], splat(own_p - 1.0f), int64_t(1));
    });
}

#define MOE_CROSS_ENTROPY(T, NAME)                                                                              \
    MOE_EXPORT int cross_entropy_rows_##NAME(T* logits, const int64_t* targets, float* nll, int64_t rows,       \
                                             int64_t words, int64_t with_gradient, int64_t threads) {           \
        return guarded([&] { cross_entropy_rows(logits, targets, nll, rows, words, with_gradient, threads); }); \
    }
MOE_CROSS_ENTROPY(float, float32)
MOE_CROSS_ENTROPY(bfloat16, bfloat16)

}  // namespace moe
