// What the compiled CPU kernels share: vectors as wide as the machine's, numbers in bfloat16, and rows over threads.
//
// Vectors are GCC's and clang's own extension, so that one source serves AVX-512, AVX2 and NEON. Nothing here may assume
// finite numbers: a NaN goes where arithmetic takes it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#define MOE_EXPORT extern "C" __attribute__((visibility("default")))
#define MOE_INLINE inline __attribute__((always_inline))

namespace moe {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats of a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vector __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint32_t Bits __attribute__((vector_size(W * 4)));
typedef uint16_t Halves __attribute__((vector_size(W * 2)));

struct bfloat16 {
    uint16_t bits;
};

// A whole vector's count, known to the compiler.
using Whole = std::integral_constant<int64_t, W>;

MOE_INLINE Vector splat(float x) { return x - Vector{}; }

MOE_INLINE Vector load(const float* from, Whole) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

MOE_INLINE Vector load(const bfloat16* from, Whole) {
    Halves x;
    std::memcpy(&x, from, sizeof x);
    return (Vector)(__builtin_convertvector(x, Bits) << 16);
}

MOE_INLINE void store(float* to, Vector x, Whole) { std::memcpy(to, &x, sizeof x); }

// To the nearest, ties to even, as torch rounds; a NaN stays one.
MOE_INLINE Halves rounded(Vector x) {
    Bits bits = (Bits)x;
    Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? nearest : Bits{} + 0x7fc0, Halves);
}

MOE_INLINE void store(bfloat16* to, Vector x, Whole) {
    Halves y = rounded(x);
    std::memcpy(to, &y, sizeof y);
}

// The first `count` of a vector; zeros behind them, and nothing is written there.
template <class T>
MOE_INLINE Vector load(const T* from, int64_t count) {
    T part[W] = {};
    std::memcpy(part, from, count * sizeof(T));
    return load(part, Whole());
}

template <class T>
MOE_INLINE void store(T* to, Vector x, int64_t count) {
    T part[W];
    store(part, x, Whole());
    std::memcpy(to, part, count * sizeof(T));
}

// What a value is after a store and a load.
MOE_INLINE Vector through(const float*, Vector x) { return x; }
MOE_INLINE Vector through(const bfloat16*, Vector x) { return (Vector)(__builtin_convertvector(rounded(x), Bits) << 16); }

// Calls `body(i, count)` for the vectors of `n` numbers; the count of all but the last is `Whole`.
template <class Body>
MOE_INLINE void across(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(i, Whole());
    if (i < n) body(i, n - i);
}

MOE_INLINE float sum(Vector x) {
    float total = 0;
    for (int i = 0; i < W; ++i) total += x[i];
    return total;
}

// A NaN in `b` is passed over; what it belongs to has it in its sum.
MOE_INLINE Vector larger(Vector a, Vector b) { return a < b ? b : a; }

MOE_INLINE float largest(Vector x) {
    float most = x[0];
    for (int i = 1; i < W; ++i) most = std::max(most, x[i]);
    return most;
}

// Within 2 units in the last place; 0 below -87.3, where float32 would be subnormal, and constant above 88.
MOE_INLINE Vector exp(Vector x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    Vector y = x > 88.0f ? splat(88.0f) : x;
    Vector shifted = y * 1.44269504088896341f + magic;
    Vector n = shifted - magic;
    Vector r = y - n * 0.693359375f - n * -2.12194440e-4f;
    Vector p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints power = ((Ints)shifted - (Ints)splat(magic) + 127) << 23;
    return x < -87.33f ? Vector{} : p * (Vector)power;
}

MOE_INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp(-x)); }

// Calls `body(i)` for `n` parts of a job, spread over threads; each part's result must depend on nothing but `i`.
template <class Body>
void parallel(int64_t n, int64_t threads, Body body) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(threads)) if (threads > 1 && n > 1)
    for (int64_t i = 0; i < n; ++i) body(i);
}

// The same with what every thread makes once for all its parts: `body(i, made)`.
template <class Make, class Body>
void parallel_with(int64_t n, int64_t threads, Make make, Body body) {
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1 && n > 1)
    {
        auto made = make();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n; ++i) body(i, made);
    }
}

// The same in runs of neighbours: `body(first, last)`.
template <class Body>
void parallel_runs(int64_t n, int64_t run, int64_t threads, Body body) {
    parallel((n + run - 1) / run, threads, [&](int64_t i) { body(i * run, std::min(n, (i + 1) * run)); });
}

// Floats on a cache line's boundary, not initialised.
struct Buffer {
    struct Free {
        void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
    };
    std::unique_ptr<float[], Free> memory;

    Buffer() = default;
    explicit Buffer(int64_t size) : memory(new (std::align_val_t(64)) float[size]) {}
    operator float*() const { return memory.get(); }
};

}  // namespace moe
