// Low-rank factors as their products read them, and the factors' gradients.
//
// What is multiplied is of numbers F (lanes.h), band after band of columns, in each the ranks; sums are float32.
// Letters: E experts (one, where there are none), R rank, C columns in whole bands.
#pragma once

#include <vector>

#include "lanes.h"

namespace moe {

// Some of a factor's columns.
struct Columns {
    int64_t start, size;

    // Calls `body(offset, count, count)` for their bands, with the counts of both vectors.
    template <class Body>
    MOE_INLINE void bands(Body body) const {
        int64_t offset = 0;
        for (; offset + BAND <= size; offset += BAND) body(offset, Whole(), Whole());
        int64_t rest = size - offset;
        if (rest) body(offset, std::min<int64_t>(rest, W), std::max<int64_t>(rest - W, 0));
    }

    int64_t whole_bands() const { return (size + BAND - 1) / BAND * BAND; }
};

// [E, C / BAND, R, BAND] of numbers F; or none.
template <class F>
struct Table {
    int64_t ranks, width;
    Numbers<F> numbers;

    Table(int64_t experts, int64_t ranks, int64_t width, bool is_needed = true)
        : ranks(ranks), width(width), numbers(is_needed ? experts * ranks * width : 0) {}

    F* band(int64_t expert, int64_t offset) const { return numbers + (expert * width + offset) * ranks; }
};

// What of the factors is read.
enum class Read { RAISING, DOTS, BOTH };

// Of one projection. What raises contracts ranks: its numbers are [E, C / BAND, R / DEPTH, BAND, DEPTH].
template <class F>
struct Factors {
    bool is_there = false;
    bool raises, dots;
    Table<F> raising, dotted;
    Numbers<F> given, rows;  // of one expert: as it is given, and [R, C]

    // `width` columns in whole bands.
    Factors(int64_t experts, int64_t rank, int64_t width, Read read)
        : raises(read != Read::DOTS),
          dots(read != Read::RAISING),
          raising(experts, whole_depths<F>(rank), width, raises),
          dotted(experts, rank, width, dots),
          given(rank * width),
          rows(raising.ranks * width) {
        std::memset(rows, 0, raising.ranks * width * sizeof(F));
    }

    // From B, [E, F, R], of the experts that were chosen; times `scaling`.
    void fill_turned(const float* b, const std::vector<bool>& chosen, const Columns& columns, int64_t features,
                     float scaling) {
        const int64_t rank = dotted.ranks, width = raising.width;
        fill(
            b, chosen,
            [&](int64_t e) {
                const float* own = b + (e * features + columns.start) * rank;
                across(columns.size * rank,
                       [&](int64_t i, auto count) { moe::store(given + i, load(own + i, count) * scaling, count); });
                for (int64_t i = 0; i < columns.size; ++i)
                    for (int64_t r = 0; r < rank; ++r) rows[r * width + i] = given[i * rank + r];
            },
            columns);
    }

    // From A, [E, R, F].
    void fill(const float* a, const std::vector<bool>& chosen, const Columns& columns, int64_t features,
              float scaling = 1.0f) {
        const int64_t rank = dotted.ranks;
        fill(
            a, chosen,
            [&](int64_t e) {
                for (int64_t r = 0; r < rank; ++r) {
                    const float* own = a + (e * rank + r) * features + columns.start;
                    F* to = rows + r * raising.width;
                    across(columns.size,
                           [&](int64_t i, auto count) { moe::store(to + i, load(own + i, count) * scaling, count); });
                }
            },
            columns);
    }

private:
    template <class Body>
    void fill(const float* factors, const std::vector<bool>& chosen, Body read, const Columns& columns) {
        is_there = factors;
        const int64_t end = columns.whole_bands();
        for (size_t e = 0; e < chosen.size() && is_there; ++e) {
            if (!chosen[e]) continue;
            read(e);
            for (int64_t r = 0; r < raising.ranks; ++r)
                std::fill(rows + r * raising.width + columns.size, rows + r * raising.width + end, F{});
            for (int64_t offset = 0; offset < end; offset += BAND) {
                if (raises) pack_raising(raising.band(e, offset), offset);
                for (int64_t r = 0; r < dotted.ranks && dots; ++r)
                    std::copy_n(rows + r * raising.width + offset, BAND, dotted.band(e, offset) + r * BAND);
            }
        }
    }

    void pack_raising(F* to, int64_t offset) const {
        constexpr int DEPTH = Lanes<F>::DEPTH;
        for (int64_t r = 0; r < raising.ranks; r += DEPTH)
            for (int64_t i = 0; i < BAND; ++i)
                for (int64_t k = 0; k < DEPTH; ++k) *to++ = rows[(r + k) * raising.width + offset + i];
    }
};

// Gradients of one projection's factors; in a band the columns lie in the order of the lanes F.
template <class F>
struct FactorSums {
    Table<float> sums;

    FactorSums(int64_t experts, int64_t rank, int64_t width) : sums(experts, rank, width) {}

    // Of all experts, as all of them are written.
    void clear(int64_t experts) const {
        std::fill_n(static_cast<float*>(sums.numbers), experts * sums.ranks * sums.width, 0.0f);
    }

    // Those of one expert.
    void add(const FactorSums& more) const { moe::add(sums.numbers, more.sums.numbers, sums.ranks * sums.width); }
    void scale(float factor) const {
        across(sums.ranks * sums.width,
               [&](int64_t i, auto count) { store(sums.numbers + i, load(sums.numbers + i, count) * factor, count); });
    }

    // To B, [E, F, R].
    void write_turned(float* b, int64_t experts, const Columns& columns, int64_t features) const {
        each(experts, columns, [&](int64_t e, int64_t r, int64_t offset, const float* band) {
            float* to = b + (e * features + columns.start + offset) * sums.ranks + r;
            const int64_t count = std::min<int64_t>(BAND, columns.size - offset);
            for (int64_t i = 0; i < count; ++i) to[i * sums.ranks] = band[i];
        });
    }

    // To A, [E, R, F].
    void write(float* a, int64_t experts, const Columns& columns, int64_t features) const {
        each(experts, columns, [&](int64_t e, int64_t r, int64_t offset, const float* band) {
            std::copy_n(band, std::min<int64_t>(BAND, columns.size - offset),
                        a + (e * sums.ranks + r) * features + columns.start + offset);
        });
    }

private:
    template <class Body>
    void each(int64_t experts, const Columns& columns, Body body) const {
        for (int64_t e = 0; e < experts; ++e)
            for (int64_t offset = 0; offset < columns.size; offset += BAND)
                for (int64_t r = 0; r < sums.ranks; ++r) {
                    const float* own = sums.band(e, offset) + r * BAND;
                    Vector first = load(own, Whole()), second = load(own + W, Whole());
                    Lanes<F>::in_order(first, second);
                    float band[BAND];
                    store(band, first, Whole());
                    store(band + W, second, Whole());
                    body(e, r, offset, band);
                }
    }
};

}  // namespace moe
