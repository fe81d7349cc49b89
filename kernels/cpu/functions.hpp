// The functions of the inner loops, as polynomials: e^x, log x and φ(x) = e^(-x) - 1 + x.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace fastkl {
namespace {

// Below kLowest a weight is 0, and exponential(), at most 1.7e-38 there, must not be relied on.
constexpr float kLowest = -87.0f;
constexpr float kHighest = 88.0f;
// The |d| from which φ is not evaluated as a polynomial: by default, and where more terms pay off.
constexpr float kNear = 0.5f, kWide = 3.0f;

// Returns e^x for kLowest <= x <= kHighest, and garbage for NaN. If CLAMPED, any other x counts as the
// nearer limit. If not, AVX-512 saves the clamping instructions: the result is then inf or NaN where e^x
// overflows, 0 where it underflows, and inf or NaN for x < -4e15. The other levels always clamp.
//
// x = n log 2 + r with |r| <= 0.347, and a polynomial of degree 5 approximates e^r with a relative error
// of 1.1e-7. Including the rounding of r and of the polynomial, the relative error is below 4.2e-7 over
// the whole range (fused levels round log 2 to a single float32, which matters for large n), and below
// 2.2e-7 for |x| < 16. Both bounds are tested.
template <bool CLAMPED> inline vf exponential(vf x) {
    constexpr float kLog2E = 0x1.715476p+0f;
    // Adding kRound rounds to an integer, and leaves that integer in the low bits.
    constexpr float kRound = 0x1.8p+23f;
    if constexpr (CLAMPED || !kScales) x = min(max(x, splat(kLowest)), splat(kHighest));
    const vf shifted = fma(x, splat(kLog2E), splat(kRound));
    const vf n = shifted - kRound;
    vf r;
    if constexpr (kFused) {
        r = fma(n, splat(-0x1.62e430p-1f), x);
    } else {
        // The first part of log 2 has 9 significant bits: its product with n is exact.
        r = x - n * 0.693359375f;
        r = r - n * -2.12194440e-4f;
    }
    vf e = fma(splat(0.00831246749f), r, splat(0.0418902561f));
    e = fma(e, r, splat(0.166671157f));
    e = fma(e, r, splat(0.499992311f));
    e = fma(e, r, splat(1.0f));
    e = fma(e, r, splat(1.0f));
    if constexpr (kScales) return scale(e, n);
    return (vf)((vi)e + ((vi)shifted << 23));
}

// Returns log x for a normal x > 0, and garbage for any other x. `rest` is x - 1, with more digits of it
// than x holds: between √½ and √2 the logarithm is computed as log(1 + rest), and near 0 it is as
// accurate as `rest`.
//
// x = 2^n m with m between √½ and √2, and log m = f + f² times a polynomial of degree 7 in f = m - 1,
// with a relative error of 3.5e-8. Including rounding, the relative error is below 1.5e-7 at all levels,
// with `rest` computed from x or more exact. The bound is tested; the largest error seen was 1.2e-7.
inline vf logarithm(vf x, vf rest) {
    constexpr int32_t kRootHalf = 0x3f3504f3;
    const vi above = (vi)x - kRootHalf;
    const vi exponent = above >> 23;
    const vf f = exponent == 0 ? rest : (vf)((above & 0x7fffff) + kRootHalf) - 1.0f;
    vf series = fma(splat(0.0873483643f), f, splat(-0.143075183f));
    series = fma(series, f, splat(0.149179742f));
    series = fma(series, f, splat(-0.165705085f));
    series = fma(series, f, splat(0.199620724f));
    series = fma(series, f, splat(-0.250017554f));
    series = fma(series, f, splat(0.333339512f));
    series = fma(series, f, splat(-0.499999911f));
    const vf log_m = fma(f * f, series, f);
    return fma(__builtin_convertvector(exponent, vf), splat(0x1.62e430p-1f), log_m);
}

// Returns c[0] + c[1] x + ..., in the same number of operations either way. Pairing terms halves the
// chain of dependent steps. AVX-512 has enough registers to interleave other sums instead, and none to
// spare for the copies that pairs need.
template <int N> INLINE vf polynomial(const float (&c)[N], vf x, vf square) {
    constexpr bool kPairs = W < 16;
    if constexpr (kPairs) {
        vf sum = N % 2 ? splat(c[N - 1]) : fma(splat(c[N - 1]), x, splat(c[N - 2]));
        for (int i = (N - 1) / 2 * 2 - 2; i >= 0; i -= 2)
            sum = fma(sum, square, fma(splat(c[i + 1]), x, splat(c[i])));
        return sum;
    }
    vf sum = splat(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, splat(c[i]));
    return sum;
}

// Returns φ(d) / d² for |d| < kNear, or kWide if WIDE, with a tested relative error below 9.1e-7.
template <bool WIDE> INLINE vf phi_over_square(vf d, vf square) {
    if constexpr (WIDE) {
        static constexpr float kSeries[] = {
            0.500000179f,    -0.16666618f,    0.041665595f,   -0.00833403878f,  0.00138997007f,
            -0.000198164897f, 2.44370804e-05f, -2.77858612e-06f, 3.23856739e-07f, -2.61697579e-08f,
        };
        return polynomial(kSeries, d, square);
    }
    static constexpr float kSeries[] = {0.5f, -0.166662931f, 0.0416670814f, -0.00839478616f,
                                        0.00139237079f};
    return polynomial(kSeries, d, square);
}

}  // namespace
}  // namespace fastkl
