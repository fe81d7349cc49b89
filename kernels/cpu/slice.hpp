// A slice of one row, for all circuits.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "groups.hpp"
#include "kl.hpp"
#include "looks.hpp"
#include "matrix.hpp"
#include "pivot.hpp"
#include "reference.hpp"
#include "simd.hpp"
#include "temperature.hpp"

namespace fastkl {
namespace {

// The divergence from which on a block's plain result is used: sums of a few distinct terms, whose
// rounding errors are alike, are off by up to 1e-6, and Σ w d is up to four times the result.
constexpr double kAccurateBelow = 0.3;
// Sums of exponentials outside this range were taken at a base too far from the maximum.
constexpr double kLeastSum = 1e-12;
constexpr double kLargestSum = 1e30;
// The mean of φ(d) from which on a block's pivot was a wrong guess, and Σ w (e^(-d) - 1) is lost in
// rounding.
constexpr double kLargestMean = 16;
// The length of a slice's first block. Neither the pivot nor the look is well known there, so the block
// is short: little of it is looked at twice.
constexpr int64_t kFirstBlock = 2048;
// How many tokens are sampled for a first guess of lse_p - lse_q.
constexpr int64_t kSample = 256;

// The |x| below which e^(-x) - 1 and x cancel.
constexpr double kSmall = 1e-2;

inline double phi(double x) {
    if (__builtin_fabs(x) >= kSmall) return ::expm1(-x) + x;
    return x * x * (1.0 / 2 - x * (1.0 / 6 - x / 24));
}

inline double finite_or_zero(double x) { return __builtin_isfinite(x) ? x : 0.0; }

// How many circuits of a block are looked at together, to share what is loaded of the reference from the
// second-level cache: as many as the level has registers for.
constexpr int kTogether = W == 16 ? kMostTogether : W == 8 ? 2 : 1;

// If at least one token in this many is beyond kNear, or kWide, the next wider look is faster.
constexpr int64_t kTokensPerNear = 512, kTokensPerWide = 64;
// The divergence from which on that many tokens are beyond kNear, if all tokens move alike.
constexpr double kWideFrom = 0.01;
// The divergence from which on few blocks are below kAccurateBelow, where exponentials are not enough. A
// row's blocks differ from each other, and the more so, the fewer tokens hold most of its mass.
constexpr double kExponentialsFrom = 0.35;

// Whether circuits that need these looks can be looked at together.
inline bool shared(Look a, Look b) {
    const auto by_polynomial = [](Look look) { return look == Look::near || look == Look::wide; };
    return a == b || (by_polynomial(a) && by_polynomial(b));
}

// A circuit's block. `guess` estimates lse_p - lse_q, and is NaN if there is no estimate. If there is
// one, `next` is the look that is likely to be enough; it is updated to the next block's.
template <class T, class Ahead> class CircuitBlock {
  public:
    CircuitBlock() = default;
    CircuitBlock(const Block& block, const Circuit<T, Ahead>& circuit, double guess, Look& next)
        : block_(&block), circuit_(circuit), guess_(guess), next_(&next), masked_(block.masked) {}

    // Returns the look to start with, after guessing lse_p - lse_q if there is no guess.
    Look first_look() {
        if (__builtin_isnan(block_->sum)) return Look::alone;
        bool guessed = __builtin_isfinite(guess_);
        if (!guessed) {
            guess_ = finite_or_zero(sample(block_->p) - sample(circuit_.q));
            guessed = block_->n >= 4 * kChunk && guess_from_first_chunk();
        }
        if (masked_) return Look::alone;
        if (!guessed || Pivot(block_->max, guess_).lost) return Look::exponentials;
        return *next_;
    }

    // Looks at G circuits together, of which blocks[0] is the first, and sets their states.
    template <int G> static void look_together(Look first, CircuitBlock* blocks, State* states) {
        if (first == Look::exponentials) {
            look_together<G>(blocks, states, [](const CircuitBlock& block) {
                return ExponentialPass{block.base()};
            });
        } else {
            look_together<G>(blocks, states, [](const CircuitBlock& block) {
                return DivergencePass(*block.block_, block.guess_, *block.next_);
            });
        }
    }

    State state() {
        if (__builtin_isnan(block_->sum)) {
            const Mass p{block_->max, block_->sum};
            return {p, p, 0.0};
        }
        return state(base(), exponentials(base()));
    }

  private:
    template <int G, class Begin>
    static void look_together(CircuitBlock* blocks, State* states, Begin begin) {
        using Pass = decltype(begin(*blocks));
        Circuit<T, Ahead> circuits[G];
        Pass passes[G];
        typename Pass::Result results[G];
        for (int g = 0; g < G; ++g) {
            circuits[g] = blocks[g].circuit_;
            passes[g] = begin(blocks[g]);
        }
        look<false, G>(*blocks->block_, circuits, passes, results);
        for (int g = 0; g < G; ++g) states[g] = blocks[g].state(passes[g], results[g]);
    }

    // If all tokens are near, no exponentials are needed: Σ w e^(-d) = Σ w - Σ w d + Σ w φ(d).
    State state(const DivergencePass& pass, const DivergencePass::Result& sums) {
        if (!__builtin_isfinite(sums.s) || !__builtin_isfinite(sums.h)) return state();
        const double rise = (sums.h - sums.s) / block_->sum, ratio = 1 + rise;
        if (!(ratio > 0.4 && ratio < 2.5 && sums.h < kLargestMean * block_->sum)) return state();
        const double x = -::log1p(rise);
        const double accurate = sums.h / block_->sum;
        const double change = __builtin_fabs(x) < kSmall ? phi(x) : rise + x;
        // Half of `accurate` may cancel. If more does, the block is looked at again from a better pivot.
        const double kl = change > accurate / 2 ? at_pivot(pass.c.value() + x, accurate - change)
                                                : accurate - change;
        *next_ = next_look(kl, sums.n_far);
        const double max_q = block_->max - pass.c.value();
        // The part of the pivot that a float64 loses beside logits beyond 1e9.
        const double left = (block_->max - max_q) - pass.c.value();
        const double sum_q = block_->sum * ratio * (left == 0 ? 1.0 : ::exp(left));
        return {{block_->max, block_->sum}, {max_q, sum_q}, kl};
    }

    State state(const ExponentialPass& pass, const ExponentialPass::Result& sums) {
        return state(pass.base, sums);
    }

    // Returns the look for blocks of this divergence, if all tokens move alike.
    static Look look_for(double divergence) {
        if (divergence >= kExponentialsFrom) return Look::exponentials;
        return divergence >= kWideFrom ? Look::wide : Look::near;
    }

    // Returns the look to use after one that found `n_far` tokens beyond its reach.
    Look next_look(double divergence, int64_t n_far) const {
        if (*next_ == Look::near)
            return n_far * kTokensPerNear < block_->n ? Look::near : Look::wide;
        if (n_far * kTokensPerWide < block_->n) return Look::wide;
        return divergence < kExponentialsFrom ? Look::far : Look::exponentials;
    }

    float base() const { return block_->max - float(guess_); }

    State state(float base, ExponentialPass::Result sums) {
        const Mass p{block_->max, block_->sum};
        sums = finite_or_masked(base, sums);
        if (!(sums.y >= kLeastSum && sums.y <= kLargestSum)) {
            base = float(finite_or_zero(maximum(circuit_.q, block_->n)));
            sums = finite_or_masked(base, exponentials(base));
        }
        const Mass q{base, sums.undefined ? __builtin_nan("") : sums.y};
        if (sums.undefined || block_->sum == 0) return {p, q, 0.0};
        if (sums.infinite) return {p, q, double(__builtin_inff())};
        if (!__builtin_isfinite(sums.s)) sums.s = wide_sum(base);

        const double x = without_rounding(::log(block_->sum / sums.y));
        const double plain = sums.s / block_->sum - x;
        *next_ = look_for(plain);
        // A base far from the circuit's log-sum-exp costs digits.
        if (plain >= kAccurateBelow * (__builtin_fabs(x) > 1 ? __builtin_fabs(x) : 1)) {
            return {p, q, plain};
        }
        return {p, q, at_pivot((double(block_->max) - base) + x, plain)};
    }

    // Returns Σ w d of finite logits in float64, for sums beyond float32's range.
    double wide_sum(float base) const {
        double s = 0.0;
        const auto group = [&](int64_t i, const T* from) {
            for (int u = 0; u < U; ++u, i += W) {
                const vf q = load(from + u * W), a = load(block_->a + i), w = load(block_->w + i);
                for (int j = 0; j < W; ++j)
                    if (w[j] > 0) s += w[j] * (a[j] - (double(q[j]) - base));
            }
        };
        for_groups(circuit_.q, block_->n, group, [] {});
        return s;
    }

    template <class L> float sample(const L* row) const {
        return maximum(row, block_->n < kSample ? block_->n : kSample);
    }

    // Improves the guess by look 1 at the block's first chunk, and predicts the next look from its
    // divergence. Returns whether this succeeded.
    bool guess_from_first_chunk() {
        Block chunk = *block_;
        chunk.n = kChunk;
        const ExponentialPass::Result sums = look_alone<false>(chunk, ExponentialPass{base()});
        // These tokens are so far below the others that their weights may be cut off to 0 below
        // different logits on each side: then even identical rows would seem to differ.
        if (!(block_->first >= kLeastSum)) return false;
        const double x = without_rounding(::log(block_->first / sums.y));
        if (masked_ || !__builtin_isfinite(x) || !__builtin_isfinite(sums.s)) return false;
        const double plain = sums.s / block_->first - x;
        *next_ = look_for(plain);
        guess_ = (double(block_->max) - base()) + x;
        return true;
    }

    template <bool MASKED, class Pass>
    typename Pass::Result look_alone(const Block& block, const Pass& pass) const {
        typename Pass::Result result;
        look<MASKED, 1>(block, &circuit_, &pass, &result);
        return result;
    }

    template <class Pass> typename Pass::Result look_alone(const Pass& pass) const {
        return masked_ ? look_alone<true>(*block_, pass) : look_alone<false>(*block_, pass);
    }

    ExponentialPass::Result exponentials(float base) const {
        return look_alone(ExponentialPass{base});
    }

    // Returns these sums, or, if they are not finite, the sums of a look that takes any logits.
    ExponentialPass::Result finite_or_masked(float base, const ExponentialPass::Result& sums) {
        if (masked_ || (__builtin_isfinite(sums.s) && __builtin_isfinite(sums.y))) return sums;
        masked_ = true;
        return exponentials(base);
    }

    // Returns the divergence at a pivot whose only error is its rounding to float32, which is corrected
    // for where it matters. If p - q - c is too inexact, or overflows for a token without mass, it
    // returns `known`, the plain result.
    double at_pivot(double pivot, double known) const {
        known = known > 0 ? known : 0;
        const DivergencePass pass(*block_, pivot, look_for(known));
        if (pass.c.lost) return known;
        const double accurate = look_alone(pass).h / block_->sum;
        if (!__builtin_isfinite(accurate)) return known;
        const double change = phi(pivot - pass.c.value());
        return change > accurate / 2 ? accurate : accurate - change;
    }

    const Block* block_;
    Circuit<T, Ahead> circuit_;
    double guess_;
    Look* next_;
    bool masked_;
};

// Looks at the first G of n circuits together, after halving G until n >= G. Returns how many that is.
template <int G, class Block>
int64_t look_together(Look first, int64_t n, Block* blocks, State* states) {
    if constexpr (G > 1)
        if (n < G) return look_together<G / 2>(first, n, blocks, states);
    Block::template look_together<G>(first, blocks, states);
    return G;
}

// Sets the states of a block for circuit k and the circuits after it that are looked at together with
// it. `so_far` holds all circuits' states of the previous blocks, and `taken_p` is what
// divide_by_temperature() subtracted from the reference's block. Returns the number of these circuits.
template <class T, bool DIVIDE>
int64_t look_from(const Problem& problem, int64_t row, int64_t start, const Block& block,
                  double taken_p, int64_t k, const State* so_far, Look* looks, Scratch& scratch,
                  State* states) {
    using L = std::conditional_t<DIVIDE, float, T>;
    using CircuitBlock = CircuitBlock<L, T>;
    CircuitBlock blocks[kTogether];
    double taken[kTogether] = {};
    Look first = Look::alone;
    int64_t n = 0;
    for (; n < kTogether && k + n < problem.n_circuits; ++n) {
        const Matrix& circuit = problem.circuits[k + n];
        if (circuit.dtype != problem.circuits[k].dtype) break;
        const T* logits = reinterpret_cast<const T*>(address(circuit, row, start));
        // Meanwhile, prefetch the circuit that is kTogether further on, perhaps in the next block. With
        // a single circuit, its first half was prefetched while the reference was read; prefetch the
        // second half now.
        const int64_t after = k + n + kTogether;
        const bool single = !DIVIDE && problem.n_circuits == 1;
        const T* ahead = reinterpret_cast<const T*>(
            address(problem.circuits[after % problem.n_circuits], row,
                    after < problem.n_circuits ? start
                                               : start + (single ? block.n / 2 : block.n)));
        double guess = log_ratio(so_far[k + n].p, so_far[k + n].q);
        Circuit<L, T> q;
        if constexpr (DIVIDE) {
            // A circuit that needs another look is left for later: its logits are not divided yet.
            if (n > 0 && __builtin_isfinite(guess) && !shared(looks[k + n], first))
                break;
            float* divided = scratch.divided[n];
            taken[n] = divide_by_temperature(logits, block.n, problem.temperature, divided);
            guess -= taken_p - taken[n];
            q = {divided, ahead, single};
        } else {
            q = {logits, ahead, single};
        }
        blocks[n] = CircuitBlock(block, q, guess, looks[k + n]);
        const Look look = blocks[n].first_look();
        if (n == 0) first = look;
        if (first == Look::alone || !shared(look, first)) break;
    }
    int64_t count = 1;
    if (first == Look::alone) {
        states[0] = blocks[0].state();
    } else {
        count = look_together<kTogether>(first, n, blocks, states);
    }
    if constexpr (DIVIDE) {
        for (int64_t i = 0; i < count; ++i) {
            states[i].p.max += taken_p;
            states[i].q.max += taken[i];
        }
    }
    return count;
}

// Reads a block of the reference, given the mass of the previous blocks. Sets `taken` to what was
// subtracted from the block's logits.
template <bool DIVIDE, class T>
Block read_reference_block(const T* p, int64_t n, double temperature, const Mass& so_far,
                           const Next& next, Scratch& scratch, double& taken) {
    if constexpr (DIVIDE) {
        float* divided = scratch.divided[0];
        taken = divide_by_temperature(p, n, temperature, divided);
        // The largest logit is now 0, or it is not finite.
        return read_reference(divided, n, 0.0f, next, scratch);
    } else {
        taken = 0;
        const float guess =
            so_far.sum > 0 ? float(so_far.max) : maximum(p, n < kSample ? n : kSample);
        return read_reference(p, n, float(finite_or_zero(guess)), next, scratch);
    }
}

template <bool DIVIDE>
bool slice_at(const Problem& problem, int64_t row, int64_t begin, int64_t end, State* states,
              Look* looks, Scratch& scratch, const Poll& poll) {
    const FlushSubnormals flush;
    const Mass nothing{-double(__builtin_inff()), 0.0};
    for (int64_t k = 0; k < problem.n_circuits; ++k) {
        states[k] = {nothing, nothing, 0.0};
        looks[k] = Look::exponentials;
    }
    Mass reference = nothing;
    const int64_t n_cols = end - begin, first = n_cols > kBlock ? kFirstBlock : n_cols;
    const int64_t length = n_cols > first ? piece_length(n_cols - first, kBlock) : 0;
    for (int64_t start = begin, n = first; start < end;
         start += n, n = end - start < length ? end - start : length) {
        if (!poll.keep_going(poll.context)) return false;
        double taken;
        const Matrix& circuit = *problem.circuits;
        const Next next{address(circuit, row, start), size_of(circuit.dtype)};
        const char* at = address(problem.reference, row, start);
        const Block block = with_dtype(problem.reference.dtype, at, [&](auto p) {
            return read_reference_block<DIVIDE>(p, n, problem.temperature, reference, next, scratch,
                                                taken);
        });
        const Shares share = shares(reference, {block.max + taken, block.sum});
        for (int64_t k = 0; k < problem.n_circuits;) {
            State of_block[kTogether];
            const int64_t count =
                with_dtype(problem.circuits[k].dtype, nullptr, [&](auto logits) {
                    using T = std::remove_const_t<std::remove_pointer_t<decltype(logits)>>;
                    return look_from<T, DIVIDE>(problem, row, start, block, taken, k, states, looks,
                                                scratch, of_block);
                });
            for (int64_t i = 0; i < count; ++i, ++k)
                states[k] = merge(share, states[k], of_block[i]);
        }
        reference = share.total;
    }
    return true;
}

bool slice(const Problem& problem, int64_t row, int64_t begin, int64_t end, State* states,
           Look* looks, Scratch& scratch, const Poll& poll) {
    const auto measure = problem.temperature == 1 ? slice_at<false> : slice_at<true>;
    return measure(problem, row, begin, end, states, looks, scratch, poll);
}

}  // namespace
}  // namespace fastkl
