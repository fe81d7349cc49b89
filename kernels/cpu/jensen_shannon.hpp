// The Jensen-Shannon divergence of two rows, and its gradients. The algebra is that of
// fastkl/jensen_shannon.py, with other forms of its terms.
//
// In the mixture M = h H + l L, H is the side with the heavier weight h >= 1/2. A token's log-ratio is
// D = log H/L, and the token adds to the divergence
//
//     h H log H/M + l L log L/M = H g(D)        g(D) = -(x log x + l e^-D D)        x = h + l e^-D = M/H
//
// which is never negative, and of second order in D. For |D| < kNear, g(D) / D² is a polynomial, and so
// is log(H/M) / D, the heavier side's `share`; log L/M is smaller by D. Otherwise the same formula is
// applied to the side that has more of the mixture: call it A, the other side B, their weights a and b,
// and D = log A/B. Then b e^-D <= a, so that nothing overflows, and log x = log a + y, where
// y = log(1 + b e^-D / a) is accurate however small it is.
//
// A side's gradient is its mass times the difference between log A/M and the mean of log A/M. If A is
// nearly all of the mixture wherever A has mass, every log A/M is -log a - y with a tiny y. Then only -y
// is kept, without the -log a that all tokens share, so that the digits of y are not lost.
#pragma once

#include <cmath>
#include <cstdint>

#include "functions.hpp"
#include "groups.hpp"
#include "kl.hpp"
#include "rows.hpp"
#include "simd.hpp"
#include "summary.hpp"

namespace fastkl {
namespace {

// The difference of two sides' logits is rounded at the size of the distance between their maxima. If
// that distance is at least kApart, in undivided logits, or more than kTimesApart times what log-ratios
// differ by, each side's maximum is subtracted from its logits before they are subtracted from each
// other.
constexpr double kApart = 4.0, kTimesApart = 32.0;
// Log-ratios are clamped to this: less than e^-128 of the other side's mass is negligible.
constexpr float kLargestRatio = 128.0f;

// The summary of one side's row.
struct Side {
    Mass mass;           // of logits divided by the temperature
    float max;           // of undivided logits; 0 if all are -inf
    int64_t likeliest;   // the index of the largest logit
    bool defined;        // some mass, and no NaN or +inf
};

inline Side sum_up(const JsProblem& problem, int i, int64_t row, Scratch& scratch) {
    const float scale = problem.inverse_temperature;
    const Summary side = summary_of(problem.sides[i], row, problem.n_cols, scale, false, scratch);
    const float max = finite_base(float(side.max));
    return {{double(max) * scale, side.sum}, max, side.likeliest, side.sum > 0};
}

// Two rows, and the functions of vectors of their logits.
class Pair {
  public:
    Pair(const JsProblem& problem, const Side& heavy, const Side& light)
        : defined(heavy.defined && light.defined), mixture_(problem.mixture),
          scale_(problem.inverse_temperature), heavy_max_(heavy.max), light_max_(light.max) {
        const double offset = double(heavy.max) - double(light.max);
        // A lower bound for how much log-ratios differ, from the mass that each side has besides its
        // largest logit: it shows a difference even in rows of nearly one token. NaN if there is no such
        // mass.
        const double differ = __builtin_fabs(::log((heavy.mass.sum - 1) / (light.mass.sum - 1)));
        apart_ = __builtin_fabs(offset) >= kApart ||
                 !(__builtin_fabs(offset * scale_) <= kTimesApart * differ);
        // The difference of log-sum-exps is kept in two parts, and subtracting the first is exact.
        // Rounded to one number, it would be off by more than nearly identical rows differ.
        shift_ = float(apart_ ? 0.0 : offset);
        const double left = apart_ ? 0.0 : offset - shift_;
        rest_ = float(::log(heavy.mass.sum / light.mass.sum) + left * scale_);
    }

    // Returns D: 0 for identical rows, and kLargestRatio if neither side has the token.
    vf log_ratio(vf heavy, vf light) const {
        const vf difference = apart_ ? difference_of_apart(heavy, light) : (heavy - light) - shift_;
        // With the operands in this order, min() turns a NaN into kLargestRatio.
        return min(fma(difference, splat(scale_), splat(-rest_)), splat(kLargestRatio));
    }

    vf heavy_exponent(vf logit) const { return (logit - heavy_max_) * scale_; }
    vf light_exponent(vf logit) const { return (logit - light_max_) * scale_; }

    // The terms of tokens that are not near.
    struct Far {
        vi heavy;      // whether the heavier side has more of the mixture, and is A
        vf ratio;      // D, of A over B
        vf a, rest;    // M/A = a (1 + rest)
        vf log_a, y;   // log M/A = log_a + y
    };

    Far far(vf ratio) const {
        Far f;
        f.heavy = ratio >= mixture_.even;
        f.ratio = min(f.heavy ? ratio : -ratio, splat(kLargestRatio));
        const auto of_side = [&](float heavy, float light) {
            return f.heavy ? splat(heavy) : splat(light);
        };
        f.a = of_side(mixture_.heavy, mixture_.light);
        f.log_a = of_side(mixture_.log_heavy, mixture_.log_light);
        f.rest = of_side(mixture_.light_over_heavy, mixture_.heavy_over_light) *
                 exponential<true>(-f.ratio);
        f.y = logarithm(1.0f + f.rest, f.rest);
        return f;
    }

    vf far_divergence(const Far& f) const {
        return -f.a * fma(f.rest, f.ratio, fma(f.rest, f.log_a + f.y, f.log_a + f.y));
    }

    vf near_divergence(vf ratio) const { return ratio * ratio * series(mixture_.divergence, ratio); }

    // log H/M and log L/M; a side that is A and not near leaves out -log a.
    struct Shares {
        vf of[2];
        vi less[2];  // whether -log a was left out
    };

    Shares shares_of(vf ratio) const {
        const vf heavy = ratio * series(mixture_.share, ratio);
        const vf square = ratio * ratio;
        if (!any_at_least(square, kNear * kNear)) return {{heavy, heavy - ratio}, {vi{}, vi{}}};
        const Far f = far(ratio);
        const vi near = square < kNear * kNear;
        const vf of_b = -(f.log_a + f.y) - f.ratio;
        return {{near ? heavy : f.heavy ? -f.y : of_b, near ? heavy - ratio : f.heavy ? of_b : -f.y},
                {~near & f.heavy, ~near & ~f.heavy}};
    }

    float log_weight(int side) const { return side == 0 ? mixture_.log_heavy : mixture_.log_light; }

    const bool defined;

  private:
    // p - q with each side's maximum subtracted. That subtraction rounds, even for identical tokens,
    // and by more for logits on a finer grid: the rounding errors are added back.
    vf difference_of_apart(vf heavy, vf light) const {
        const vf d = (heavy - heavy_max_) - (light - light_max_);
        const vf off = rounded_off(heavy, heavy_max_) - rounded_off(light, light_max_);
        // An infinite difference has no rounding error to add back.
        return d + (d - d == 0.0f ? off : vf{});
    }

    // The rounding error of x - y: Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem B.
    static vf rounded_off(vf x, float y) {
        const vf d = x - y, back = d - x;
        return (x - (d - back)) - (y + back);
    }

    static vf series(const float (&coefficients)[Mixture::kTerms], vf x) {
        vf sum = splat(coefficients[Mixture::kTerms - 1]);
        for (int i = Mixture::kTerms - 2; i >= 0; --i) sum = fma(sum, x, splat(coefficients[i]));
        return sum;
    }

    const Mixture& mixture_;
    const float scale_, heavy_max_, light_max_;
    bool apart_;
    // The log-sum-exps differ by shift · scale + rest, or, if apart_, by rest plus the maxima's
    // distance · scale.
    float shift_, rest_;
};

// Adds the terms of a group of tokens, normalized by the sides' sums of masses.
struct JsTerms {
    const Pair& pair;
    float heavy_over, light_over;  // the inverses of the sides' sums
    Sum sum;

    void add(const float* heavy, const float* light) {
        vf ratio[U], largest_square = {};
        for (int u = 0; u < U; ++u) {
            ratio[u] = pair.log_ratio(load(heavy + u * W), load(light + u * W));
            largest_square = max(ratio[u] * ratio[u], largest_square);
        }
        const bool all_near = !any_at_least(largest_square, kNear * kNear);
        for (int u = 0; u < U; ++u) {
            vf exponent = pair.heavy_exponent(load(heavy + u * W));
            vf over = splat(heavy_over);
            vf term = pair.near_divergence(ratio[u]);
            if (!all_near) {
                const vi near = ratio[u] * ratio[u] < kNear * kNear;
                const Pair::Far f = pair.far(ratio[u]);
                const vi of_heavy = near | f.heavy;
                exponent = of_heavy ? exponent : pair.light_exponent(load(light + u * W));
                over = of_heavy ? over : splat(light_over);
                term = near ? term : pair.far_divergence(f);
            }
            sum.part[u] = fma(weight_of(exponent) * over, term, sum.part[u]);
        }
    }
};

float js(const JsProblem& problem, int64_t row, Scratch& scratch) {
    const FlushSubnormals flush;
    const Side heavy = sum_up(problem, 0, row, scratch), light = sum_up(problem, 1, row, scratch);
    const Pair pair(problem, heavy, light);
    if (!pair.defined) return __builtin_nanf("");
    JsTerms terms{pair, float(1 / heavy.mass.sum), float(1 / light.mass.sum), {}};
    for_blocks(problem.n_cols, [&](int64_t start, int64_t n) {
        bool ignored;
        read_block(problem.sides[0], row, start, n, scratch.p, ignored);
        read_block(problem.sides[1], row, start, n, scratch.a, ignored);
        for (int64_t i = 0; i < n; i += kGroup) {
            terms.add(scratch.p + i, scratch.a + i);
            if ((i + kGroup) % kChunk == 0) terms.sum.fold();
        }
        terms.sum.fold();
    });
    return float(terms.sum.value());
}

// Sets tokens' masses, and each mass times its token's worth, and sums the latter. A token's worth is
// its side's log H/M or log L/M, relative to that of one token of the side.
class JsWorths {
  public:
    JsWorths(const Pair& pair, const JsRoom (&room)[2]) : pair_(pair), room_(room) {}

    // Counts side i's worths from this token. If the side's likeliest token has nearly all mass, the
    // mean equals that token's worth except for the last few digits.
    void count_from(int i, vf heavy, vf light) {
        const Pair::Shares shares = pair_.shares_of(pair_.log_ratio(heavy, light));
        const float there = shares.of[i][0], log_weight = pair_.log_weight(i);
        less_[i] = shares.less[i][0] ? -there : -log_weight - there;
        whole_[i] = shares.less[i][0] ? log_weight - there : -there;
    }

    void add(const float* heavy, const float* light, int64_t at, int u) {
        const vf h = load(heavy), l = load(light);
        const Pair::Shares shares = pair_.shares_of(pair_.log_ratio(h, l));
        for (int i = 0; i < 2; ++i) {
            if (!room_[i].mass) continue;
            const vf mass = weight_of(i == 0 ? pair_.heavy_exponent(h) : pair_.light_exponent(l));
            const vf from = shares.less[i] ? splat(less_[i]) : splat(whole_[i]);
            const vf worth = mass * (shares.of[i] + from);
            store(room_[i].mass + at, mass);
            store(room_[i].worth + at, worth);
            sum_[i].part[u] += worth;
        }
    }

    void fold() {
        for (Sum& sum : sum_) sum.fold();
    }

    double sum(int i) const { return sum_[i].value(); }

  private:
    const Pair& pair_;
    const JsRoom (&room_)[2];
    float less_[2], whole_[2];  // added where -log a was left out, and elsewhere
    Sum sum_[2];
};

void js_gradient(const JsProblem& problem, const JsGradients& gradients, int64_t row,
                 Scratch& scratch, const JsRoom (&room)[2]) {
    const FlushSubnormals flush;
    const int64_t n_cols = problem.n_cols, padded = padded_to_groups(n_cols);
    const auto fill = [&](float value) {
        for (int i = 0; i < 2; ++i) {
            if (!room[i].mass) continue;
            for (int64_t j = 0; j < padded; j += W) store(room[i].worth + j, splat(value));
            write_row(gradients.sides[i], row, room[i].worth, n_cols);
        }
    };
    const double grad = gradients.grad[row];
    if (grad == 0) return fill(0.0f);
    const Side sides[2] = {sum_up(problem, 0, row, scratch), sum_up(problem, 1, row, scratch)};
    const Pair pair(problem, sides[0], sides[1]);
    if (!pair.defined || __builtin_isnan(grad)) return fill(__builtin_nanf(""));

    JsWorths worths(pair, room);
    for (int i = 0; i < 2; ++i) {
        float logits[2][kGroup];
        bool ignored;
        for (int j = 0; j < 2; ++j)
            read_block(problem.sides[j], row, sides[i].likeliest, 1, logits[j], ignored);
        worths.count_from(i, load(logits[0]), load(logits[1]));
    }
    for_blocks(n_cols, [&](int64_t start, int64_t n) {
        bool ignored;
        read_block(problem.sides[0], row, start, n, scratch.p, ignored);
        read_block(problem.sides[1], row, start, n, scratch.a, ignored);
        for (int64_t i = 0; i < n; i += kGroup) {
            for (int u = 0; u < U; ++u)
                worths.add(scratch.p + i + u * W, scratch.a + i + u * W, start + i + u * W, u);
            if ((i + kGroup) % kChunk == 0) worths.fold();
        }
        worths.fold();
    });

    const float weights[2] = {problem.mixture.heavy, problem.mixture.light};
    for (int i = 0; i < 2; ++i) {
        if (!room[i].mass) continue;
        const double sum = sides[i].mass.sum;
        const vf mean = splat(float(worths.sum(i) / sum));
        const vf scale = splat(float(grad * weights[i] / sum));
        for (int64_t j = 0; j < padded; j += W) {
            const vf mass = load(room[i].mass + j);
            const vf value = fma(-mass, mean, load(room[i].worth + j)) * scale;
            // A masked token's gradient is 0, however large `grad` is.
            store(room[i].worth + j, mass == 0.0f ? vf{} : value);
        }
        write_row(gradients.sides[i], row, room[i].worth, n_cols);
    }
}

}  // namespace
}  // namespace fastkl
