// A router's choice: each row's largest probabilities, and the gradient of their weights.
// Letters: N rows, E experts, K top-k.
#include "../compiled.h"

namespace moe {
namespace {

constexpr int64_t RUN = 256;  // rows a thread takes at a time

// The softmax of a row.
void softmax(const float* logits, int64_t size, float* to) {
    const float most = *std::max_element(logits, logits + size);
    Vector total{};
    across(size, [&](int64_t i, auto count) {
        Vector p = first(exp(load(logits + i, count) - most), count);
        store(to + i, p, count);
        total += p;
    });
    const float inverse = 1.0f / sum(total);
    across(size, [&](int64_t i, auto count) { store(to + i, load(to + i, count) * inverse, count); });
}

// `probabilities` may be null.
void route_forward(const float* logits, float* weights, int64_t* experts, float* probabilities, int64_t rows,
                   int64_t size, int64_t top_k, int64_t threads) {
    const int64_t runs = (rows + RUN - 1) / RUN;
    parallel_with(
        runs, threads, [&] { return Buffer(size); },
        [&](int64_t run, Buffer& left) {
            for (int64_t row = run * RUN; row < std::min(rows, (run + 1) * RUN); ++row) {
                float* own = weights + row * top_k;
                int64_t* chosen = experts + row * top_k;
                softmax(logits + row * size, size, left);
                if (probabilities) std::copy_n(+left, size, probabilities + row * size);
                float total = 0;
                for (int64_t k = 0; k < top_k; ++k) {
                    // The first of the largest; beside a NaN, the first that is left: none is chosen twice.
                    int64_t best = std::find_if(+left, left + size, [](float x) { return !(x < 0); }) - left;
                    for (int64_t e = best + 1; e < size; ++e)
                        if (left[e] > left[best]) best = e;
                    chosen[k] = best;
                    own[k] = left[best];
                    total += own[k];
                    left[best] = -1;
                }
                if (top_k > 1)
                    for (int64_t k = 0; k < top_k; ++k) own[k] /= total;
            }
        });
}

// `kept` are the weights; of one expert, all probabilities.
void route_backward(const float* d_weights, const float* kept, const int64_t* experts, float* d_logits, int64_t rows,
                    int64_t size, int64_t top_k, int64_t threads) {
    parallel_runs(rows, RUN, threads, [&](int64_t start, int64_t end) {
        for (int64_t row = start; row < end; ++row) {
            const float* dw = d_weights + row * top_k;
            const int64_t* chosen = experts + row * top_k;
            float* to = d_logits + row * size;
            if (top_k == 1) {
                const float *p = kept + row * size, inner = dw[0] * p[*chosen];
                across(size, [&](int64_t i, auto count) { store(to + i, load(p + i, count) * -inner, count); });
                to[*chosen] += inner;
            } else {
                const float* weight = kept + row * top_k;
                float mean = 0;
                for (int64_t k = 0; k < top_k; ++k) mean += dw[k] * weight[k];
                std::fill_n(to, size, 0.0f);
                for (int64_t k = 0; k < top_k; ++k) to[chosen[k]] = weight[k] * (dw[k] - mean);
            }
        }
    });
}

}  // namespace

MOE_EXPORT int route_forward_float32(const float* logits, float* weights, int64_t* experts, float* probabilities,
                                     int64_t rows, int64_t size, int64_t top_k, int64_t threads) {
    return guarded([&] { route_forward(logits, weights, experts, probabilities, rows, size, top_k, threads); });
}
MOE_EXPORT int route_backward_float32(const float* d_weights, const float* kept, const int64_t* experts,
                                      float* d_logits, int64_t rows, int64_t size, int64_t top_k, int64_t threads) {
    return guarded([&] { route_backward(d_weights, kept, experts, d_logits, rows, size, top_k, threads); });
}

}  // namespace moe
