// Groups of tokens: loops over the logits of a row, and sums over them.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace fastkl {
namespace {

constexpr int64_t kGroup = kLanes;
// Elements summed in float32 before the lanes are added to float64 totals: 32 per lane, so that a sum of
// positive terms is off by less than 32 half ulps (2e-6) whatever the terms, and by 5e-8 typically.
constexpr int64_t kChunk = 32 * kGroup;
// The same, for sums of which only the small difference matters.
constexpr int64_t kShortChunk = kChunk / 2;
static_assert(kChunk % kShortChunk == 0 && kShortChunk % kGroup == 0);

// Logits of one row are prefetched this many tokens ahead.
constexpr int64_t kAhead = 128 * kGroup;

// A sum: 16 float32 lanes within a chunk, and as many float64 lanes across chunks.
struct Sum {
    vf part[U] = {};
    vd total[2 * U] = {};

    INLINE void fold() {
        for (int u = 0; u < U; ++u) {
            total[2 * u] += first_half(part[u]);
            total[2 * u + 1] += last_half(part[u]);
            part[u] = vf{};
        }
    }

    double value() const {
        double8 halves[2];
        __builtin_memcpy(halves, total, sizeof halves);
        const double8 eight = halves[0] + halves[1];
        double4 quarters[2];
        __builtin_memcpy(quarters, &eight, sizeof quarters);
        const double4 four = quarters[0] + quarters[1];
        double2 eighths[2];
        __builtin_memcpy(eighths, &four, sizeof eighths);
        const double2 two = eighths[0] + eighths[1];
        return two[0] + two[1];
    }

  private:
    typedef double double8 __attribute__((vector_size(64)));
    typedef double double4 __attribute__((vector_size(32)));
    typedef double double2 __attribute__((vector_size(16)));
};

template <int I> struct Index {
    constexpr operator int() const { return I; }
};

// Calls body(Index<0>), ..., body(Index<N - 1>), each as separate code, so that the compiler can keep an
// array that they index in registers.
template <int N, class Body> INLINE void unrolled(Body body) {
    if constexpr (N > 0) {
        unrolled<N - 1>(body);
        body(Index<N - 1>{});
    }
}

// Calls body(offset) for whole groups of kGroup tokens, and fold() after each CHUNK. Returns the offset
// at which the whole groups end.
template <int64_t CHUNK = kChunk, class Body, class Fold>
INLINE int64_t for_whole_groups(int64_t n, Body body, Fold fold) {
    const int64_t whole = n - n % kGroup;
    for (int64_t i = 0; i < whole;) {
        const int64_t end = i + CHUNK < whole ? i + CHUNK : whole;
        for (; i < end; i += kGroup) body(i);
        fold();
    }
    return whole;
}

// The tokens from `begin` on, fewer than a group, padded with -inf to a whole group.
template <class T> struct Rest {
    T logits[kGroup];

    Rest(const T* q, int64_t begin, int64_t n) {
        for (int64_t j = 0; j < kGroup; ++j)
            logits[j] = begin + j < n ? q[begin + j] : minus_infinity<T>();
    }
};

// Calls body(offset, pointer to q) for groups of kGroup tokens, the last one padded, and fold() after
// each CHUNK.
template <int64_t CHUNK = kChunk, class T, class Body, class Fold>
INLINE void for_groups(const T* q, int64_t n, Body body, Fold fold) {
    const int64_t whole = for_whole_groups<CHUNK>(n, [&](int64_t i) { body(i, q + i); }, fold);
    if (whole < n) {
        const Rest<T> rest(q, whole, n);
        body(whole, rest.logits);
        fold();
    }
}

template <class T> float maximum(const T* q, int64_t n) {
    // With a single running maximum, each comparison would wait for the previous one.
    constexpr int kChains = 4, kStep = kChains * W;
    vf highs[kChains];
    for (vf& high : highs) high = splat(-__builtin_inff());
    const int64_t whole = n - n % kStep;
    // With the operands in this order, max() drops a NaN.
    for (int64_t i = 0; i < whole; i += kStep)
        for (int j = 0; j < kChains; ++j) highs[j] = max(load(q + i + j * W), highs[j]);
    vf high = max(max(highs[0], highs[1]), max(highs[2], highs[3]));
    const auto group = [&](int64_t, const T* from) {
        for (int u = 0; u < U; ++u) high = max(load(from + u * W), high);
    };
    for_groups(q + whole, n - whole, group, [] {});
    return largest(high);
}

}  // namespace
}  // namespace fastkl
