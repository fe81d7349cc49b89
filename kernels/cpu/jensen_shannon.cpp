// The Jensen-Shannon divergence: a mixture's polynomials, and the distribution of rows over threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kl.hpp"
#include "threads.hpp"

namespace fastkl {
namespace {

// Starting a thread takes about as long as the terms of this many tokens.
constexpr int64_t kPairsPerThread = 1 << 15;
// The log-ratio up to which the polynomials are used, kNear of functions.hpp.
constexpr double kNear = 0.5;

// Sets the coefficients of the polynomial that interpolates f at the Chebyshev points of
// [-kNear, kNear]. f is analytic within π of 0, so that eight terms are off by 6e-10.
template <class Function> void interpolate(float (&coefficients)[Mixture::kTerms], Function f) {
    constexpr int n = Mixture::kTerms;
    double x[n], divided[n], sum[n] = {};
    for (int i = 0; i < n; ++i) {
        x[i] = kNear * std::cos(3.14159265358979324 * (i + 0.5) / n);
        divided[i] = f(x[i]);
    }
    for (int order = 1; order < n; ++order)
        for (int i = n - 1; i >= order; --i)
            divided[i] = (divided[i] - divided[i - 1]) / (x[i] - x[i - order]);
    // Expand Newton's form from the inside out.
    for (int i = n - 1; i >= 0; --i) {
        for (int k = n - 1; k > 0; --k) sum[k] = sum[k - 1] - x[i] * sum[k];
        sum[0] = divided[i] - x[i] * sum[0];
    }
    std::copy_n(sum, n, coefficients);
}

int64_t threads_for(const JsProblem& problem, int n_threads) {
    return useful_threads(problem.n_rows, problem.n_rows * problem.n_cols, kPairsPerThread,
                          n_threads);
}

}  // namespace

Mixture::Mixture(double lighter) {
    // The inverse of the lighter weight must also be representable in float32.
    const double l = std::max(lighter, 1e-30), h = 1 - l;
    heavy = float(h);
    light = float(l);
    log_heavy = float(std::log1p(-l));
    log_light = float(std::log(l));
    light_over_heavy = float(l / h);
    heavy_over_light = float(h / l);
    even = float(std::log(l / h));
    interpolate(divergence, [l](double d) {
        const double e = std::exp(-d), y = l * std::expm1(-d);
        return ((y - (1 + y) * std::log1p(y)) + l * (1 - e - e * d)) / (d * d);
    });
    interpolate(share, [l](double d) { return -std::log1p(l * std::expm1(-d)) / d; });
}

bool run(const Level& level, const JsProblem& problem, float* js, int n_threads,
         const Poll& keep_going) {
    if (problem.n_rows <= 0 || problem.n_cols <= 0) return true;
    const int64_t n = threads_for(problem, n_threads);
    const auto scratch = scratch_for(n);
    const auto work = [&](int64_t row, int64_t i, const Poll& poll) {
        if (!poll.keep_going(poll.context)) return false;
        js[row] = level.js(problem, row, *scratch[i]);
        return true;
    };
    return run_tasks(problem.n_rows, n, n_threads, keep_going, work);
}

bool run(const Level& level, const JsProblem& problem, const JsGradients& gradients, int n_threads,
         const Poll& keep_going) {
    if (problem.n_rows <= 0 || problem.n_cols <= 0) return true;
    const int64_t n = threads_for(problem, n_threads);
    const auto scratch = scratch_for(n);
    const bool wanted[2] = {gradients.sides[0].data != nullptr, gradients.sides[1].data != nullptr};
    std::vector<RowBuffers> buffers;
    for (int64_t i = 0; i < n; ++i)
        buffers.emplace_back(problem.n_cols, 2 * (int(wanted[0]) + int(wanted[1])));
    const auto work = [&](int64_t row, int64_t i, const Poll& poll) {
        if (!poll.keep_going(poll.context)) return false;
        const RowBuffers& buffer = buffers[i];
        const int second = wanted[0] ? 2 : 0;
        const JsRoom room[2] = {
            wanted[0] ? JsRoom{buffer[0], buffer[1]} : JsRoom{nullptr, nullptr},
            wanted[1] ? JsRoom{buffer[second], buffer[second + 1]} : JsRoom{nullptr, nullptr}};
        level.js_gradient(problem, gradients, row, *scratch[i], room);
        return true;
    };
    return run_tasks(problem.n_rows, n, n_threads, keep_going, work);
}

}  // namespace fastkl
