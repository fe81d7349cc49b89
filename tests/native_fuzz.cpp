// Feeds random rows to the native kernel, under sanitizers (see .ci/sanitize), and compares its results
// with float64.
//
//   native_fuzz [first seed] [number of seeds]
//
// Every matrix ends where its heap block ends, so that the sanitizers detect a read beyond its end.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../kernels/cpu/kl.hpp"

namespace {

using namespace fastkl;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// float16 as its bits, since not every compiler has the type.
uint16_t half_of(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return sign | 0x7e00;
    const float size = std::fabs(x);
    if (size >= 65520.0f) return sign | 0x7c00;
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    const int fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return static_cast<uint16_t>(sign + ((exponent + 14) << 10) + fraction);
}

float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    const float size = exponent == 31  ? std::numeric_limits<float>::infinity()
                       : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                       : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    if (exponent == 31 && fraction) return std::numeric_limits<float>::quiet_NaN();
    return bits & 0x8000 ? -size : size;
}

class Random {
  public:
    explicit Random(uint64_t seed) : engine_(seed) {}

    // Returns one of 0 to n - 1.
    int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine_); }
    bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
    double uniform(double low, double high) {
        return std::uniform_real_distribution<double>(low, high)(engine_);
    }
    double normal() { return normal_(engine_); }
    template <class T> T among(std::initializer_list<T> values) {
        return values.begin()[below(int64_t(values.size()))];
    }

  private:
    std::mt19937_64 engine_;
    std::normal_distribution<double> normal_;
};

// Rows of logits, both as the kernel gets them and as numbers.
class Rows {
  public:
    Rows(Random& random, Dtype dtype, int64_t n_rows, int64_t n_cols)
        : dtype_(dtype),
          stride_(random.chance(0.1) ? 0 : n_cols + random.below(random.chance(0.5) ? 1 : 9)),
          offset_(random.below(17)),
          n_cols_(n_cols) {
        const int64_t length = offset_ + (n_rows - 1) * stride_ + n_cols;
        data_.reset(std::malloc(length * size()));
        std::memset(data_.get(), 0xff, length * size());
    }

    Matrix matrix() const {
        return {static_cast<const char*>(data_.get()) + offset_ * size(), stride_, dtype_};
    }

    void set(int64_t row, int64_t column, double value) {
        const float number = static_cast<float>(value);
        char* to = address(row, column);
        if (dtype_ == Dtype::float32) {
            std::memcpy(to, &number, 4);
        } else if (dtype_ == Dtype::float16) {
            const uint16_t half = half_of(number);
            std::memcpy(to, &half, 2);
        } else {
            uint32_t bits;
            std::memcpy(&bits, &number, 4);
            if (!std::isnan(number)) bits += 0x7fff + (bits >> 16 & 1);
            const uint16_t half = static_cast<uint16_t>(bits >> 16);
            std::memcpy(to, &half, 2);
        }
    }

    double get(int64_t row, int64_t column) const {
        const char* from = const_cast<Rows*>(this)->address(row, column);
        float number;
        if (dtype_ == Dtype::float32) {
            std::memcpy(&number, from, 4);
        } else if (dtype_ == Dtype::float16) {
            uint16_t half;
            std::memcpy(&half, from, 2);
            number = from_half(half);
        } else {
            uint16_t half;
            std::memcpy(&half, from, 2);
            const uint32_t bits = uint32_t(half) << 16;
            std::memcpy(&number, &bits, 4);
        }
        return number;
    }

    std::vector<double> row(int64_t row) const {
        std::vector<double> result(n_cols_);
        for (int64_t i = 0; i < n_cols_; ++i) result[i] = get(row, i);
        return result;
    }

  private:
    struct Free {
        void operator()(void* data) const { std::free(data); }
    };

    int64_t size() const { return dtype_ == Dtype::float32 ? 4 : 2; }
    char* address(int64_t row, int64_t column) {
        return static_cast<char*>(data_.get()) + (offset_ + row * stride_ + column) * size();
    }

    Dtype dtype_;
    int64_t stride_, offset_, n_cols_;
    std::unique_ptr<void, Free> data_;
};

double log_sum_exp(const std::vector<double>& logits) {
    double max = -kInf;
    for (double logit : logits) {
        if (!(logit < kInf)) return kNan;
        max = std::fmax(max, logit);
    }
    if (max == -kInf) return kNan;
    double sum = 0;
    for (double logit : logits) sum += std::exp(logit - max);
    return max + std::log(sum);
}

struct Expected {
    double kl;
    double tolerance;
};

std::vector<double> divided(std::vector<double> logits, double temperature) {
    for (double& logit : logits) logit /= temperature;
    return logits;
}

// Returns Σ P φ(log P - log Q), φ(x) = e^(-x) - 1 + x, where a token with P = 0 adds Q. `depth` is for
// logits that were rounded at the size of their distance to the likeliest one: how far below it a token
// still counts.
Expected expect(const std::vector<double>& p, const std::vector<double>& q, double depth = 0) {
    const double lse_p = log_sum_exp(p), lse_q = log_sum_exp(q);
    if (std::isnan(lse_p) || std::isnan(lse_q)) return {kNan, 0};
    double kl = 0, span = 0;
    for (size_t i = 0; i < p.size(); ++i) {
        if (p[i] == -kInf) {
            kl += std::exp(q[i] - lse_q);
            continue;
        }
        if (q[i] == -kInf) return {kInf, 0};
        const double d = (p[i] - q[i]) - (lse_p - lse_q), weight = std::exp(p[i] - lse_p);
        if (weight == 0) {
            kl += std::exp(q[i] - lse_q);
        } else if (std::fabs(d) < 0.25) {
            double series = 0;
            for (int n = 14; n > 1; --n) series = (1 - d * series) / n;
            kl += weight * d * d * series;
        } else {
            kl += std::exp(q[i] - lse_q) + weight * (d - 1);
        }
        // The kernel does not bring sides less than 4 apart together first.
        span = std::fmax(span, std::fabs(d) + 4 + depth);
    }
    // Differences as large as `span` are rounded by up to 6e-8 of it. That moves the divergence by the
    // rounding error times Σ |Q - P| <= sqrt(2 KL) (Pinsker). The rest is the tolerance of all backends.
    return {kl, 1e-5 * kl + 1e-8 + std::sqrt(2 * kl) * 6e-8 * span};
}

[[noreturn]] void fail(uint64_t seed, const std::string& what) {
    std::fprintf(stderr, "seed %llu: %s\n", static_cast<unsigned long long>(seed), what.c_str());
    std::exit(1);
}

std::string number(double x) {
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", x);
    return text;
}

bool always(void*) { return true; }

bool countdown(void* left) { return (*static_cast<int*>(left))-- > 0; }

// A gradient as the kernel writes it: rows in a heap block of exactly their size.
class Written {
  public:
    Written(const Rows& like, int64_t n_rows, int64_t n_cols)
        : dtype_(like.matrix().dtype), n_cols_(n_cols) {
        const int64_t size = dtype_ == Dtype::float32 ? 4 : 2;
        data_.reset(new char[n_rows * n_cols * size]);
        std::memset(data_.get(), 0xff, n_rows * n_cols * size);
    }

    Matrix matrix() const { return {data_.get(), n_cols_, dtype_}; }

    double get(int64_t row, int64_t column) const {
        const int64_t i = row * n_cols_ + column;
        float number;
        if (dtype_ == Dtype::float32) {
            std::memcpy(&number, data_.get() + 4 * i, 4);
        } else if (dtype_ == Dtype::float16) {
            uint16_t half;
            std::memcpy(&half, data_.get() + 2 * i, 2);
            number = from_half(half);
        } else {
            uint16_t half;
            std::memcpy(&half, data_.get() + 2 * i, 2);
            const uint32_t bits = uint32_t(half) << 16;
            std::memcpy(&number, &bits, 4);
        }
        return number;
    }

    // Returns an ulp of x in the dtype (0 for float32), plus the size below which a number may count as
    // 0 on the way to it.
    double rounding(double x) const {
        if (dtype_ == Dtype::float32) return 2e-37;
        return dtype_ == Dtype::float16 ? std::fabs(x) * 0x1p-10 + 0x1p-24
                                        : std::fabs(x) * 0x1p-7 + 2e-37;
    }

  private:
    Dtype dtype_;
    int64_t n_cols_;
    std::unique_ptr<char[]> data_;
};

// Masses below float32's normal range, times a gradient of a loss, count as 0.
constexpr double kUnderflow = 1e-33;

// What one circuit's row adds to the gradients, and the tolerances of both.
struct ExpectedGradient {
    std::vector<double> dq, dp, dq_tolerance, dp_tolerance;
};

ExpectedGradient expect_gradient(const std::vector<double>& p, const std::vector<double>& q,
                                 double kl, double grad, double temperature) {
    const size_t n = p.size();
    ExpectedGradient result{std::vector<double>(n), std::vector<double>(n), std::vector<double>(n),
                            std::vector<double>(n)};
    if (grad == 0) return result;
    if (std::isnan(kl)) {
        result.dq.assign(n, kNan);
        result.dp.assign(n, kNan);
        return result;
    }
    // Keep the maximum and the sum apart, since a large maximum rounds the logarithm of the sum away.
    const double max_p = *std::max_element(p.begin(), p.end());
    const double max_q = *std::max_element(q.begin(), q.end());
    const auto below = [](std::vector<double> logits, double max) {
        for (double& logit : logits) logit -= max;
        return log_sum_exp(logits);
    };
    const double sum_p = below(p, max_p), sum_q = below(q, max_q);
    const auto log_p = [&](size_t i) { return (p[i] - max_p) - sum_p; };
    const auto log_q = [&](size_t i) { return (q[i] - max_q) - sum_q; };
    double span = 0, scatter = 0, overflow = 0;
    for (size_t i = 0; i < n; ++i) {
        if (p[i] == -kInf || q[i] == -kInf) continue;
        const double weight = std::exp(log_p(i));
        // A difference beyond float32's largest number: its products may be infinite or NaN.
        if (std::fabs(p[i] - q[i]) + std::fabs(max_p - max_q) > 1e38 / temperature) overflow = kInf;
        // The kernel does not bring sides less than 4 apart together first.
        if (weight > 1e-30) span = std::fmax(span, std::fabs(log_p(i) - log_q(i)) + 4);
        scatter += weight * std::fabs(log_p(i) - log_q(i));
    }
    for (size_t i = 0; i < n; ++i) {
        const double in_p = std::exp(log_p(i)), in_q = std::exp(log_q(i));
        // Differences are rounded by 6e-8 of their size, and sums of them by a few times that. Unlikely
        // tokens that are moved are rounded by as much of their distance to the likeliest token.
        const double rounded = 3e-7 * span + 2e-7 * std::fmin(max_p - p[i], 100);
        const double d = log_p(i) - log_q(i);
        if (q[i] != -kInf) {
            result.dq[i] = grad * (p[i] == -kInf ? in_q : std::fabs(d) < 1 ? in_p * std::expm1(-d)
                                                                           : in_q - in_p);
            result.dq_tolerance[i] =
                std::fabs(grad) * (in_p + in_q) * (rounded + 3e-6 * std::fmin(scatter, 1)) +
                1e-5 * std::fabs(result.dq[i]) + kUnderflow;
            if (p[i] != -kInf) {
                result.dp[i] = kl == kInf ? kNan : grad * in_p * (d - kl);
                result.dp_tolerance[i] =
                    std::fabs(grad) * in_p * (rounded + 1e-5 * (std::fabs(d) + scatter + kl)) +
                    overflow + kUnderflow;
            }
        }
    }
    return result;
}

void try_gradients(uint64_t seed, Random& random, const Rows& reference,
                   const std::vector<Rows>& circuits, int64_t n_rows, int64_t n_cols,
                   double temperature) {
    const int64_t n_circuits = int64_t(circuits.size());
    std::vector<double> grad(n_circuits * n_rows);
    for (double& g : grad) g = random.chance(0.2) ? 0.0 : random.normal();
    std::vector<Matrix> inputs, outputs, again;
    std::vector<Written> dqs, repeated;
    for (const Rows& circuit : circuits) {
        inputs.push_back(circuit.matrix());
        dqs.emplace_back(circuit, n_rows, n_cols);
        repeated.emplace_back(circuit, n_rows, n_cols);
        outputs.push_back(random.chance(0.2) ? Matrix{} : dqs.back().matrix());
        again.push_back(outputs.back().data ? repeated.back().matrix() : Matrix{});
    }
    const Written dp(reference, n_rows, n_cols), repeated_dp(reference, n_rows, n_cols);
    std::vector<State> states(n_circuits * n_rows);
    GradientProblem problem{grad.data(), states.data(),      inputs.data(), outputs.data(),
                            n_circuits,  reference.matrix(), dp.matrix(),   n_rows,
                            n_cols,      temperature};
    GradientProblem second = problem;
    second.dqs = again.data();
    second.dp = repeated_dp.matrix();
    const auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
    for (const Level* const* level = levels(); *level; ++level) {
        const std::string name = (*level)->name;
        const Problem forward{inputs.data(), n_circuits, reference.matrix(),
                              n_rows,        n_cols,     temperature};
        run(**level, forward, {nullptr, states.data()}, 1, {always, nullptr});
        if (!run(**level, problem, 1, {always, nullptr}) ||
            !run(**level, second, 2 + int(random.below(4)), {always, nullptr}))
            fail(seed, name + " says that a gradient was stopped");
        int left = int(random.below(4));
        run(**level, second, 2, {countdown, &left});
        run(**level, second, 2, {always, nullptr});
        for (int64_t r = 0; r < n_rows; ++r) {
            const std::vector<double> p = divided(reference.row(r), temperature);
            std::vector<double> sum(n_cols), tolerance(n_cols);
            const auto check = [&](const char* what, const Written& found, const Written& other,
                                   int64_t i, double expected, double room) {
                const double value = found.get(r, i);
                if (!same(value, other.get(r, i)))
                    fail(seed, name + ": a gradient's bits depend on the number of threads");
                const bool good = room == kInf           ? true
                                  : std::isnan(expected) ? std::isnan(value)
                                                       : std::fabs(value - expected) <=
                                                             room + found.rounding(expected);
                if (!good)
                    fail(seed, name + ": " + what + " of row " + std::to_string(r) + ", token " +
                                   std::to_string(i) + " of " + std::to_string(n_cols) + " is " +
                                   number(value) + ", not " + number(expected) + " +- " +
                                   number(room));
            };
            for (int64_t k = 0; k < n_circuits; ++k) {
                const std::vector<double> q = divided(circuits[k].row(r), temperature);
                const ExpectedGradient one =
                    expect_gradient(p, q, expect(p, q).kl, grad[k * n_rows + r], temperature);
                for (int64_t i = 0; i < n_cols; ++i) {
                    sum[i] += one.dp[i];
                    tolerance[i] += one.dp_tolerance[i];
                    if (outputs[k].data)
                        check("dq", dqs[k], repeated[k], i, one.dq[i], one.dq_tolerance[i]);
                }
            }
            for (int64_t i = 0; i < n_cols; ++i)
                check("dp", dp, repeated_dp, i, sum[i], tolerance[i] + 1e-6 * std::fabs(sum[i]));
        }
    }
}

using Wide = long double;

Wide log_sum_exp(const std::vector<double>& logits, double temperature, double max) {
    Wide sum = 0;
    for (double logit : logits) sum += std::exp((Wide(logit) - max) / temperature);
    return std::log(sum);
}

// A row's Jensen-Shannon divergence, its gradients with respect to logits over the temperature, and how
// far off each may be: the rounding of differences of logits, and the errors of a logarithm and a sum.
struct ExpectedJs {
    bool defined = true;
    double js = 0, tolerance = 1e-8;
    std::vector<double> gradients[2], tolerances[2];
};

ExpectedJs expect_js(const std::vector<double> (&logits)[2], double heavy, double temperature) {
    ExpectedJs result;
    const size_t n = logits[0].size();
    const double weights[2] = {heavy, 1 - heavy};
    double max[2], top[2] = {};
    Wide lse[2];
    size_t likeliest[2];
    for (int s = 0; s < 2; ++s) {
        if (std::isnan(log_sum_exp(logits[s]))) result.defined = false;
        likeliest[s] = std::max_element(logits[s].begin(), logits[s].end()) - logits[s].begin();
        max[s] = logits[s][likeliest[s]];
        result.gradients[s].resize(n);
        result.tolerances[s].resize(n);
    }
    if (!result.defined) return result;
    for (int s = 0; s < 2; ++s) lse[s] = log_sum_exp(logits[s], temperature, max[s]);
    const Wide offset = Wide(max[0]) - max[1];
    const bool apart = std::fabs(offset) >= 4;
    std::vector<double> masses[2], worths[2], errors[2];
    Wide js = 0;
    for (size_t i = 0; i < n; ++i) {
        Wide log_mass[2], mass[2], worth[2];
        for (int s = 0; s < 2; ++s) {
            log_mass[s] = (Wide(logits[s][i]) - max[s]) / temperature - lse[s];
            mass[s] = std::exp(log_mass[s]);
        }
        const Wide d = log_mass[0] - log_mass[1];
        const Wide mixed = weights[0] * mass[0] + weights[1] * mass[1];
        for (int s = 0; s < 2; ++s) {
            const Wide log_ratio = s == 0 ? d : -d, other = weights[1 - s];
            worth[s] = mass[s] == 0          ? Wide(0)
                       : mass[1 - s] == 0    ? -std::log(Wide(weights[s]))
                       : log_ratio < -1      ? log_ratio - std::log(other + weights[s] * std::exp(log_ratio))
                                             : -std::log1p(other * std::expm1(-log_ratio));
        }
        Wide term = 0;
        if (std::fabs(d) < 0.1) {
            for (int s = 0; s < 2; ++s) {
                const Wide x = weights[1 - s] * std::expm1(s == 0 ? -d : d);
                Wide series = 0;
                for (int k = 24; k > 1; --k) series = 1 / Wide(k) - x * series;
                term += weights[s] * mass[s] * x * x * series;
            }
        } else {
            term = weights[0] * mass[0] * worth[0] + weights[1] * mass[1] * worth[1];
        }
        js += term;
        // The rounding error of the difference of two logits, less the maxima's distance if apart.
        const Wide difference = Wide(logits[0][i]) - logits[1][i];
        const Wide rounded =
            1.5e-7 * std::fabs(apart ? difference - offset : difference) / temperature;
        for (int s = 0; s < 2; ++s) {
            masses[s].push_back(double(mass[s]));
            worths[s].push_back(double(worth[s]));
            Wide error = 0;
            if (mass[s] != 0) error = 4e-7 * std::fabs(worth[s]);
            if (mass[0] != 0 && mass[1] != 0) {
                const Wide others = weights[1 - s] * mass[1 - s] / mixed;
                // The last term is the error of d as computed here.
                error += others * (rounded + 1e-6 * std::fmin(std::fabs(d), Wide(1)) + 2e-17);
                result.tolerance +=
                    double(rounded * weights[s] * mass[s] * std::fabs(worth[s]));
            }
            errors[s].push_back(double(error));
        }
    }
    result.js = double(js);
    result.tolerance += 1e-5 * result.js;
    for (int s = 0; s < 2; ++s) {
        double mean = 0, error = 0;
        top[s] = worths[s][likeliest[s]];
        for (size_t i = 0; i < n; ++i) {
            mean += masses[s][i] * (worths[s][i] - top[s]);
            error += masses[s][i] * (errors[s][i] + 2e-6 * std::fabs(worths[s][i] - top[s]));
        }
        for (size_t i = 0; i < n; ++i) {
            const double scale = weights[s] * masses[s][i];
            result.gradients[s][i] = scale * ((worths[s][i] - top[s]) - mean);
            result.tolerances[s][i] = scale * (errors[s][i] + error) + 4e-36 +
                                      1e-5 * std::fabs(result.gradients[s][i]);
        }
    }
    return result;
}

// Tests the summaries of each side's rows.
void try_summaries(uint64_t seed, Random& random, const std::vector<const Rows*>& sides,
                   int64_t n_rows, int64_t n_cols) {
    std::vector<Matrix> matrices;
    for (const Rows* side : sides) matrices.push_back(side->matrix());
    const double temperature = random.among({1.0, 1.0, 0.5, 4.0});
    const SummaryProblem problem{matrices.data(), int64_t(sides.size()), n_rows, n_cols,
                                 float(1 / temperature)};
    for (const Level* const* level = levels(); *level; ++level) {
        const std::string name = std::string((*level)->name) + ", summaries";
        std::vector<Summary> found(sides.size() * n_rows), again(found.size());
        int left = int(random.below(4));
        run(**level, problem, again.data(), 3, {countdown, &left});
        if (!run(**level, problem, found.data(), 1, {always, nullptr}) ||
            !run(**level, problem, again.data(), 2 + int(random.below(4)), {always, nullptr}))
            fail(seed, name + " says that it was stopped");
        if (std::memcmp(found.data(), again.data(), found.size() * sizeof(Summary)) != 0)
            fail(seed, name + ": bits depend on the number of threads");
        for (size_t i = 0; i < found.size(); ++i) {
            const std::vector<double> logits = sides[i / n_rows]->row(i % n_rows);
            const auto largest = std::max_element(logits.begin(), logits.end());
            const Summary& row = found[i];
            const std::string where = name + ": side " + std::to_string(i / n_rows) + ", row " +
                                      std::to_string(i % n_rows) + " of " + std::to_string(n_cols);
            const auto odd = [](double logit) { return std::isnan(logit) || logit == kInf; };
            if (std::any_of(logits.begin(), logits.end(), odd)) {
                if (!std::isnan(row.sum)) fail(seed, where + " is defined");
                continue;
            }
            if (*largest == -kInf) {
                if (row.sum != 0 || row.max != -kInf) fail(seed, where + " has mass");
                continue;
            }
            Wide sum = 0, below = 0, size = 0;
            for (double logit : logits) {
                const Wide x = (Wide(logit) - *largest) / temperature, weight = std::exp(x);
                sum += weight;
                if (weight > 0) below += weight * x, size -= weight * x;
            }
            // Subnormal numbers count as 0, and hence as equal.
            const bool exact = std::fabs(*largest) > 1e-37;
            if (exact ? row.max != *largest || row.likeliest != largest - logits.begin()
                      : std::fabs(logits.at(row.likeliest)) > 1e-37)
                fail(seed, where + " has " + number(row.max) + " at " +
                               std::to_string(row.likeliest) + ", not " + number(*largest));
            if (!(std::fabs(row.sum - sum) <= 1e-6 * sum))
                fail(seed, where + " sums up to " + number(row.sum) + ", not " + number(double(sum)));
            if (i < size_t(n_rows) && !(std::fabs(row.below - below) <= 1e-6 * (size + sum)))
                fail(seed, where + " is " + number(row.below) + " below, not " +
                               number(double(below)));
        }
    }
}

void try_js(uint64_t seed, Random& random, const Rows& reference, const Rows& circuit,
            int64_t n_rows, int64_t n_cols) {
    const double light = random.among({0.5, 0.5, 0.3, 1e-2, 1e-5});
    const double temperature = random.among({1.0, 1.0, 0.5, 4.0});
    const bool swapped = random.chance(0.5);
    const Rows* rows[2] = {swapped ? &circuit : &reference, swapped ? &reference : &circuit};
    const JsProblem problem{{rows[0]->matrix(), rows[1]->matrix()},
                            n_rows,
                            n_cols,
                            Mixture(light),
                            float(1 / temperature)};
    std::vector<double> grad(n_rows);
    for (double& g : grad) g = random.chance(0.2) ? 0.0 : random.normal();
    std::vector<Written> written, repeated;
    JsGradients gradients{grad.data(), {}}, second = gradients;
    for (int s = 0; s < 2; ++s) {
        written.emplace_back(*rows[s], n_rows, n_cols);
        repeated.emplace_back(*rows[s], n_rows, n_cols);
        if (random.chance(0.2)) continue;
        gradients.sides[s] = written[s].matrix();
        second.sides[s] = repeated[s].matrix();
    }
    std::vector<ExpectedJs> expected;
    for (int64_t r = 0; r < n_rows; ++r)
        expected.push_back(expect_js({rows[0]->row(r), rows[1]->row(r)}, 1 - light, temperature));
    const auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
    for (const Level* const* level = levels(); *level; ++level) {
        const std::string name = std::string((*level)->name) + ", Jensen-Shannon";
        std::vector<float> js(n_rows, -1), again(n_rows, -1);
        const int n_threads = 2 + int(random.below(4));
        int left = int(random.below(4));
        if (!run(**level, problem, js.data(), 1, {always, nullptr}) ||
            !run(**level, problem, again.data(), n_threads, {always, nullptr}) ||
            !run(**level, problem, gradients, 1, {always, nullptr}))
            fail(seed, name + " says that it was stopped");
        run(**level, problem, second, n_threads, {countdown, &left});
        run(**level, problem, second, n_threads, {always, nullptr});
        for (int64_t r = 0; r < n_rows; ++r) {
            const ExpectedJs& row = expected[r];
            const std::string where = name + ": row " + std::to_string(r) + " of " +
                                      std::to_string(n_cols) + " tokens, weight " + number(light);
            if (!same(js[r], again[r])) fail(seed, where + ": bits depend on the number of threads");
            if (row.defined ? !(js[r] >= 0 && std::fabs(js[r] - row.js) <= row.tolerance)
                            : !std::isnan(js[r]))
                fail(seed, where + " measures " + number(js[r]) + ", not " + number(row.js) +
                               " +- " + number(row.tolerance));
            for (int s = 0; s < 2; ++s) {
                if (!gradients.sides[s].data) continue;
                for (int64_t i = 0; i < n_cols; ++i) {
                    const double found = written[s].get(r, i);
                    if (!same(found, repeated[s].get(r, i)))
                        fail(seed, where + ": a gradient's bits depend on the number of threads");
                    const double value = grad[r] * row.gradients[s][i];
                    const double room =
                        std::fabs(grad[r]) * row.tolerances[s][i] + written[s].rounding(value);
                    const bool good = grad[r] == 0    ? found == 0
                                      : !row.defined ? std::isnan(found)
                                                     : std::fabs(found - value) <= room;
                    if (!good)
                        fail(seed, where + ": gradient " + std::to_string(s) + " of token " +
                                       std::to_string(i) + " is " + number(found) + ", not " +
                                       number(value) + " +- " + number(room));
                }
            }
        }
    }
}

void try_seed(uint64_t seed) {
    Random random(seed);
    const int64_t n_rows = 1 + random.below(5), n_circuits = 1 + random.below(4);
    const int64_t n_cols =
        1 + random.below(random.among<int64_t>({4, 40, 40, 700, 700, 15000, 70000}));
    const auto dtype = [&] {
        return random.among({Dtype::float32, Dtype::bfloat16, Dtype::float16});
    };
    const double scale = random.among({0.1, 1.0, 3.0, 10.0});
    const double special = random.chance(0.5) ? 0.0 : std::pow(10, random.uniform(-5, -1));

    Rows reference(random, dtype(), n_rows, n_cols);
    std::vector<Rows> circuits;
    for (int64_t k = 0; k < n_circuits; ++k) circuits.emplace_back(random, dtype(), n_rows, n_cols);
    const auto odd = [&](double usual) {
        if (!random.chance(special)) return usual;
        return random.among({-kInf, -kInf, -kInf, kNan, kInf, 3e38, -3e38, 1e4, -1e4, 1e-42});
    };
    // These values lie on no grid, so that p - q is not exact.
    const auto level = [&] { return random.normal() * random.among({20.0, 20.0, 1e3, 1e5}); };
    const double center = random.chance(0.3) ? level() : 0.0;
    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t masked = random.chance(0.1) ? random.below(n_cols + 1) : 0;
        for (int64_t i = 0; i < n_cols; ++i)
            reference.set(r, i, i < masked ? -kInf : odd(center + random.normal() * scale));
    }
    for (Rows& circuit : circuits) {
        const bool same = random.chance(0.1);
        const double noise = same ? 0.0 : std::pow(10, random.uniform(-6, 1));
        const double shift = random.chance(0.3) ? level() : random.chance(0.3) ? -center : 0.0;
        for (int64_t r = 0; r < n_rows; ++r)
            for (int64_t i = 0; i < n_cols; ++i) {
                const double p = reference.get(r, i);
                circuit.set(r, i, same ? p : odd(p + shift + random.normal() * noise));
            }
    }

    std::vector<Matrix> matrices;
    for (const Rows& circuit : circuits) matrices.push_back(circuit.matrix());
    const double temperature = random.among({1.0, 1.0, 0.5, 3.0, 16.0});
    const double depth = temperature == 1 ? 0 : 20;
    const Problem problem{matrices.data(), n_circuits, reference.matrix(),
                          n_rows,          n_cols,     temperature};
    for (const Level* const* level = levels(); *level; ++level) {
        const std::string name = (*level)->name;
        std::vector<float> kl(n_circuits * n_rows, -1), again(n_circuits * n_rows, -1);
        std::vector<State> states(n_circuits * n_rows);
        if (!run(**level, problem, {kl.data(), nullptr}, 1, {always, nullptr}) ||
            !run(**level, problem, {again.data(), states.data()}, 2 + int(random.below(4)),
                 {always, nullptr}))
            fail(seed, name + " says that it was stopped");
        if (std::memcmp(kl.data(), again.data(), kl.size() * sizeof(float)) != 0)
            fail(seed, name + ": bits depend on the number of threads");
        int left = int(random.below(4));
        run(**level, problem, {again.data(), nullptr}, 2, {countdown, &left});

        for (int64_t k = 0; k < n_circuits; ++k)
            for (int64_t r = 0; r < n_rows; ++r) {
                const Expected expected = expect(divided(reference.row(r), temperature),
                                                 divided(circuits[k].row(r), temperature), depth);
                const float found = kl[k * n_rows + r];
                const bool close =
                    found >= 0 && std::fabs(found - expected.kl) <= expected.tolerance;
                // Sums of differences near float32's largest number may overflow before they are divided
                // by the sum of the weights, and a temperature below 1 clamps a larger logit to it.
                const bool large = expected.kl > 1e34 &&
                                   (found == kInf || (temperature < 1 && found > 1e33));
                const bool good = std::isnan(expected.kl) ? std::isnan(found) : close || large;
                if (!good)
                    fail(seed, name + ": circuit " + std::to_string(k) + ", row " +
                                   std::to_string(r) + " of " + std::to_string(n_cols) +
                                   " tokens at " + number(temperature) + " measures " +
                                   number(found) + ", not " + number(expected.kl));
            }
    }
    try_gradients(seed, random, reference, circuits, n_rows, n_cols, temperature);
    try_js(seed, random, reference, circuits[0], n_rows, n_cols);
    std::vector<const Rows*> sides{&reference};
    for (const Rows& circuit : circuits) sides.push_back(&circuit);
    try_summaries(seed, random, sides, n_rows, n_cols);
}

}  // namespace

int main(int n_arguments, char** arguments) {
    const uint64_t first = n_arguments > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
    const uint64_t count = n_arguments > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1000;
    for (uint64_t seed = first; seed < first + count; ++seed) try_seed(seed);
    std::string names;
    for (const Level* const* level = levels(); *level; ++level)
        names += ' ' + std::string((*level)->name);
    std::printf("%llu seeds from %llu, levels%s: good\n", static_cast<unsigned long long>(count),
                static_cast<unsigned long long>(first), names.c_str());
}
