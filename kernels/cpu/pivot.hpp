// The pivot: the constant that is subtracted from differences of logits.
#pragma once

#include "simd.hpp"

namespace fastkl {
namespace {

// The pivot c of d = p - q - c. If the sides lie far apart, p - q is rounded at the size of c, and the
// rounding error is added back, after D. Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem
// B. Before exponentials are taken, such sides are brought together: the side with the larger logits is
// moved by an integer. The move is exact for logits on the same float32 grid as the largest, which all
// but unlikely tokens are.
struct Pivot {
    float of_p, of_q; // subtracted from p, and added to q, before exponentials
    float high, low;  // the pivot is high + low
    bool apart;       // whether p - q is rounded at the pivot's size
    bool lost;        // whether the rounding error of p - q - c may be as large as d

    Pivot() = default;
    Pivot(double max_p, double pivot) {
        // Below kApart, plain p - q is as good, and it is exact for similar logits.
        constexpr double kApart = 4.0;
        // Beyond kIntegers, float32 has no fractions. If both sides are that large, moving one brings
        // neither near 0.
        constexpr double kIntegers = 0x1p24;
        // Beyond kKnown, a pivot in float64 is known to no better than 1e-4.
        constexpr double kKnown = 0x1p40;
        const double size = __builtin_fabs(pivot), max_q = max_p - pivot;
        const bool p_moves = __builtin_fabs(max_p) > __builtin_fabs(max_q);
        const double smaller = __builtin_fabs(p_moves ? max_q : max_p);
        const bool moves = size >= kApart && size < kKnown && smaller < kIntegers;
        const float moved = moves ? float(__builtin_rint(pivot)) : 0.0f;
        of_p = p_moves ? moved : 0.0f;
        of_q = p_moves ? 0.0f : moved;
        lost = size >= kIntegers && !moves;
        apart = size >= kApart && size < kKnown;
        high = float(pivot);
        low = apart ? float(pivot - high) : 0.0f;
    }

    double value() const { return double(high) + low; }

    // p - q - c.
    template <bool MAYBE_APART = true> INLINE vf difference(vf p, vf q) const {
        const vf d = p - q;
        if (!MAYBE_APART || !apart) return d - high;
        const vf back = d - p;
        const vf off = (p - (d - back)) - (q + back);
        // An infinite difference has no rounding error to add back. Keep this order: what is left of d
        // is on a finer grid than off - low.
        return ((d - high) + (d - d == 0.0f ? off : vf{})) - low;
    }
};

}  // namespace
}  // namespace fastkl
