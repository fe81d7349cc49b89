// Row states in float64: how two are merged, and how the last one becomes a divergence. Also the inverse
// temperature.
#include <cmath>
#include <limits>

#include "kl.hpp"

namespace fastkl {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Returns the divergence of two coins. The first shows its rarer side with probability b, and the second
// shows that side with probability b e^(-difference) / scale, where scale = 1 - b + b e^(-difference).
// `log_scaled` is log(b e^(-difference)).
double coin_divergence(double b, double difference, double log_scaled) {
    if (std::fabs(difference) < 1e-2) {
        // Sum the cumulants, since log(scale) and b difference cancel; the next term is below 2e-8.
        const double variance = b * (1 - b);
        return variance * difference * difference / 2 *
               (1 - difference / 3 * ((1 - 2 * b) - difference / 4 * (1 - 6 * variance)));
    }
    double log_scale;
    if (log_scaled > 0) {
        log_scale = log_scaled + std::log1p((1 - b) * std::exp(-log_scaled));
    } else if (difference > -1) {
        log_scale = std::log1p(b * std::expm1(-difference));
    } else {
        log_scale = std::log1p(std::exp(log_scaled) - b);
    }
    return b * difference + log_scale;
}

}  // namespace

float inverse_of(double temperature) {
    using limits = std::numeric_limits<float>;
    return float(std::fmin(std::fmax(1 / temperature, limits::min()), limits::max()));
}

Shares shares(const Mass& first, const Mass& second) {
    // A NaN sum fails both comparisons, and propagates through the total.
    if (first.sum == 0) return {second, 0.0, second.sum == 0 ? 0.0 : 1.0, -kInf, 0.0};
    if (second.sum == 0) return {first, 1.0, 0.0, 0.0, -kInf};
    const double max = first.max > second.max ? first.max : second.max;
    const double first_sum = first.sum * std::exp(first.max - max);
    const double second_sum = second.sum * std::exp(second.max - max);
    const double sum = first_sum + second_sum;
    return {{max, sum},
            first_sum / sum,
            second_sum / sum,
            first.max - max + std::log(first.sum / sum),
            second.max - max + std::log(second.sum / sum)};
}

double log_ratio(const Mass& p, const Mass& q) {
    return without_rounding((p.max - q.max) + std::log(p.sum / q.sum));
}

State merge(const Shares& reference, const State& first, const State& second) {
    State merged{reference.total, {}, 0.0};
    if (first.q.sum == 0) {
        merged.q = second.q;
    } else if (second.q.sum == 0) {
        merged.q = first.q;
    } else {
        const double max = first.q.max > second.q.max ? first.q.max : second.q.max;
        merged.q = {max, first.q.sum * std::exp(first.q.max - max) +
                             second.q.sum * std::exp(second.q.max - max)};
    }
    if (first.kl == kInf || second.kl == kInf) {
        merged.kl = kInf;
    } else if (first.p.sum == 0 || second.p.sum == 0) {
        // The reference's mass, if any, is in one piece, `full`. The circuit's mass in the other piece
        // is missing from `full`.
        const State& full = first.p.sum == 0 ? second : first;
        const State& rest = first.p.sum == 0 ? first : second;
        merged.kl = full.kl;
        if (full.p.sum != 0 && rest.q.sum != 0) {
            const double more = log_ratio(rest.q, full.q);
            merged.kl += std::fmax(more, 0.0) + std::log1p(std::exp(-std::fabs(more)));
        }
    } else {
        const bool swap = reference.second > reference.first;
        const State& rare = swap ? first : second;
        const State& common = swap ? second : first;
        // Subtract within the same row first, since the two rows may be far apart.
        const double difference = without_rounding(
            ((rare.p.max - common.p.max) - (rare.q.max - common.q.max)) +
            std::log((rare.p.sum / rare.q.sum) / (common.p.sum / common.q.sum)));
        const double log_scaled =
            difference > -0.5 ? -kInf
                              : log_ratio(rare.q, common.q) +
                                    (swap ? reference.log_second : reference.log_first);
        merged.kl = reference.first * first.kl + reference.second * second.kl +
                    coin_divergence(swap ? reference.first : reference.second, difference,
                                    log_scaled);
    }
    return merged;
}

double finalize(const State& state) {
    const bool defined = state.p.sum > 0 && state.q.sum > 0;
    return defined ? state.kl : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace fastkl
