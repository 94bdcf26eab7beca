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

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// What compilers make of a plain conversion takes five instructions.
MOE_INLINE Vector widened(Halves x) {
#if defined(__AVX512F__)
    return (Vector)((Bits)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#elif defined(__AVX2__)
    return (Vector)((Bits)_mm256_cvtepu16_epi32((__m128i)x) << 16);
#else
    return (Vector)(__builtin_convertvector(x, Bits) << 16);
#endif
}

MOE_INLINE Vector load(const bfloat16* from, Whole) {
    Halves x;
    std::memcpy(&x, from, sizeof x);
    return widened(x);
}

MOE_INLINE void store(float* to, Vector x, Whole) { std::memcpy(to, &x, sizeof x); }

// To the nearest, ties to even, as torch rounds; a NaN stays one. The processor's own instruction gives 0 for subnormals.
MOE_INLINE Halves rounded(Vector x) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    Bits bits = (Bits)x;
    Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? nearest : Bits{} + 0x7fc0, Halves);
#endif
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
MOE_INLINE Vector through(const bfloat16*, Vector x) { return widened(rounded(x)); }

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

template <size_t... I>
MOE_INLINE Vector sums_of_pairs(Vector a, Vector b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// The sums of W vectors, in their order, as one.
template <int N = W>
MOE_INLINE Vector sums_of(const Vector* all) {
    if constexpr (N == 1)
        return all[0];
    else
        return sums_of_pairs(sums_of<N / 2>(all), sums_of<N / 2>(all + N / 2), std::make_index_sequence<W>());
}

// A NaN in `b` is passed over; what it belongs to has it in its sum.
MOE_INLINE Vector larger(Vector a, Vector b) { return a < b ? b : a; }

MOE_INLINE float largest(Vector x) {
    float most = x[0];
    for (int i = 1; i < W; ++i) most = std::max(most, x[i]);
    return most;
}

// Within 2 units in the last place; below -87.3 it may be 0, where float32 is subnormal, and above 88 it is constant.
MOE_INLINE Vector exp(Vector x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
#if defined(__AVX512F__)
    // Either bound is below x or above it, or x is a NaN, which the second operand passes on.
    Vector y = (Vector)_mm512_max_ps((__m512)splat(-150.0f), _mm512_min_ps((__m512)splat(88.0f), (__m512)x));
#else
    Vector y = x > 88.0f ? splat(88.0f) : x;
#endif
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
#if defined(__AVX512F__)
    return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    Ints power = ((Ints)shifted - (Ints)splat(magic) + 127) << 23;
    return x < -87.33f ? Vector{} : p * (Vector)power;
#endif
}

// Within 4 units in the last place.
MOE_INLINE Vector sigmoid(Vector x) {
    Vector divisor = 1.0f + exp(-x);
#if defined(__AVX512F__)
    Vector close = (Vector)_mm512_rcp14_ps((__m512)divisor);  // a division would take longer than all the rest
    return close * (2.0f - divisor * close);                  // Newton's step doubles the right bits
#else
    return 1.0f / divisor;
#endif
}

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
