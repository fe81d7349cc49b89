// A block's logits divided by a temperature.
#pragma once

#include <cstdint>

#include "groups.hpp"
#include "kl.hpp"
#include "simd.hpp"

namespace fastkl {
namespace {

// Returns the temperature, or the nearest one that float32 rounds to neither 0 nor inf.
inline double limited(double temperature) {
    const double less = temperature < double(__FLT_MAX__) ? temperature : double(__FLT_MAX__);
    return less > double(__FLT_MIN__) ? less : double(__FLT_MIN__);
}

// Subtracts the largest logit from n logits, divides the differences by the temperature, and writes them
// and the padding of their last group. Returns the subtracted logit, also divided.
//
// A constant subtracted from one side does not change the divergence. The products' rounding errors are
// relative, so after the subtraction they are small for the tokens that matter in the block. A finite
// logit stays finite, and any other stays as it is.
template <class T>
double divide_by_temperature(const T* from, int64_t n, double temperature, float* to) {
    const double inverse = 1 / limited(temperature);
    // A division takes several times as long as the two products. The inverses of the largest
    // temperatures would be flushed to 0, so `part` is multiplied in first, which is exact.
    const float part = inverse < __FLT_MIN__ ? 0.25f : 1.0f;
    const double left = inverse / part;
    const vf by = splat(float(left)), rest = splat(float(left - float(left)));
    const float high = maximum(from, n), top = high - high == 0 ? high : 0.0f;
    const auto divide = [&](int64_t i, const T* group) INLINE_LAMBDA {
        for (int u = 0; u < U; ++u) {
            const vf x = load(group + u * W), below = (x - top) * part;
            // With the operands in this order, max() turns a NaN into -FLT_MAX.
            const vf divided = max(fma(below, rest, below * by), splat(-__FLT_MAX__));
            store(to + i + u * W, x - x == 0.0f ? divided : x);
        }
    };
    for_groups(from, n, divide, [] {});
    return double(top) * inverse;
}

}  // namespace
}  // namespace fastkl
