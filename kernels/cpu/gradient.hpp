// The gradients of a row's divergences. The algebra and the names are those of fastkl/gradient.py:
// t = e^(p - m_p) expm1(-d'), summed at the pivot of the row's state, and x, the pivot's error.
#pragma once

#include <cmath>
#include <cstdint>

#include "functions.hpp"
#include "groups.hpp"
#include "kl.hpp"
#include "matrix.hpp"
#include "pivot.hpp"
#include "rows.hpp"
#include "simd.hpp"

namespace fastkl {
namespace {

// What is subtracted from a row's logits, as its state says. Only differences of logits are divided by
// the temperature: m_p, m_q and the pivot are in the units of undivided logits.
struct Center {
    Center(const State& state, double temperature)
        : inverse(inverse_of(temperature)), m_p(float(state.p.max * temperature)),
          m_q(float(state.q.max * temperature)),
          more_p(float(above(m_p, temperature, state.p.max))),
          more_q(float(above(m_q, temperature, state.q.max) +
                       ::log(state.p.sum / state.q.sum))),
          c(state.p.max * temperature, log_ratio(state.p, state.q) * temperature), rest(0), kl(0),
          near(0), wide(false), often_far(true) {
        if (c.lost) {
            // No token counts as near, even if p - q - c is rounded to 0.
            c = Pivot(0, 0);
        } else {
            const double pivot = log_ratio(state.p, state.q);
            // The rounding error of `high` goes into `rest`.
            c.apart = c.apart || pivot * pivot > kApartFrom * state.kl;
            rest = float(pivot - (c.apart ? c.value() : 0.0) / temperature);
            kl = float(state.kl);
            wide = kFarFrom <= state.kl && state.kl < kOftenFarFrom;
            near = wide ? kWide * kWide : kNear * kNear;
            often_far = !(state.kl < kOftenFarFrom);
        }
        if (state.kl == double(__builtin_inff())) kl = __builtin_nanf("");
    }

    // Returns how far a logit divided by the temperature is above a state's maximum. Quotients and
    // products are rounded, by 1e22 for maxima of 1e38, so a difference of up to 4 ulps counts as none.
    static double above(double logit, double temperature, double max) {
        const double difference = logit / temperature - max;
        const bool rounded =
            temperature != 1 && __builtin_fabs(difference) <= 0x1p-51 * __builtin_fabs(max);
        return rounded ? 0.0 : difference;
    }

    // The pivot's square over KL from which on the sides count as apart. Such sides are 50 times as far
    // apart as tokens typically move (d² is about 2 KL), and p - q is rounded by 1e-6 of that move.
    static constexpr double kApartFrom = 5e3;
    // The KL from about which on so many tokens are beyond kNear, or beyond kWide, that a branch for
    // them costs more than it saves.
    static constexpr double kFarFrom = 0.01, kOftenFarFrom = 0.4;

    float inverse;
    float m_p, m_q;
    float more_p, more_q;  // e^((q - m_q) inverse + more_q) is in the scale of the reference's weights
    Pivot c;
    float rest;
    float kl;    // approximately the mean of d; NaN if that is infinite
    float near;  // the d² from which on a token is far
    bool wide;   // whether `near` is kWide²
    bool often_far;
};

struct Moments {
    Sum t, d;
};

// Returns d of the reference's likeliest token. It stands in for KL if the sides lie so far apart that d
// is rounded at the size of the divergence: at that token, at least, d - KL is then exactly 0.
template <class P, class Q>
float likeliest_ratio(const P* p, const Q* q, int64_t n, const Center& center) {
    const auto logit = [](const auto* row, int64_t i) { return load(Rest(row, i, i + 1).logits)[0]; };
    int64_t likeliest = 0;
    for (int64_t i = 1; i < n; ++i)
        if (logit(p, i) > logit(p, likeliest)) likeliest = i;
    return (logit(p, likeliest) - logit(q, likeliest)) * center.inverse - center.rest;
}

// Sets w = e^(p - m_p), t, and, if the reference's gradient is wanted, first = w (d - kl). A token that
// the circuit masks has 0 in all of them, and a token that the reference masks has 0 in `first`.
template <bool WIDE, class P, class Q>
Moments weigh_differences(const P* p, const Q* q, int64_t n, const Center& center,
                          const GradientRoom& room) {
    constexpr float inf = __builtin_inff();
    // A local copy whose address does not escape, so that the compiler keeps it in registers.
    Center of = center;
    if (of.near == 0 && room.first && !__builtin_isnan(of.kl)) of.kl = likeliest_ratio(p, q, n, of);
    float *const w_to = room.w, *const t_to = room.t, *const first_to = room.first;
    Moments sums;
    const auto group = [&](int64_t i, const P* from_p, const Q* from_q) INLINE_LAMBDA {
        vf d[U], w[U], t[U], largest_square = {};
        for (int u = 0; u < U; ++u) {
            const vf logit_p = load(from_p + u * W), logit_q = load(from_q + u * W);
            // Exact for similar logits. NaN if both are masked: such a token is not near and has no
            // weight.
            const vf difference =
                of.c.apart ? of.c.difference(logit_p, logit_q) : logit_p - logit_q;
            d[u] = fma(difference, splat(of.inverse), splat(-of.rest));
            w[u] = weight_of(fma(logit_p - of.m_p, splat(of.inverse), splat(of.more_p)));
            const vf square = d[u] * d[u];
            t[u] = w[u] * fma(square, phi_over_square<WIDE>(d[u], square), -d[u]);
            // With the comparison written this way, a NaN is far.
            largest_square = max(largest_square, square < of.near ? vf{} : splat(1.0f));
        }
        const bool far = of.often_far || any_at_least(largest_square, 1.0f);
        for (int u = 0; u < U; ++u) {
            vf first = w[u] * (d[u] - of.kl);
            if (far) {
                const vf logit_p = load(from_p + u * W), logit_q = load(from_q + u * W);
                const vf e =
                    weight_of(fma(logit_q - of.m_q, splat(of.inverse), splat(of.more_q)));
                t[u] = d[u] * d[u] < of.near ? t[u] : e - w[u];
                sums.t.part[u] += t[u];
                const vi no_q = logit_q == -inf;
                t[u] = no_q ? vf{} : t[u];
                // A token without mass has 0 here, or NaN if kl is NaN, but not 0 · inf.
                first = w[u] == 0.0f ? splat(of.kl * 0.0f) : first;
                first = (no_q | (logit_p == -inf)) ? vf{} : first;
                w[u] = no_q ? vf{} : w[u];
            } else {
                sums.t.part[u] += t[u];
            }
            store(w_to + i + u * W, w[u]);
            store(t_to + i + u * W, t[u]);
            if (first_to) {
                sums.d.part[u] += first;
                store(first_to + i + u * W, first);
            }
        }
    };
    const int64_t whole = for_whole_groups(
        n,
        [&](int64_t i) INLINE_LAMBDA {
            __builtin_prefetch(p + i + kAhead, 0, 3);
            __builtin_prefetch(q + i + kAhead, 0, 3);
            group(i, p + i, q + i);
        },
        [&]() INLINE_LAMBDA { sums.t.fold(), sums.d.fold(); });
    if (whole < n) {
        const Rest<P> rest_p(p, whole, n);
        const Rest<Q> rest_q(q, whole, n);
        group(whole, rest_p.logits, rest_q.logits);
        sums.t.fold(), sums.d.fold();
    }
    return sums;
}

// Writes one circuit's gradient of a row to `dq`, and adds its part of the reference's gradient to
// room.total. Either may be null. `scale` is the loss's gradient divided by z_p.
inline void gradient_of_circuit(const GradientRoom& room, int64_t padded, const Moments& sums,
                                double z_p, double scale, float* dq) {
    // The gradient of a token without mass on either side, such as a masked one. This avoids 0 · inf,
    // however large `scale` is.
    const vf none = splat(__builtin_isnan(scale) ? __builtin_nanf("") : 0.0f);
    if (dq) {
        const double x = -::log1p(sums.t.value() / z_p);
        const float of_t = float(scale * ::exp(x)), of_w = float(scale * ::expm1(x));
        for (int64_t j = 0; j < padded; j += W) {
            const vf t = load(room.t + j), w = load(room.w + j);
            const vf value = fma(t, splat(of_t), w * of_w);
            store(dq + j, ((t == 0.0f) & (w == 0.0f)) ? none : value);
        }
    }
    if (room.total) {
        // If the mean is not finite, the row's gradient is NaN, except at masked tokens.
        const double mean = sums.d.value() / z_p;
        const float of_d = float(scale);
        const float of_w = float(__builtin_isfinite(mean) ? -scale * mean : __builtin_nan(""));
        for (int64_t j = 0; j < padded; j += W) {
            const vf w = load(room.w + j), of_mean = w == 0.0f ? vf{} : w * of_w;
            const vf first = load(room.first + j), value = fma(first, splat(of_d), of_mean);
            const vf more = ((first == 0.0f) & (w == 0.0f)) ? none : value;
            store(room.total + j, load(room.total + j) + more);
        }
    }
}

bool gradient(const GradientProblem& problem, int64_t row, const GradientRoom& room,
              const Poll& poll) {
    const FlushSubnormals flush;
    const int64_t n = problem.n_cols, padded = (n + kGroup - 1) / kGroup * kGroup;
    const auto fill = [&](float* to, float value) {
        for (int64_t j = 0; j < padded; j += W) store(to + j, splat(value));
    };
    if (room.total) fill(room.total, 0.0f);
    for (int64_t k = 0; k < problem.n_circuits; ++k) {
        if (!poll.keep_going(poll.context)) return false;
        const bool wanted = problem.dqs[k].data != nullptr;
        if (!wanted && !room.total) continue;
        const double grad = problem.grad[k * problem.n_rows + row];
        const State& state = problem.states[k * problem.n_rows + row];
        if (grad == 0) {
            fill(room.t, 0.0f);
        } else if (!(state.p.sum > 0 && state.q.sum > 0)) {
            fill(room.t, __builtin_nanf(""));
            if (room.total) fill(room.total, __builtin_nanf(""));
        } else {
            const Center center(state, problem.temperature);
            const Moments sums = with_dtype(
                problem.reference.dtype, address(problem.reference, row, 0), [&](auto p) {
                    const Matrix& circuit = problem.circuits[k];
                    return with_dtype(circuit.dtype, address(circuit, row, 0), [&](auto q) {
                        return center.wide ? weigh_differences<true>(p, q, n, center, room)
                                           : weigh_differences<false>(p, q, n, center, room);
                    });
                });
            gradient_of_circuit(room, padded, sums, state.p.sum, grad / state.p.sum,
                                wanted ? room.t : nullptr);
        }
        if (wanted) write_row(problem.dqs[k], row, room.t, n);
    }
    if (room.total) write_row(problem.dp, row, room.total, n);
    return true;
}

}  // namespace
}  // namespace fastkl
