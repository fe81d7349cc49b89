// Row states in float64: how two merge, and how the last one becomes a divergence.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kl.hpp"

namespace fastkl {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

double log_add_exp(double a, double b) {
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<double>::quiet_NaN();
    const double high = std::max(a, b);
    const double low = std::min(a, b);
    if (low == -kInf) return high;
    return high + std::log1p(std::exp(low - high));
}

}  // namespace

Shares shares(double first_lse_p, double second_lse_p) {
    const double total = log_add_exp(first_lse_p, second_lse_p);
    const double log_first = total == -kInf ? -kInf : first_lse_p - total;
    const double log_second = total == -kInf ? -kInf : second_lse_p - total;
    return {total, log_first, log_second, std::exp(log_first), std::exp(log_second)};
}

State merge(const Shares& share, const State& first, const State& second) {
    const bool first_empty = first.lse_p == -kInf;
    const bool second_empty = second.lse_p == -kInf;
    if (first_empty || second_empty || first.kl == kInf || second.kl == kInf ||
        std::isnan(share.total) || std::isnan(first.lse_q) || std::isnan(second.lse_q)) {
        const double lse_q = log_add_exp(first.lse_q, second.lse_q);
        if (first.kl == kInf || second.kl == kInf) return {share.total, lse_q, kInf};
        if (first_empty && second_empty) return {share.total, lse_q, 0.0};
        // All of the reference's mass is in one piece; the circuit's mass in the other one is
        // missing there: log(1 / share of the circuit's mass) >= 0.
        const State& full = first_empty ? second : first;
        return {share.total, lse_q, full.kl + (lse_q == full.lse_q ? 0.0 : lse_q - full.lse_q)};
    }

    // With b the smaller of the shares, D the difference of lse_p - lse_q, smaller minus larger:
    //     log_ratio = log(1 - b + b e^(-D))        between = b D + log_ratio >= 0
    const double c_first = first.lse_p - first.lse_q;
    const double c_second = second.lse_p - second.lse_q;
    const bool swap = share.second > share.first;
    const double b = swap ? share.first : share.second;
    const State& large = swap ? second : first;
    const State& small = swap ? first : second;
    const double c_large = swap ? c_second : c_first;
    const double difference = swap ? c_first - c_second : c_second - c_first;

    // log(b e^(-D)), by terms that are no larger than it where the reference's mass is far away.
    const double log_scaled =
        (small.lse_q - large.lse_q) + (swap ? share.log_second : share.log_first);
    double log_ratio;
    if (log_scaled > 0) {
        log_ratio = log_scaled + std::log1p((1 - b) * std::exp(-log_scaled));
    } else if (difference > -1) {
        log_ratio = std::log1p(b * std::expm1(-difference));
    } else {
        log_ratio = std::log1p(std::exp(log_scaled) - b);
    }
    double between;
    if (std::fabs(difference) < 1e-2) {
        // The cumulants of a coin, since log_ratio and b D cancel; the next term is below 2e-8.
        const double variance = b * (1 - b);
        between = variance * difference * difference / 2 *
                  (1 - difference / 3 * ((1 - 2 * b) - difference / 4 * (1 - 6 * variance)));
    } else {
        between = log_ratio + b * difference;
    }
    const double inside = share.first * first.kl + share.second * second.kl;
    return {share.total, share.total - (c_large - log_ratio), inside + between};
}

double finalize(const State& state) {
    const bool defined = std::isfinite(state.lse_p) && std::isfinite(state.lse_q);
    return defined ? state.kl : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace fastkl
