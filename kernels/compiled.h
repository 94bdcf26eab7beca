// What the compiled CPU kernels share: vectors as wide as the machine's, numbers in bfloat16, and rows over threads.
//
// Vectors are GCC's and clang's own extension, so that one source serves AVX-512, AVX2 and NEON. Nothing here may
// assume finite numbers: a NaN goes where arithmetic takes it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MOE_EXPORT extern "C" __attribute__((visibility("default")))
#define MOE_INLINE inline __attribute__((always_inline))

extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);

namespace moe {

// What an exported function returns: 0, 1 when there was not enough memory, 2 for an index out of its range.
template <class Body>
int guarded(Body body) {
    try {
        body();
        return 0;
    } catch (const std::out_of_range&) {
        return 2;
    } catch (...) {
        return 1;
    }
}

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

// To the nearest, ties to even, as torch rounds; a NaN stays one. The processor's own instruction gives 0 for
// subnormals.
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
#if defined(__AVX512BW__) && defined(__AVX512VL__)
MOE_INLINE uint32_t mask_of(int64_t count) { return (1u << count) - 1; }
MOE_INLINE Vector load(const float* from, int64_t count) {
    return (Vector)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask_of(count)), from);
}
MOE_INLINE Vector load(const bfloat16* from, int64_t count) {
    return widened((Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask_of(count)), from));
}
MOE_INLINE void store(float* to, Vector x, int64_t count) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask_of(count)), (__m512)x);
}
MOE_INLINE void store(bfloat16* to, Vector x, int64_t count) {
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask_of(count)), (__m256i)rounded(x));
}
#else
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
#endif

// What a value is after a store and a load.
MOE_INLINE Vector through(const float*, Vector x) { return x; }
MOE_INLINE Vector through(const bfloat16*, Vector x) { return widened(rounded(x)); }

// Zeros behind the first `count`.
MOE_INLINE Vector first(Vector x, Whole) { return x; }
MOE_INLINE Vector first(Vector x, int64_t count) {
    float part[W];
    store(part, x, Whole());
    return load(part, count);
}

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

template <int... I>
MOE_INLINE Vector sums_of_pairs(Vector a, Vector b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
    return __builtin_shuffle(a, b, Ints{(2 * I)...}) + __builtin_shuffle(a, b, Ints{(2 * I + 1)...});
#endif
}

// The sums of W vectors, in their order, as one.
template <int N = W>
MOE_INLINE Vector sums_of(const Vector* all) {
    if constexpr (N == 1)
        return all[0];
    else
        return sums_of_pairs(sums_of<N / 2>(all), sums_of<N / 2>(all + N / 2), std::make_integer_sequence<int, W>());
}

// A NaN in `b` is passed over; what it belongs to has it in its sum.
MOE_INLINE Vector larger(Vector a, Vector b) { return a < b ? b : a; }

MOE_INLINE float largest(Vector x) {
    float most = x[0];
    for (int i = 1; i < W; ++i) most = std::max(most, x[i]);
    return most;
}

// Of N vectors step by step beside each other: one alone would wait for each of its own steps.
// Within 2 units in the last place; below -87.3 it may be 0, where float32 is subnormal, and above 88 it is constant.
template <int N>
MOE_INLINE void exp(const Vector (&x)[N], Vector (&y)[N]) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float factors[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    Vector shifted[N], r[N], p[N];
    auto each = [](auto body) {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) body(i);
    };
#if defined(__AVX512F__)
    // Either bound is below x or above it, or x is a NaN, which the second operand passes on.
    each([&](int i) {
        r[i] = (Vector)_mm512_max_ps((__m512)splat(-150.0f), _mm512_min_ps((__m512)splat(88.0f), (__m512)x[i]));
    });
#else
    each([&](int i) { r[i] = x[i] > 88.0f ? splat(88.0f) : x[i]; });
#endif
    each([&](int i) { shifted[i] = r[i] * 1.44269504088896341f + magic; });
    each([&](int i) { r[i] -= (shifted[i] - magic) * 0.693359375f; });
    each([&](int i) { r[i] -= (shifted[i] - magic) * -2.12194440e-4f; });
    each([&](int i) { p[i] = splat(1.9875691500e-4f); });
#pragma GCC unroll 8
    for (float factor : factors) each([&](int i) { p[i] = p[i] * r[i] + factor; });
    each([&](int i) { p[i] = p[i] * r[i] * r[i] + r[i] + 1.0f; });
#if defined(__AVX512F__)
    each([&](int i) { y[i] = (Vector)_mm512_scalef_ps((__m512)p[i], (__m512)(shifted[i] - magic)); });
#else
    each([&](int i) {
        Ints power = ((Ints)shifted[i] - (Ints)splat(magic) + 127) << 23;
        y[i] = x[i] < -87.33f ? Vector{} : p[i] * (Vector)power;
    });
#endif
}

MOE_INLINE Vector exp(Vector x) {
    Vector y[1];
    exp<1>({x}, y);
    return y[0];
}

// Within 4 units in the last place.
template <int N>
MOE_INLINE void sigmoid(const Vector (&x)[N], Vector (&y)[N]) {
    Vector divisor[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) y[i] = -x[i];
    exp<N>(y, divisor);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        divisor[i] += 1.0f;
#if defined(__AVX512F__)
        Vector close = (Vector)_mm512_rcp14_ps((__m512)divisor[i]);  // a division would take longer than all the rest
        y[i] = close * (2.0f - divisor[i] * close);                  // Newton's step doubles the right bits
#else
        y[i] = 1.0f / divisor[i];
#endif
    }
}

MOE_INLINE Vector sigmoid(Vector x) {
    Vector y[1];
    sigmoid<1>({x}, y);
    return y[0];
}

// Runs `body` on several threads at once: torch's own, which every OpenMP library lends under this name.
template <class Body>
void on_threads(int64_t threads, Body body) {
    if (threads < 2)
        body();
    else
        GOMP_parallel([](void* given) { (*static_cast<Body*>(given))(); }, &body, static_cast<unsigned>(threads), 0);
}

// Calls `body(i, made)` for `n` parts of a job, spread over threads, with what each of them made once for all its
// parts. A part's result must depend on nothing but `i`.
template <class Make, class Body>
void parallel_with(int64_t n, int64_t threads, Make make, Body body) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    on_threads(std::min(n, threads), [&] {
        try {  // nothing may be thrown through the library of threads
            auto made = make();
            for (int64_t i; (i = next.fetch_add(1)) < n;) body(i, made);
        } catch (...) {
            failed = true;
        }
    });
    if (failed) throw std::bad_alloc();
}

template <class Body>
void parallel(int64_t n, int64_t threads, Body body) {
    parallel_with(n, threads, [] { return 0; }, [&](int64_t i, int) { body(i); });
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

inline Buffer zeros(int64_t size) {
    Buffer buffer(size);
    std::fill_n(static_cast<float*>(buffer), size, 0.0f);
    return buffer;
}

inline void add(float* to, const float* more, int64_t size) {
    across(size, [&](int64_t i, auto count) { store(to + i, load(to + i, count) + load(more + i, count), count); });
}

}  // namespace moe
