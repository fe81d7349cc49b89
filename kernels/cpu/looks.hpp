// The passes ("looks") over a block while it is in the cache: the one over the reference, and the two
// that a circuit may need.
//
// p, a = p - m_p and w = e^a of the reference are float32, and padded to whole groups of lanes with
// tokens that have no mass; q is a circuit's, in its own dtype and of any alignment. Looks that are
// MASKED take any logits, others only finite ones: with any other logit one of their sums is not
// finite.
#pragma once

#include <cstdint>

#include "functions.hpp"
#include "kl.hpp"
#include "simd.hpp"

namespace fastkl {
namespace {

constexpr int64_t kGroup = kLanes;
// Elements summed in float32 before the lanes go to float64: 32 a lane, so that a sum of positive
// terms is off by less than 32 half ulps, 2e-6, whatever the terms, and by about 5e-8 typically.
constexpr int64_t kChunk = 32 * kGroup;

// A sum in 16 float32 lanes, and in as many float64 lanes beyond a chunk.
struct Sum {
    vf part[U] = {};
    vd total[U] = {};

    INLINE void fold() {
        for (int u = 0; u < U; ++u) {
            total[u] += __builtin_convertvector(part[u], vd);
            part[u] = vf{};
        }
    }

    double value() const {
        double lanes[kLanes];
        __builtin_memcpy(lanes, total, sizeof lanes);
        for (int width = kLanes / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
        return lanes[0];
    }
};

// A block of the reference.
struct Block {
    const float* p;
    const float* a;
    const float* w;
    int64_t n;
    float max;    // m_p; -inf without mass
    double sum;   // Σ w; NaN if a logit is NaN or +inf
    double first; // Σ w of the first kChunk tokens
    bool masked;  // a logit is -inf
};

struct Exponentials {
    double y;        // Σ e^(q - base)
    double s;        // Σ w d, with d = (p - m_p) - (q - base)
    bool undefined;  // a NaN or +inf in q (MASKED only)
    bool infinite;   // q = -inf where p is finite (MASKED only)
};

struct Divergence {
    double s;  // Σ w d, with d = p - q - c
    double h;  // Σ w φ(d)
    int64_t n_far;
};

// A circuit's logits, and where in memory, in a dtype of their own, the ones lie that are looked at after
// them.
template <class T, class Ahead = T> struct Circuit {
    const T* q;
    const Ahead* ahead;
};

template <int I> struct Index {
    constexpr operator int() const { return I; }
};

// Calls body(Index<0>), ..., body(Index<N - 1>), each at a place of its own in the code, so that an
// array that they index can be kept in registers.
template <int N, class Body> INLINE void unrolled(Body body) {
    if constexpr (N > 0) {
        unrolled<N - 1>(body);
        body(Index<N - 1>{});
    }
}

// Calls body(offset) for whole groups of kGroup tokens, and fold() after each chunk. Returns where
// they end.
template <class Body, class Fold> INLINE int64_t for_whole_groups(int64_t n, Body body, Fold fold) {
    const int64_t whole = n - n % kGroup;
    for (int64_t i = 0; i < whole;) {
        const int64_t end = i + kChunk < whole ? i + kChunk : whole;
        for (; i < end; i += kGroup) body(i);
        fold();
    }
    return whole;
}

// The tokens from `begin` on, fewer than a group, padded by -inf to one.
template <class T> struct Rest {
    T logits[kGroup];

    Rest(const T* q, int64_t begin, int64_t n) {
        for (int64_t j = 0; j < kGroup; ++j)
            logits[j] = begin + j < n ? q[begin + j] : minus_infinity<T>();
    }
};

// Calls body(offset, pointer to q) for groups of kGroup tokens, the last one padded, and fold() after
// each chunk.
template <class T, class Body, class Fold>
INLINE void for_groups(const T* q, int64_t n, Body body, Fold fold) {
    const int64_t whole = for_whole_groups(n, [&](int64_t i) { body(i, q + i); }, fold);
    if (whole < n) {
        const Rest<T> rest(q, whole, n);
        body(whole, rest.logits);
        fold();
    }
}

template <class T> float maximum(const T* q, int64_t n) {
    // Of one running maximum each comparison would wait for the one before.
    constexpr int kChains = 4, kStep = kChains * W;
    vf highs[kChains];
    for (vf& high : highs) high = splat(-__builtin_inff());
    const int64_t whole = n - n % kStep;
    // In this order a NaN is dropped.
    for (int64_t i = 0; i < whole; i += kStep)
        for (int j = 0; j < kChains; ++j) highs[j] = max(load(q + i + j * W), highs[j]);
    vf high = max(max(highs[0], highs[1]), max(highs[2], highs[3]));
    const auto group = [&](int64_t, const T* from) {
        for (int u = 0; u < U; ++u) high = max(load(from + u * W), high);
    };
    for_groups(q + whole, n - whole, group, [] {});
    return largest(high);
}

// Look 1: the circuit's exponentials, and the first moment of d. One exponential a token.
struct ExponentialSums {
    const float *p, *a, *w;
    float base;
    Sum y, s;
    vi undefined, infinite;

    ExponentialSums() = default;
    ExponentialSums(const Block& block, float base)
        : p(block.p), a(block.a), w(block.w), base(base), y{}, s{}, undefined{}, infinite{} {}

    template <bool MASKED, class T> INLINE void add(int64_t i, const T* from) {
        constexpr float inf = __builtin_inff();
        for (int u = 0; u < U; ++u) {
            vf x = load(from + u * W) - base;
            // A finite logit keeps a finite x, as it keeps a finite a.
            if constexpr (MASKED) x = max(x, splat(-__FLT_MAX__));
            vf e = exponential<MASKED>(x);
            vf d = load(a + i + u * W) - x;
            if constexpr (MASKED) {
                const vf logit = load(from + u * W);
                const vi no_p = load(p + i + u * W) == -inf;
                const vi no_q = logit == -inf;
                undefined |= ~(logit < inf);
                infinite |= no_q & ~no_p;
                e = no_q ? vf{} : e;
                d = no_p ? vf{} : d;
            }
            y.part[u] += e;
            s.part[u] = fma(load(w + i + u * W), d, s.part[u]);
        }
    }

    INLINE void fold() { y.fold(), s.fold(); }

    Exponentials value() const {
        return {y.value(), s.value(), any(undefined), any(infinite)};
    }
};

// The pivot c of d = p - q - c. Where the sides lie far apart, p - q is rounded at the size of c, and
// the rounding error is added back, after D. Knuth, The Art of Computer Programming, vol. 2, 4.2.2,
// theorem B. For their exponentials such sides are brought together: the side of the larger logits is
// moved by an integer. That is exact for logits on the same float32 grid as the largest: for all but
// unlikely tokens.
struct Pivot {
    float of_p, of_q; // what p loses and q gains for their exponentials
    float high, low;  // the pivot
    bool apart;       // whether differences are rounded at its size
    bool lost;        // p - q - c is rounded by as much as d may be

    Pivot() = default;
    Pivot(double max_p, double pivot) {
        // Below it p - q is as good, and exact for logits alike.
        constexpr double kApart = 4.0;
        // Beyond it float32 has no fractions. Of two sides that large, neither comes near 0.
        constexpr double kIntegers = 0x1p24;
        // Beyond it float64 knows a pivot to no more than 1e-4.
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
    INLINE vf difference(vf p, vf q) const {
        const vf d = p - q;
        if (!apart) return d - high;
        const vf back = d - p;
        const vf off = (p - (d - back)) - (q + back);
        // Of an infinite difference nothing is rounded off.
        // In this order: what is left of d is on a finer grid than off - low.
        return ((d - high) + (d - d == 0.0f ? off : vf{})) - low;
    }
};

// Look 2: the divergence without cancellation. Tokens with |d| >= reach, and those without reference
// mass, add w φ(d) = e^(q - base) + w (d - 1), with base = m_p - c. Where m_p less a float32 base is a
// float32 too, as mostly, that is the pivot. Elsewhere the rounding of base, by 4e-6 where logits are 100,
// would change the circuit's mass by that part of itself: `lost_by_base` makes up for it. Where tokens are
// OFTEN_FAR there is no branch on whether a group has such.
template <bool OFTEN_FAR> struct DivergenceSums {
    const float *p, *w;
    Pivot c;
    float top, base, lost_by_base;  // the base is one for q + c.of_q
    bool corrected;                 // by any of these
    bool wide;                      // the polynomial's reach is kWide, not kNear
    float far_from;                 // its square
    Sum s, h;
    vi n_far;

    DivergenceSums() = default;
    DivergenceSums(const Block& block, double pivot, Look look)
        : p(block.p), w(block.w), c(block.max, pivot), top(block.max), base(0), lost_by_base(0),
          corrected(true), wide(look != Look::near),
          far_from(wide ? kWide * kWide : kNear * kNear), s{}, h{}, n_far{} {
        if (block.max == -__builtin_inff()) return;
        const double moved = double(block.max) - c.of_p;
        const double left = pivot - c.of_p - c.of_q;
        base = float(moved - left);
        // In this order: of logits beyond 1e9 even a float64 keeps too little beside them.
        lost_by_base = float((moved - base) - left);
        const bool as_it_is = !c.apart && c.of_p == 0 && c.of_q == 0;
        if (as_it_is && double(float(moved - base)) == moved - base) {
            c.high = float(moved - base);
            lost_by_base = 0;
        }
        corrected = !as_it_is || lost_by_base != 0;
    }

    template <bool MASKED, class T> INLINE void add(int64_t i, const T* from) {
        constexpr float inf = __builtin_inff();
        vf d[U], square[U], largest_square = {};
        for (int u = 0; u < U; ++u) {
            const vf logit = load(p + i + u * W);
            // Exact for logits alike, unlike the difference of a and q - base.
            d[u] = c.difference(logit, load(from + u * W));
            if constexpr (MASKED) d[u] = logit == -inf ? vf{} : d[u];
            square[u] = d[u] * d[u];
            vf extent = square[u];
            if constexpr (MASKED) extent = logit == -inf ? splat(far_from) : extent;
            largest_square = u == 0 ? extent : max(extent, largest_square);
        }
        if (OFTEN_FAR || __builtin_expect(any_at_least(largest_square, far_from), 0)) {
            for (int u = 0; u < U; ++u) {
                const vf q = load(from + u * W), logit = load(p + i + u * W);
                const vf weight = load(w + i + u * W);
                vf x = q - base;
                if (__builtin_expect(corrected, 0)) {
                    const vf moved = q + c.of_q;
                    x = (moved - base) - lost_by_base;
                    if (c.apart) {
                        // Where the move rounded q, x follows from d, which knows what was rounded off. Not
                        // so for tokens without mass, whose a and d are large and rounded at that size.
                        const vf a = logit - top;
                        x = ((a < kLowest) | (moved - c.of_q == q)) ? x : a - d[u];
                    }
                }
                vf e = exponential<MASKED>(x);
                if constexpr (MASKED) e = q == -inf ? vf{} : e;
                vi far = square[u] >= far_from;
                if constexpr (MASKED) far |= logit == -inf;
                n_far -= far;
                const vf t = weight * d[u];
                const vf near = weight * (square[u] * phi_over_square<true>(d[u]));
                s.part[u] += t;
                h.part[u] += far ? e + (t - weight) : near;
            }
        } else {
            for (int u = 0; u < U; ++u) {
                const vf weight = load(w + i + u * W);
                // Neighbors may differ in this: it is the same from token to token, and well predicted.
                const vf series = wide ? phi_over_square<true>(d[u]) : phi_over_square<false>(d[u]);
                s.part[u] = fma(weight, d[u], s.part[u]);
                h.part[u] = fma(weight, square[u] * series, h.part[u]);
            }
        }
    }

    INLINE void fold() { s.fold(), h.fold(); }

    Divergence value() const {
        int64_t far = 0;
        for (int i = 0; i < W; ++i) far += n_far[i];
        return {s.value(), h.value(), far};
    }
};

template <class T, class Sums> void add_rest(Sums& sums, int64_t begin, const T* q, int64_t n) {
    const Rest<T> rest(q, begin, n);
    sums.template add<true>(begin, rest.logits);
    sums.fold();
}

// Adds to the sums of G circuits of a block, which share what is read of the reference. A circuit's
// sums do not depend on the others.
template <bool MASKED, int G, class T, class Ahead, class Sums>
void look(const Block& block, const Circuit<T, Ahead>* circuits, Sums* results) {
    // Local copies, whose address nobody has: the compiler keeps them in registers.
    Sums sums[G];
    unrolled<G>([&](auto g) INLINE_LAMBDA { sums[g] = results[g]; });
    const int64_t whole = for_whole_groups(
        block.n,
        [&](int64_t i) INLINE_LAMBDA {
            unrolled<G>([&](auto g) INLINE_LAMBDA {
                // Elsewhere in memory: no prefetcher guesses that.
                __builtin_prefetch(circuits[g].ahead + i, 0, 3);
                sums[g].template add<MASKED>(i, circuits[g].q + i);
            });
        },
        [&]() INLINE_LAMBDA { unrolled<G>([&](auto g) INLINE_LAMBDA { sums[g].fold(); }); });
    unrolled<G>([&](auto g) INLINE_LAMBDA { results[g] = sums[g]; });
    for (int g = 0; g < G; ++g)
        if (whole < block.n) add_rest(results[g], whole, circuits[g].q, block.n);
}

// Reads a block of the reference into `scratch`: its logits, its weights, and what they sum to, counted
// from `base`, a finite guess of its largest logit.
template <class T> Block read_reference(const T* p, int64_t n, float base, Scratch& scratch) {
    constexpr float inf = __builtin_inff();
    vf high = splat(-inf);
    vi undefined = {}, masked = {};
    // The same exponentials in the same order as a circuit's: identical rows have identical sums.
    Sum z;
    double first = 0.0;
    bool is_first = true;
    const auto weigh = [&](int64_t i, const T* from) INLINE_LAMBDA {
        // The next block of the row: the circuits' come by their own looks.
        __builtin_prefetch(p + n + i, 0, 3);
        for (int u = 0; u < U; ++u) {
            const vf x = load(from + u * W);
            high = max(x, high);
            undefined |= ~(x < inf);
            const vi none = x == -inf;
            // A finite logit keeps a finite a, or its weight of 0 would not take it out of a sum.
            const vf a = none ? x : max(x - base, splat(-__FLT_MAX__));
            const vf e = none ? vf{} : exponential<true>(a);
            masked |= i + (u + 1) * W <= n ? none : vi{};
            z.part[u] += e;
            store(scratch.p + i + u * W, x);
            store(scratch.a + i + u * W, a);
            store(scratch.w + i + u * W, a < kLowest ? vf{} : e);
        }
    };
    for_groups(p, n, weigh, [&]() INLINE_LAMBDA {
        z.fold();
        if (is_first) first = z.value();
        is_first = false;
    });
    // Weights much above 1 overflow the sooner where a logit is huge; much below, too many are 0.
    constexpr float kAbove = 4.0f, kBelow = -16.0f;
    const float max = largest(high), off = max - base;
    if (max > -inf && !any(undefined) && !(kBelow < off && off < kAbove))
        return read_reference(p, n, max, scratch);

    Block block{scratch.p, scratch.a, scratch.w, n, max == -inf ? -inf : base, z.value(), first,
                any(masked)};
    // The last group may be padding for the most part: its own tokens are asked one by one.
    for (int64_t i = n - n % kGroup; i < n; ++i) block.masked |= scratch.p[i] == -inf;
    if (any(undefined)) block.sum = __builtin_nan("");
    return block;
}

}  // namespace
}  // namespace fastkl
