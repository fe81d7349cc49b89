// A block's logits divided by a temperature.
#pragma once

#include <cstdint>

#include "looks.hpp"
#include "simd.hpp"

namespace fastkl {
namespace {

// A temperature, or the nearest one that float32 takes for neither 0 nor inf.
inline double divisor_of(double temperature) {
    const double limited = temperature < double(__FLT_MAX__) ? temperature : double(__FLT_MAX__);
    return limited > double(__FLT_MIN__) ? limited : double(__FLT_MIN__);
}

// Writes n logits, less the largest and divided, and the padding of their last group. Returns what was taken
// from them, divided too.
//
// No divergence notices what is taken from a side, and the rounding of a division is relative, and so small
// then for tokens that count in the block. A finite logit stays finite, and anything else what it is.
template <class T>
double cool(const T* from, int64_t n, double divisor, const char* ahead, float* to) {
    const float high = maximum(from, n), top = high - high == 0 ? high : 0.0f;
    const float by = float(divisor);
    const auto divide = [&](int64_t i, const T* group) INLINE_LAMBDA {
        __builtin_prefetch(ahead + i * int64_t(sizeof(T)), 0, 3);
        for (int u = 0; u < U; ++u) {
            const vf x = load(group + u * W);
            store(to + i + u * W, x - x == 0.0f ? max((x - top) / by, splat(-__FLT_MAX__)) : x);
        }
    };
    for_groups(from, n, divide, [] {});
    return double(top) / divisor;
}

}  // namespace
}  // namespace fastkl
