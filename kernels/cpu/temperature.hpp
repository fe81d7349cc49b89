// A block's logits divided by a temperature.
#pragma once

#include <cstdint>

#include "groups.hpp"
#include "kl.hpp"
#include "simd.hpp"

namespace fastkl {
namespace {

// A temperature, or the nearest one that float32 takes for neither 0 nor inf.
inline double limited(double temperature) {
    const double less = temperature < double(__FLT_MAX__) ? temperature : double(__FLT_MAX__);
    return less > double(__FLT_MIN__) ? less : double(__FLT_MIN__);
}

// Writes n logits, less the largest and divided, and the padding of their last group. Returns what was taken
// from them, divided too.
//
// No divergence notices what is taken from a side, and the rounding of the products is relative, and so small
// then for tokens that count in the block. A finite logit stays finite, and anything else what it is.
template <class T> double cool(const T* from, int64_t n, double temperature, float* to) {
    const double inverse = 1 / limited(temperature);
    // A division takes several times as long as the two products. The largest temperatures' inverses would
    // count as 0: a part of them is taken first, exactly.
    const float part = inverse < __FLT_MIN__ ? 0.25f : 1.0f;
    const double left = inverse / part;
    const vf by = splat(float(left)), rest = splat(float(left - float(left)));
    const float high = maximum(from, n), top = high - high == 0 ? high : 0.0f;
    const auto divide = [&](int64_t i, const T* group) INLINE_LAMBDA {
        for (int u = 0; u < U; ++u) {
            const vf x = load(group + u * W), below = (x - top) * part;
            // In this order what is no number is the least one.
            const vf divided = max(fma(below, rest, below * by), splat(-__FLT_MAX__));
            store(to + i + u * W, x - x == 0.0f ? divided : x);
        }
    };
    for_groups(from, n, divide, [] {});
    return double(top) * inverse;
}

}  // namespace
}  // namespace fastkl
