// Rows, or pieces of rows, as float32: reading them, summing their exponentials, and writing them in
// their own dtype.
#pragma once

#include <cstdint>

#include "functions.hpp"
#include "groups.hpp"
#include "kl.hpp"
#include "matrix.hpp"
#include "simd.hpp"

namespace fastkl {
namespace {

// Copies a row as float32 and pads its last group with -inf. Sets `undefined` to whether there is a NaN
// or +inf, and returns the largest logit.
template <class T> float read_row(const T* from, int64_t n, float* to, bool& undefined) {
    constexpr float inf = __builtin_inff();
    vf high = splat(-inf);
    vi odd = {};
    const auto copy = [&](int64_t i, const T* group) {
        for (int u = 0; u < U; ++u) {
            const vf x = load(group + u * W);
            high = max(x, high);
            odd |= ~(x < inf);
            store(to + i + u * W, x);
        }
    };
    for_groups(from, n, copy, [] {});
    undefined = any(odd);
    return largest(high);
}

// Returns e^a, or 0 where it is below float's normal range.
inline vf weight_of(vf a) { return a < kLowest ? vf{} : exponential<true>(a); }

// Sets e = e^((x - base) scale), or 0 where it is below float's normal range, and returns the sum.
// Meanwhile it prefetches the logits `ahead`.
template <class T>
double weigh_row(const float* x, int64_t padded, float base, float scale, float* e, const T* ahead) {
    Sum z;
    for (int64_t i = 0; i < padded; i += kGroup) {
        __builtin_prefetch(ahead + i, 0, 3);
        for (int u = 0; u < U; ++u) {
            const vf weight = weight_of((load(x + i + u * W) - base) * scale);
            z.part[u] += weight;
            store(e + i + u * W, weight);
        }
        if ((i + kGroup) % kChunk == 0) z.fold();
    }
    z.fold();
    return z.value();
}

// Converts to the type of `to`, rounding to nearest with ties to even; a NaN stays a NaN.
inline void convert(const float* from, int64_t n, float* to) {
    __builtin_memcpy(to, from, n * int64_t(sizeof *to));
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline void convert(const float* from, int64_t n, BFloat16* to) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(from[i]);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        to[i].bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

inline void convert(const float* from, int64_t n, Float16* to) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(from[i]), sign = (bits >> 16) & 0x8000;
        const uint32_t magnitude = bits & 0x7fffffff;
        uint32_t half;
        if (magnitude > 0x7f800000) {
            half = 0x7e00;
        } else if (magnitude >= 0x47800000) {
            half = 0x7c00;
        } else if (magnitude < 0x38800000) {
            // Subnormal: adding 1/2 rounds to a multiple of 2^-24, and leaves it in the lowest bits.
            const float x = from[i] < 0 ? -from[i] : from[i];
            half = bits_of(x + 0.5f) - bits_of(0.5f);
        } else {
            const uint32_t low = magnitude - (112u << 23);
            half = (low + 0xfff + ((low >> 13) & 1)) >> 13;
        }
        to[i].bits = uint16_t(sign | half);
    }
}

inline float finite_base(float max) { return max == -__builtin_inff() ? 0.0f : max; }

inline void write_row(const Matrix& matrix, int64_t row, const float* from, int64_t n) {
    char* to = const_cast<char*>(address(matrix, row, 0));
    switch (matrix.dtype) {
        case Dtype::bfloat16: convert(from, n, reinterpret_cast<BFloat16*>(to)); break;
        case Dtype::float16: convert(from, n, reinterpret_cast<Float16*>(to)); break;
        default: convert(from, n, reinterpret_cast<float*>(to));
    }
}

// Returns the first index of the largest logit, or 0 if no logit equals `max`.
inline int64_t position(const float* x, int64_t padded, float max) {
    for (int64_t i = 0; i < padded; i += W)
        if (any(load(x + i) == max))
            for (int64_t j = i; j < i + W; ++j)
                if (x[j] == max) return j;
    return 0;
}

}  // namespace
}  // namespace fastkl
