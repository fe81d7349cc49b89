// A slice of one row, for all circuits: the code of one instruction-set level.
//
// The file that includes it is compiled with the level's flags and has named the level: LEVEL_NAME
// and LEVEL_SUPPORTED. Everything but the level's table has internal linkage.
#include <cmath>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kl.hpp"

namespace fastkl {
namespace {

template <bool VALUE> struct Flag {
    constexpr operator bool() const { return VALUE; }
};

#include "simd.hpp"
#include "functions.hpp"
#include "looks.hpp"

// A block's plain result is used from here on: 1e-7 of error is 1e-6 of 0.1.
constexpr double kAccurateBelow = 0.1;
// Sums of exponentials outside this range were taken at a base too far from the maximum.
constexpr double kLeastSum = 1e-12;
constexpr double kLargestSum = 1e30;
// Rows this far apart are asked for the circuit's mass by its exponentials: p - q has lost too many of
// q's digits.
constexpr double kFarApart = 32.0;
// How many tokens are asked for a first guess of lse_p - lse_q.
constexpr int64_t kSample = 256;

inline double phi(double x) {
    return __builtin_fabs(x) < 1e-2 ? x * x * (1.0 / 2 - x * (1.0 / 6 - x / 24)) : ::expm1(-x) + x;
}

inline double finite_or_zero(double x) { return __builtin_isfinite(x) ? x : 0.0; }

// A circuit's block. `guess` of lse_p - lse_q is NaN where there is none; `small` says whether the
// last block's divergence was, and so which look is likely to be enough.
template <class T> class CircuitBlock {
  public:
    CircuitBlock(const Block& block, const T* q, const char* ahead)
        : block_(block), q_(q), ahead_(ahead), masked_(block.masked) {}

    State state(double guess, uint8_t& small) {
        const Mass p{block_.max, block_.sum};
        if (__builtin_isnan(block_.sum)) return {p, p, 0.0};
        bool guessed = __builtin_isfinite(guess);
        if (!guessed) {
            guess = finite_or_zero(sample(block_.p) - sample(q_));
            guessed = block_.n >= 4 * kChunk && from_first_chunk(guess, small);
        }
        if (guessed && small && !masked_ && __builtin_fabs(guess) < kFarApart) {
            State result;
            if (from_divergence(float(guess), result)) {
                small = result.kl < kAccurateBelow;
                return result;
            }
        }

        float base = block_.max - float(guess);
        Exponentials sums = exponentials(base);
        if (!masked_ && !(__builtin_isfinite(sums.s) && __builtin_isfinite(sums.y))) {
            masked_ = true;
            sums = exponentials(base);
        }
        if (!(sums.y >= kLeastSum && sums.y <= kLargestSum)) {
            base = float(finite_or_zero(maximum(q_, block_.n)));
            sums = exponentials(base);
        }
        const Mass q{base, sums.undefined ? __builtin_nan("") : sums.y};
        if (sums.undefined || block_.sum == 0) return {p, q, 0.0};
        if (sums.infinite || !__builtin_isfinite(sums.s)) return {p, q, double(__builtin_inff())};

        // 0 for identical rows, whose sums are taken alike.
        const double x = ::log(block_.sum / sums.y);
        const double plain = sums.s / block_.sum - x;
        small = !(plain >= kAccurateBelow);
        // A base far from the circuit's log-sum-exp costs digits.
        if (plain >= kAccurateBelow * (__builtin_fabs(x) > 1 ? __builtin_fabs(x) : 1)) {
            return {p, q, plain};
        }
        return {p, q, at_pivot((double(block_.max) - base) + x)};
    }

  private:
    template <class L> float sample(const L* row) const {
        return maximum(row, block_.n < kSample ? block_.n : kSample);
    }

    // A better guess, and whether the divergence is small, by look 1 at a part of the block.
    bool from_first_chunk(double& guess, uint8_t& small) const {
        Block chunk = block_;
        chunk.n = kChunk;
        const float base = block_.max - float(guess);
        const Exponentials sums = sum_exponentials<T, false>(chunk, q_, base, ahead_);
        const double x = ::log(block_.first / sums.y);
        if (masked_ || !__builtin_isfinite(x) || !__builtin_isfinite(sums.s)) return false;
        guess = (double(block_.max) - base) + x;
        small = sums.s / block_.first - x < kAccurateBelow;
        return true;
    }

    Exponentials exponentials(float base) const {
        return masked_ ? sum_exponentials<T, true>(block_, q_, base, ahead_)
                       : sum_exponentials<T, false>(block_, q_, base, ahead_);
    }

    Divergence divergence(float c) const {
        const float base = block_.max - c;
        return masked_ ? sum_divergence<T, true>(block_, q_, base, c, ahead_)
                       : sum_divergence<T, false>(block_, q_, base, c, ahead_);
    }

    // Without exponentials where all tokens are near: Σ w e^(-d) = Σ w - Σ w d + Σ w φ(d).
    bool from_divergence(float c, State& result) const {
        const Divergence sums = divergence(c);
        if (!__builtin_isfinite(sums.s) || !__builtin_isfinite(sums.h)) return false;
        const double ratio = 1 + (sums.h - sums.s) / block_.sum;
        if (!(ratio > 0.4 && ratio < 2.5)) return false;
        const double x = -::log1p((sums.h - sums.s) / block_.sum);
        const double accurate = sums.h / block_.sum;
        const double change = phi(x);
        // Half of it may cancel; more, and the block is looked at again, from a better pivot.
        result = {{block_.max, block_.sum},
                  {block_.max, block_.sum * ratio * ::exp(-double(c))},
                  change > accurate / 2 ? at_pivot(c + x) : accurate - change};
        return true;
    }

    // The divergence at a pivot that is exact but for its rounding to float32, which is taken out
    // where it shows.
    double at_pivot(double pivot) const {
        const float c = float(pivot);
        const double accurate = divergence(c).h / block_.sum;
        const double change = phi(pivot - c);
        return change > accurate / 2 ? accurate : accurate - change;
    }

    const Block& block_;
    const T* q_;
    const char* ahead_;
    bool masked_;
};

inline const char* address(const Matrix& matrix, int64_t row, int64_t column) {
    const int64_t size = matrix.dtype == Dtype::float32 ? 4 : 2;
    return static_cast<const char*>(matrix.data) + (row * matrix.row_stride + column) * size;
}

template <class Function> auto with_dtype(Dtype dtype, const char* row, Function function) {
    switch (dtype) {
        case Dtype::bfloat16: return function(reinterpret_cast<const BFloat16*>(row));
        case Dtype::float16: return function(reinterpret_cast<const Float16*>(row));
        default: return function(reinterpret_cast<const float*>(row));
    }
}

bool slice(const Problem& problem, int64_t row, int64_t begin, int64_t end, State* states,
           uint8_t* small, Scratch& scratch, const Poll& poll) {
    const FlushSubnormals flush;
    const Mass nothing{-double(__builtin_inff()), 0.0};
    for (int64_t k = 0; k < problem.n_circuits; ++k) {
        states[k] = {nothing, nothing, 0.0};
        small[k] = 0;
    }
    Mass reference = nothing;
    const int64_t length = piece_length(end - begin, kBlock);
    for (int64_t start = begin; start < end; start += length) {
        if (!poll.keep_going(poll.context)) return false;
        const int64_t n = end - start < length ? end - start : length;
        const Block block =
            with_dtype(problem.reference.dtype, address(problem.reference, row, start),
                       [&](auto p) { return read_reference(p, n, scratch); });
        const Shares share = shares(reference, {block.max, block.sum});
        for (int64_t k = 0; k < problem.n_circuits; ++k) {
            const Matrix& circuit = problem.circuits[k];
            const char* q = address(circuit, row, start);
            const char* ahead = k + 1 < problem.n_circuits
                                    ? address(problem.circuits[k + 1], row, start)
                                    : q + n * (circuit.dtype == Dtype::float32 ? 4 : 2);
            const double guess = log_ratio(states[k].p, states[k].q);
            const State state = with_dtype(circuit.dtype, q, [&](auto logits) {
                return CircuitBlock(block, logits, ahead).state(guess, small[k]);
            });
            states[k] = merge(share, states[k], state);
        }
        reference = share.total;
    }
    return true;
}

#include "rows.hpp"
#include "gradient.hpp"
#include "jensen_shannon.hpp"

void exponential_of(const float* x, float* y, int64_t n) {
    for (int64_t i = 0; i + W <= n; i += W) store(y + i, exponential<true>(load(x + i)));
}

void logarithm_of(const float* x, const float* rest, float* y, int64_t n) {
    for (int64_t i = 0; i + W <= n; i += W) store(y + i, logarithm(load(x + i), load(rest + i)));
}

bool supported() { return LEVEL_SUPPORTED; }

}  // namespace

extern const Level LEVEL_TABLE;
const Level LEVEL_TABLE = {LEVEL_NAME,     supported,  slice,
                           gradient,       js,         js_gradient,
                           exponential_of, logarithm_of};

}  // namespace fastkl
