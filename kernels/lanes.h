// Products of vectors whose lanes each take DEPTH neighbouring numbers of what is contracted: one of float32, or two of
// bfloat16 where the processor multiplies those at twice the rate. Sums are float32 in either case.
#pragma once

#include "compiled.h"

namespace moe {

constexpr int BAND = 2 * W;  // columns that are taken together

template <class F>
struct Lanes;

template <>
struct Lanes<float> {
    static constexpr int DEPTH = 1;
    using Packed = Vector;

    static MOE_INLINE Packed load(const float* from) { return moe::load(from, Whole()); }
    static MOE_INLINE Packed broadcast(const float* from) { return splat(*from); }
    static MOE_INLINE void add_product(Vector& sum, Packed a, Packed b) { sum += a * b; }

    // A band of a row.
    static MOE_INLINE void store(float* to, Vector first, Vector second) {
        moe::store(to, first, Whole());
        moe::store(to + W, second, Whole());
    }

    // A vector of DEPTH rows, each column's numbers beside each other.
    static MOE_INLINE void store_beside(float* to, Vector row, Vector) { moe::store(to, row, Whole()); }

    // A band of DEPTH rows, each column's numbers beside each other, in an order that `in_order` undoes.
    static MOE_INLINE void beside(const float* row, const float*, Packed (&columns)[2]) {
        columns[0] = load(row);
        columns[1] = load(row + W);
    }

    static MOE_INLINE void in_order(Vector&, Vector&) {}
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <>
struct Lanes<bfloat16> {
    static constexpr int DEPTH = 2;
    using Packed = __m512i;

    static MOE_INLINE Packed load(const bfloat16* from) { return _mm512_loadu_si512(from); }
    static MOE_INLINE Packed broadcast(const bfloat16* from) {
        int32_t pair;
        std::memcpy(&pair, from, sizeof pair);
        return _mm512_set1_epi32(pair);
    }
    static MOE_INLINE void add_product(Vector& sum, Packed a, Packed b) {
        sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }

    static MOE_INLINE void store(bfloat16* to, Vector first, Vector second) {
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
    }

    static MOE_INLINE void store_beside(bfloat16* to, Vector row, Vector next) {
        __m512i low = _mm512_cvtepu16_epi32((__m256i)rounded(row)),
                high = _mm512_cvtepu16_epi32((__m256i)rounded(next));
        _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }

    static MOE_INLINE void beside(const bfloat16* row, const bfloat16* next, Packed (&columns)[2]) {
        columns[0] = _mm512_unpacklo_epi16(load(row), load(next));
        columns[1] = _mm512_unpackhi_epi16(load(row), load(next));
    }

    static MOE_INLINE void in_order(Vector& first, Vector& second) {
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        __m512 a = (__m512)first, b = (__m512)second;
        first = (Vector)_mm512_permutex2var_ps(a, low, b);
        second = (Vector)_mm512_permutex2var_ps(a, high, b);
    }
};

// As what numbers of T are multiplied.
template <class T>
using Multiplied = T;
#else
template <class T>
using Multiplied = float;
#endif

MOE_INLINE float value(float x) { return x; }
MOE_INLINE float value(bfloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

template <class F>
MOE_INLINE int64_t whole_depths(int64_t n) {
    return (n + Lanes<F>::DEPTH - 1) / Lanes<F>::DEPTH * Lanes<F>::DEPTH;
}

// A band of T, or what there is of it.
template <class T>
MOE_INLINE void store_band(T* to, Vector first, Vector second, Whole, Whole) {
    if constexpr (std::is_same_v<T, Multiplied<T>>) {
        Lanes<T>::store(to, first, second);
    } else {
        store(to, first, Whole());
        store(to + W, second, Whole());
    }
}
template <class T>
MOE_INLINE void store_band(T* to, Vector first, Vector second, int64_t count, int64_t more) {
    store(to, first, count);
    store(to + W, second, more);
}

template <class T, class First, class Second>
MOE_INLINE void load_band(const T* from, First first, Second second, Vector (&to)[2]) {
    to[0] = load(from, first);
    to[1] = load(from + W, second);
}

// A band times a mask, if there is one.
template <class T, class First, class Second>
MOE_INLINE void mask_band(Vector (&band)[2], const T* mask, First first, Second second) {
    if (!mask) return;
    band[0] *= load(mask, first);
    band[1] *= load(mask + W, second);
}

// Results of so many bytes would push out of the caches what is read next, and are not there themselves when they are.
constexpr int64_t STREAMED = 4 << 20;

// A band of T past the caches, where it begins on a line and the processor can; `finish_streams` behind the last one.
template <class T>
MOE_INLINE void stream_band(T* to, Vector first, Vector second, Whole, Whole) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
        if constexpr (std::is_same_v<T, bfloat16>) {
            __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)both);
        } else {
            _mm512_stream_ps(to, (__m512)first);
            _mm512_stream_ps(to + W, (__m512)second);
        }
        return;
    }
#endif
    store_band(to, first, second, Whole(), Whole());
}
template <class T>
MOE_INLINE void stream_band(T* to, Vector first, Vector second, int64_t count, int64_t more) {
    store_band(to, first, second, count, more);
}

MOE_INLINE void finish_streams() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// Calls `body(start, count)` for parts of `n`, the count of each known to the compiler: 8 as long as it can be.
template <class Body>
MOE_INLINE void by_eights(int64_t n, Body body) {
    int64_t start = 0;
    auto next = [&](auto count) {
        body(start, count);
        start += count.value;
    };
    while (n - start >= 8) next(std::integral_constant<int, 8>());
    if (n - start >= 4) next(std::integral_constant<int, 4>());
    if (n - start >= 2) next(std::integral_constant<int, 2>());
    if (n - start >= 1) next(std::integral_constant<int, 1>());
}

// Calls `body(start, count)` for parts of `n`, the count of each known to the compiler: MOST as long as it can be,
// then 1.
template <int MOST, class Body>
MOE_INLINE void by_groups(int64_t n, Body body) {
    int64_t start = 0;
    for (; start + MOST <= n; start += MOST) body(start, std::integral_constant<int, MOST>());
    for (; start < n; ++start) body(start, std::integral_constant<int, 1>());
}

// Few numbers, as ranks are.
template <class From, class To>
MOE_INLINE void copy(const From* from, int64_t count, To* to) {
    by_eights(count, [&](int64_t start, auto part) {
        for (int i = 0; i < part.value; ++i)
            if constexpr (std::is_same_v<From, To>)
                to[start + i] = from[start + i];
            else
                to[start + i] = value(from[start + i]);
    });
}

// Memory of any kind of number, on a cache line's boundary, not initialised.
template <class F>
struct Numbers {
    Buffer memory;

    Numbers() = default;
    explicit Numbers(int64_t size) : memory((size * sizeof(F) + sizeof(float) - 1) / sizeof(float)) {}
    operator F*() const { return reinterpret_cast<F*>(memory.memory.get()); }
};

}  // namespace moe
