// A block of the reference, and the pass over it.
#pragma once

#include <cstdint>

#include "functions.hpp"
#include "groups.hpp"
#include "kl.hpp"
#include "simd.hpp"

namespace fastkl {
namespace {

// p, a = p - m_p and w = e^a are float32, padded to whole groups with tokens that have no mass: `a` is
// finite, and w = 0.
struct Block {
    const float* p;
    const float* a;
    const float* w;
    int64_t n;
    float max;    // m_p; -inf if there is no mass
    double sum;   // Σ w; NaN if a logit is NaN or +inf
    double first; // Σ w of the first kChunk tokens
    bool masked;  // whether a logit is -inf
};

// The logits that will be looked at next: their address, and the bytes per logit.
struct Next {
    const char* from;
    int64_t logit_size;
};

// Reads a block of the reference into `scratch`, its logits and its weights, and sums the weights. They
// are relative to `base`, a finite guess of the block's largest logit. Exponentials take longer than
// memory accesses, so half of what is looked at next is prefetched meanwhile.
template <class T>
Block read_reference(const T* p, int64_t n, float base, const Next& next, Scratch& scratch) {
    constexpr float inf = __builtin_inff();
    vf high = splat(-inf);
    // 0 while all logits are finite: inf or NaN times 0 is NaN.
    vf finite = {};
    // The same exponentials in the same order as in ExponentialPass, so that identical rows have
    // identical sums.
    Sum z;
    double first = 0.0;
    int64_t summed = 0;
    const auto weigh = [&](int64_t i, const T* from, auto padded) INLINE_LAMBDA {
        __builtin_prefetch(p + i + kAhead, 0, 3);
        __builtin_prefetch(next.from + i / 2 * next.logit_size, 0, 3);
        for (int u = 0; u < U; ++u) {
            const vf x = load(from + u * W), below = x - base;
            high = max(x, high);
            if constexpr (!padded) finite = fma(x, vf{}, finite);
            // For a token without mass, e is 2e-38: it changes no sum, except one of such tokens alone.
            const vf e = exponential<true>(below);
            // Keep `a` finite: otherwise a weight of 0 would not remove the token from a sum.
            const vf a = max(below, splat(-__FLT_MAX__));
            z.part[u] += e;
            store(scratch.p + i + u * W, x);
            store(scratch.a + i + u * W, a);
            store(scratch.w + i + u * W, a < kLowest ? vf{} : e);
        }
    };
    const auto fold = [&]() INLINE_LAMBDA {
        z.fold();
        summed += kShortChunk;
        if (summed <= kChunk) first = z.value();
    };
    const int64_t whole = for_whole_groups<kShortChunk>(
        n, [&](int64_t i) INLINE_LAMBDA { weigh(i, p + i, Index<0>{}); }, fold);
    if (whole < n) {
        const Rest<T> rest(p, whole, n);
        weigh(whole, rest.logits, Index<1>{});
        fold();
    }
    // `finite` covers whole groups only, since padding with -inf would make it NaN: check the rest one
    // by one.
    int32_t masked = 0, undefined = 0;
    for (int64_t i = any(finite != finite) ? 0 : whole; i < n; ++i) {
        masked |= scratch.p[i] == -inf;
        undefined |= !(scratch.p[i] < inf);
    }
    // Weights much above 1 overflow sooner if a logit is huge; much below 1, too many of them are 0.
    constexpr float kAbove = 4.0f, kBelow = -16.0f;
    const float max = largest(high), off = max - base;
    if (max > -inf && !undefined && !(kBelow < off && off < kAbove))
        return read_reference(p, n, max, next, scratch);

    Block block{scratch.p, scratch.a, scratch.w, n, base, z.value(), first, masked != 0};
    if (max == -inf) block.max = -inf, block.sum = block.first = 0.0;
    if (undefined) block.sum = __builtin_nan("");
    return block;
}

}  // namespace
}  // namespace fastkl
