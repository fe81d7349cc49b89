// The two passes ("looks") that a circuit's block may need, while the reference's block is in the cache.
//
// q is a circuit's logits, in their own dtype and with any alignment. MASKED looks accept any logits.
// Other looks accept only finite ones: if a logit of the circuit is not finite, neither is one of their
// sums.
#pragma once

#include <cstdint>

#include "functions.hpp"
#include "groups.hpp"
#include "kl.hpp"
#include "pivot.hpp"
#include "reference.hpp"
#include "simd.hpp"

namespace fastkl {
namespace {

// A circuit's logits, and the address of the logits to prefetch meanwhile, which have a dtype of their
// own. One logit is prefetched per token that is looked at, or per 2^pace tokens if the circuit is
// looked at alone.
template <class T, class Ahead = T> struct Circuit {
    const T* q;
    const Ahead* ahead;
    int pace;
};

// Look 1: the circuit's exponentials, and the first moment of d. One exponential per token.
struct ExponentialPass {
    struct Result {
        double y;        // Σ e^(q - base)
        double s;        // Σ w d, with d = (p - m_p) - (q - base)
        bool undefined;  // a NaN or +inf in q (MASKED only)
        bool infinite;   // q = -inf where p is finite (MASKED only)
    };

    struct Sums {
        Sum y, s;
        vi undefined = {}, infinite = {};

        // The same chunks as in read_reference, so that identical rows have identical sums.
        static constexpr int64_t kSummed = kShortChunk;
        INLINE void fold() { y.fold(), s.fold(); }
        Result value() const { return {y.value(), s.value(), any(undefined), any(infinite)}; }
    };

    float base;

    template <bool MASKED, class T>
    INLINE void add(const Block& block, int64_t i, const T* from, Sums& sums) const {
        constexpr float inf = __builtin_inff();
        for (int u = 0; u < U; ++u) {
            vf x = load(from + u * W) - base;
            // The x of a finite logit stays finite, as its `a` does in read_reference.
            if constexpr (MASKED) x = max(x, splat(-__FLT_MAX__));
            vf e = exponential<MASKED>(x);
            vf d = load(block.a + i + u * W) - x;
            if constexpr (MASKED) {
                const vf logit = load(from + u * W);
                const vi no_p = load(block.p + i + u * W) == -inf;
                const vi no_q = logit == -inf;
                sums.undefined |= ~(logit < inf);
                sums.infinite |= no_q & ~no_p;
                e = no_q ? vf{} : e;
                d = no_p ? vf{} : d;
            }
            sums.y.part[u] += e;
            sums.s.part[u] = fma(load(block.w + i + u * W), d, sums.s.part[u]);
        }
    }
};

// Look 2: the divergence without cancellation. Tokens with |d| >= reach, and tokens without reference
// mass, add w φ(d) = e^(q - base) + w (d - 1), with base = m_p - c. If m_p minus a float32 base is a
// float32 too, as it usually is, that difference is the pivot. Otherwise rounding the base, by 4e-6 for
// logits of 100, would change the circuit's mass by that fraction, and `lost_by_base` corrects for it.
struct DivergencePass {
    struct Result {
        double s;  // Σ w d, with d = p - q - c
        double h;  // Σ w φ(d)
        int64_t n_far;
    };

    struct Sums {
        Sum s, h;
        vi n_far = {};

        static constexpr int64_t kSummed = kChunk;
        INLINE void fold() { s.fold(), h.fold(); }
        Result value() const { return {s.value(), h.value(), total(n_far)}; }
    };

    // A group of tokens before they are added. A token is far if its `extent` is at least the square of
    // the reach.
    struct Moved {
        vf d[U], square[U], extent[U];
    };

    Pivot c;
    float top, base, lost_by_base;  // `base` is subtracted from q + c.of_q
    float far_from;                 // reach_squared(wide)
    bool corrected;                 // x is not simply q - base: see add_far()
    bool wide;                      // whether the reach is kWide, not kNear
    bool often_far;                 // whether a branch on far tokens would be mispredicted

    static constexpr float reach_squared(bool wide) { return wide ? kWide * kWide : kNear * kNear; }

    DivergencePass() = default;
    DivergencePass(const Block& block, double pivot, Look look)
        : c(block.max, pivot), top(block.max), base(0), lost_by_base(0), corrected(true),
          wide(look != Look::near), often_far(look == Look::far) {
        far_from = reach_squared(wide);
        if (block.max == -__builtin_inff()) return;
        const double moved = double(block.max) - c.of_p;
        const double left = pivot - c.of_p - c.of_q;
        base = float(moved - left);
        // Keep this order: beside logits beyond 1e9 even a float64 keeps too few digits of `left`.
        lost_by_base = float((moved - base) - left);
        const bool as_it_is = !c.apart && c.of_p == 0 && c.of_q == 0;
        if (as_it_is && double(float(moved - base)) == moved - base) {
            c.high = float(moved - base);
            lost_by_base = 0;
        }
        corrected = !as_it_is || lost_by_base != 0;
    }

    template <bool MASKED, bool MAYBE_APART = true, class T>
    INLINE Moved moved(const Block& block, int64_t i, const T* from) const {
        constexpr float inf = __builtin_inff();
        Moved to;
        for (int u = 0; u < U; ++u) {
            const vf logit = load(block.p + i + u * W);
            // Exact for similar logits, unlike the difference of `a` and q - base.
            to.d[u] = c.template difference<MAYBE_APART>(logit, load(from + u * W));
            if constexpr (MASKED) to.d[u] = logit == -inf ? vf{} : to.d[u];
            to.square[u] = to.d[u] * to.d[u];
            to.extent[u] = to.square[u];
            if constexpr (MASKED) to.extent[u] = logit == -inf ? splat(far_from) : to.extent[u];
        }
        return to;
    }

    INLINE bool any_far(const Moved& tokens) const {
        vf largest = tokens.extent[0];
        for (int u = 1; u < U; ++u) largest = max(tokens.extent[u], largest);
        return any_at_least(largest, far_from);
    }

    template <bool WIDE>
    INLINE void add_near(const Block& block, int64_t i, const Moved& tokens, Sums& sums) const {
        for (int u = 0; u < U; ++u) {
            const vf weight = load(block.w + i + u * W), d = tokens.d[u];
            const vf square = tokens.square[u];
            sums.s.part[u] = fma(weight, d, sums.s.part[u]);
            // Grouped this way, the product with the weight does not wait for the series.
            sums.h.part[u] =
                fma(weight * square, phi_over_square<WIDE>(d, square), sums.h.part[u]);
        }
    }

    template <bool MASKED, class T>
    INLINE void add_far(const Block& block, int64_t i, const T* from, const Moved& tokens,
                        Sums& sums) const {
        constexpr float inf = __builtin_inff();
        for (int u = 0; u < U; ++u) {
            const vf q = load(from + u * W), logit = load(block.p + i + u * W);
            const vf weight = load(block.w + i + u * W);
            const vf d = tokens.d[u], square = tokens.square[u];
            vf x = q - base;
            if (__builtin_expect(corrected, 0)) {
                const vf back = q + c.of_q;
                x = (back - base) - lost_by_base;
                if (c.apart) {
                    // If the move rounded q, compute x from d, which includes the rounding error. This
                    // does not hold for tokens without mass: their `a` and d are large, and rounded at
                    // that size.
                    const vf a = logit - top;
                    x = ((a < kLowest) | (back - c.of_q == q)) ? x : a - d;
                }
            }
            vf e = exponential<MASKED>(x);
            if constexpr (MASKED) e = q == -inf ? vf{} : e;
            vi far = square >= far_from;
            if constexpr (MASKED) far |= logit == -inf;
            sums.n_far -= far;
            const vf first = weight * d;
            const vf near = weight * square * phi_over_square<true>(d, square);
            sums.s.part[u] += first;
            sums.h.part[u] += far ? e + (first - weight) : near;
        }
    }

    template <bool MASKED, class T>
    INLINE void add_moved(const Block& block, int64_t i, const T* from, const Moved& tokens,
                          bool by_wide, Sums& sums) const {
        if (__builtin_expect(any_far(tokens), 0)) {
            add_far<MASKED>(block, i, from, tokens, sums);
        } else if (by_wide) {
            add_near<true>(block, i, tokens, sums);
        } else {
            add_near<false>(block, i, tokens, sums);
        }
    }

    template <bool MASKED, class T>
    INLINE void add(const Block& block, int64_t i, const T* from, Sums& sums) const {
        add_moved<MASKED>(block, i, from, moved<MASKED>(block, i, from), wide, sums);
    }
};

// One of three ways to add a group of tokens of G circuits: it takes any pass and any circuits.
template <bool MASKED> struct OneByOne {
    template <int G, class T, class Ahead, class Pass>
    static INLINE void add(const Block& block, int64_t i, const Circuit<T, Ahead>* circuits,
                           const Pass* passes, typename Pass::Sums* sums) {
        unrolled<G>([&](auto g) INLINE_LAMBDA {
            passes[g].template add<MASKED>(block, i, circuits[g].q + i, sums[g]);
        });
    }
};

// Adds tokens without a branch on whether a token is far: if many are, it would be mispredicted.
struct OftenFar {
    template <int G, class T, class Ahead>
    static INLINE void add(const Block& block, int64_t i, const Circuit<T, Ahead>* circuits,
                           const DivergencePass* passes, DivergencePass::Sums* sums) {
        unrolled<G>([&](auto g) INLINE_LAMBDA {
            const T* from = circuits[g].q + i;
            passes[g].template add_far<false>(
                block, i, from, passes[g].template moved<false>(block, i, from), sums[g]);
        });
    }
};

// For circuits that are not apart from the reference, all with the same reach. If a group is one vector,
// so that its differences stay in registers, one branch serves all circuits.
template <bool WIDE> struct HardlyFar {
    template <int G, class T, class Ahead>
    static INLINE void add(const Block& block, int64_t i, const Circuit<T, Ahead>* circuits,
                           const DivergencePass* passes, DivergencePass::Sums* sums) {
        DivergencePass::Moved tokens[G];
        Below near;
        unrolled<G>([&](auto g) INLINE_LAMBDA {
            const T* from = circuits[g].q + i;
            tokens[g] = passes[g].template moved<false, false>(block, i, from);
            if constexpr (U == 1) {
                near.add(tokens[g].extent[0], DivergencePass::reach_squared(WIDE));
            } else {
                passes[g].template add_moved<false>(block, i, from, tokens[g], WIDE, sums[g]);
            }
        });
        if constexpr (U == 1) {
            if (__builtin_expect(near.all(), 1)) {
                unrolled<G>([&](auto g) INLINE_LAMBDA {
                    passes[g].template add_near<WIDE>(block, i, tokens[g], sums[g]);
                });
            } else {
                unrolled<G>([&](auto g) INLINE_LAMBDA {
                    passes[g].template add_moved<false>(block, i, circuits[g].q + i, tokens[g],
                                                        WIDE, sums[g]);
                });
            }
        }
    }
};

// Adds the tokens from `begin` on, fewer than a group.
template <class T, class Pass>
void add_rest(const Block& block, int64_t begin, const T* q, const Pass& pass,
              typename Pass::Sums& sums) {
    const Rest<T> rest(q, begin, block.n);
    pass.template add<true>(block, begin, rest.logits, sums);
    sums.fold();
}

// Looks at G circuits of a block, which share what is read of the reference. A circuit's sums do not
// depend on the other circuits. Never inlined, so that its loop has all registers to itself.
template <class How, int G, class T, class Ahead, class Pass>
__attribute__((noinline)) void look_how(const Block& shared, const Circuit<T, Ahead>* circuits,
                                        const Pass* passes, typename Pass::Result* results) {
    // Local copies whose address does not escape, so that the compiler keeps them in registers.
    const Block block = shared;
    typename Pass::Sums sums[G];
    const int64_t whole = for_whole_groups<Pass::Sums::kSummed>(
        block.n,
        [&](int64_t i) INLINE_LAMBDA {
            unrolled<G>([&](auto g) INLINE_LAMBDA {
                // These logits lie elsewhere in memory: no hardware prefetcher guesses that.
                const int64_t so_far = G == 1 ? i >> circuits[g].pace : i;
                __builtin_prefetch(circuits[g].ahead + so_far, 0, 3);
            });
            How::template add<G>(block, i, circuits, passes, sums);
        },
        [&]() INLINE_LAMBDA { unrolled<G>([&](auto g) INLINE_LAMBDA { sums[g].fold(); }); });
    unrolled<G>([&](auto g) INLINE_LAMBDA {
        typename Pass::Sums all = sums[g];
        if (whole < block.n) add_rest(block, whole, circuits[g].q, passes[g], all);
        results[g] = all.value();
    });
}

template <bool MASKED, int G, class T, class Ahead>
void look(const Block& block, const Circuit<T, Ahead>* circuits, const ExponentialPass* passes,
          ExponentialPass::Result* results) {
    look_how<OneByOne<MASKED>, G>(block, circuits, passes, results);
}

// Circuits whose tokens are often far are looked at only with each other: the first pass speaks for all.
template <bool MASKED, int G, class T, class Ahead>
void look(const Block& block, const Circuit<T, Ahead>* circuits, const DivergencePass* passes,
          DivergencePass::Result* results) {
    if constexpr (!MASKED) {
        if (passes->often_far)
            return look_how<OftenFar, G>(block, circuits, passes, results);
        bool alike = true;
        for (int g = 0; g < G; ++g)
            alike &= !passes[g].c.apart && passes[g].wide == passes->wide;
        if (alike && passes->wide)
            return look_how<HardlyFar<true>, G>(block, circuits, passes, results);
        if (alike) return look_how<HardlyFar<false>, G>(block, circuits, passes, results);
    }
    look_how<OneByOne<MASKED>, G>(block, circuits, passes, results);
}

}  // namespace
}  // namespace fastkl
