// Random problems for all levels of this machine, held against float64: built with sanitizers by
// .ci/sanitize, and without Python. Deterministic: the first argument is how many problems.
//
// Every row lies in an allocation of its own size, so that a read beyond either end is seen.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kl.hpp"

namespace {

using fastkl::Dtype;
using fastkl::Matrix;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

std::mt19937_64 generator(20261123);
int failures = 0;

int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }

double normal() { return std::normal_distribution<double>()(generator); }

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// A half, by the definition of the format: slow and obvious.
double from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const int fraction = bits & 1023;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31) return fraction ? kNaN : sign * kInf;
    return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

uint16_t to_half(double x) {
    if (std::isnan(x)) return 0x7e01;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (x >= 65520) return sign | 0x7c00;
    if (x < 0x1p-14) return sign | static_cast<uint16_t>(std::nearbyint(x * 0x1p24));
    int exponent;
    const double fraction = std::frexp(x, &exponent);
    const int rounded = static_cast<int>(std::nearbyint(fraction * 2048));
    return sign | static_cast<uint16_t>(((exponent + 13) << 10) + rounded);
}

// Rows in memory as small as they can be, from any element on, and what they hold in float64.
struct Logits {
    Matrix matrix{};
    std::unique_ptr<unsigned char[]> memory;
    std::vector<std::vector<double>> rows;

    Logits(const std::vector<std::vector<double>>& wanted, Dtype dtype) {
        const int64_t n_rows = static_cast<int64_t>(wanted.size());
        const int64_t n_cols = static_cast<int64_t>(wanted[0].size());
        const int64_t size = dtype == Dtype::float32 ? 4 : 2;
        const int64_t stride = n_cols + below(20);
        const int64_t offset = below(40);
        memory.reset(new unsigned char[(offset + stride * (n_rows - 1) + n_cols) * size]);
        matrix = {memory.get() + offset * size, stride, dtype};
        for (int64_t r = 0; r < n_rows; ++r) {
            rows.emplace_back();
            for (int64_t v = 0; v < n_cols; ++v) {
                unsigned char* at = memory.get() + (offset + r * stride + v) * size;
                const double x = wanted[r][v];
                if (dtype == Dtype::float32) {
                    const float value = static_cast<float>(x);
                    std::memcpy(at, &value, 4);
                    rows[r].push_back(value);
                } else if (dtype == Dtype::bfloat16) {
                    const uint16_t bits = static_cast<uint16_t>(
                        bits_of(static_cast<float>(x)) >> 16 | (std::isnan(x) ? 0x40 : 0));
                    std::memcpy(at, &bits, 2);
                    rows[r].push_back(from_bits(uint32_t{bits} << 16));
                } else {
                    const uint16_t bits = to_half(x);
                    std::memcpy(at, &bits, 2);
                    rows[r].push_back(from_half(bits));
                }
            }
        }
    }
};

// Log-probabilities; empty where there are none. The maximum goes first: at logits of -3e38 a
// log-sum-exp in one number has no digits left for the sum.
std::vector<double> log_softmax(const std::vector<double>& row) {
    double max = -kInf, sum = 0;
    for (double x : row) {
        if (!(x < kInf)) return {};
        max = x > max ? x : max;
    }
    if (max == -kInf) return {};
    for (double x : row) sum += std::exp(x - max);
    std::vector<double> result;
    for (double x : row) result.push_back((x - max) - std::log(sum));
    return result;
}

// Σ P φ(log P - log Q), and Q where P = 0.
double oracle(const std::vector<double>& p, const std::vector<double>& q) {
    const std::vector<double> log_ps = log_softmax(p), log_qs = log_softmax(q);
    if (log_ps.empty() || log_qs.empty()) return kNaN;
    double sum = 0;
    for (std::size_t v = 0; v < p.size(); ++v) {
        if (p[v] > -kInf && q[v] == -kInf) return kInf;
        if (p[v] == -kInf && q[v] == -kInf) continue;
        const double log_p = log_ps[v], log_q = log_qs[v], d = log_p - log_q;
        double phi;
        if (std::fabs(d) < 0.25) {
            double series = 0;
            for (int n = 14; n > 1; --n) series = (1 - d * series) / n;
            phi = d * d * series;
        } else {
            phi = std::expm1(-d) + d;
        }
        const double weight = std::exp(log_p);
        sum += weight < 1e-250 ? std::exp(log_q) : weight * phi;
    }
    return sum;
}

int64_t vocabulary() {
    switch (below(8)) {
        case 0: return 1 + below(4);
        case 1: return fastkl::kBlock + below(5) - 2;
        case 2: return fastkl::kSlice + below(5) - 2;
        case 3: return 1 + below(3 * fastkl::kSlice);
        case 4: return 1 + below(100);
        default: return 1 + below(3000);
    }
}

void mask(std::vector<double>& row, double value) {
    const int64_t n = static_cast<int64_t>(row.size());
    const int64_t kind = below(4);
    const int64_t some = below(n) + 1;
    for (int64_t v = 0; v < n; ++v) {
        if (kind == 0 ? v < some : kind == 1 ? v >= n - some : kind == 2 ? below(3) == 0 : v == some - 1)
            row[v] = value;
    }
}

bool always(void*) { return true; }

void check(bool good, const char* what, const char* level, int64_t n, double got, double expected) {
    if (good) return;
    ++failures;
    std::printf("%s: %s, V = %lld: got %.9g, expected %.9g\n", level, what,
                static_cast<long long>(n), got, expected);
}

void problem() {
    const int64_t n_rows = 1 + below(3), n_cols = vocabulary(), n_circuits = 1 + below(4);
    const double scales[] = {1, 3, 10}, noises[] = {0, 1e-5, 1e-3, 0.1, 0.5, 1, 5};
    const double specials[] = {-kInf, -kInf, -3.4e38, -1e4, kInf, kNaN};
    const double scale = scales[below(3)];
    std::vector<std::vector<double>> p(n_rows, std::vector<double>(n_cols));
    for (auto& row : p)
        for (double& x : row) x = scale * normal();
    // Half precision rounds 3.4e38 to an infinity, and so does not get it.
    const Dtype dtype = static_cast<Dtype>(below(3));
    const auto special = [&] {
        const double value = specials[below(6)];
        return value == -3.4e38 && dtype == Dtype::float16 ? -6e4 : value;
    };
    std::vector<std::vector<std::vector<double>>> qs;
    std::vector<double> offsets;
    for (int64_t k = 0; k < n_circuits; ++k) {
        const double noise = noises[below(7)];
        offsets.push_back(below(3) ? 0.0 : 50 * normal());
        qs.push_back(p);
        for (auto& row : qs[k])
            for (double& x : row) x += noise * normal() + offsets[k];
    }
    for (int64_t r = 0; r < n_rows; ++r) {
        if (below(3) == 0) {
            const double value = special();
            const auto after = generator;
            mask(p[r], value);
            for (auto& q : qs) {
                if (below(2)) continue;
                // The same tokens.
                generator = after;
                mask(q[r], value);
            }
        }
        for (auto& q : qs)
            if (below(8) == 0) mask(q[r], special());
    }

    const Logits reference(p, dtype);
    std::vector<Logits> circuits;
    std::vector<Matrix> matrices;
    for (int64_t k = 0; k < n_circuits; ++k) {
        circuits.emplace_back(qs[k], below(4) ? dtype : static_cast<Dtype>(below(3)));
        matrices.push_back(circuits[k].matrix);
    }
    const fastkl::Problem problem{matrices.data(), n_circuits, reference.matrix, n_rows, n_cols};
    for (const fastkl::Level* const* level = fastkl::levels(); *level; ++level) {
        std::vector<float> kl(n_circuits * n_rows, -1.0f), again(kl);
        fastkl::run(**level, problem, {kl.data(), nullptr}, 1, {always, nullptr});
        fastkl::run(**level, problem, {again.data(), nullptr}, 3, {always, nullptr});
        check(std::memcmp(kl.data(), again.data(), kl.size() * sizeof(float)) == 0,
              "bits depend on the number of threads", (*level)->name, n_cols, 0, 0);
        for (int64_t k = 0; k < n_circuits; ++k) {
            for (int64_t r = 0; r < n_rows; ++r) {
                const double got = kl[k * n_rows + r];
                const double expected = oracle(reference.rows[r], circuits[k].rows[r]);
                // A difference of logits this far apart is rounded to so much.
                const double lost = 2e-7 * std::fabs(offsets[k]);
                const double tolerance = 1e-5 * expected + 1e-8 + lost * lost +
                                         lost * std::sqrt(2 * std::fabs(expected));
                const bool good = std::isnan(expected)   ? std::isnan(got)
                                  : expected > 3.4e38 ? got == kInf
                                                         : std::fabs(got - expected) <= tolerance;
                check(good, "off", (*level)->name, n_cols, got, expected);
                check(!(got < 0), "negative", (*level)->name, n_cols, got, expected);
                if (reference.rows[r] == circuits[k].rows[r] && !std::isnan(expected))
                    check(got == 0, "not 0", (*level)->name, n_cols, got, expected);
            }
        }
    }
}

// e^x over its whole range, every 41st number.
void exponentials() {
    constexpr int64_t kMany = 4096;
    std::vector<float> x(kMany), y(kMany);
    for (const fastkl::Level* const* level = fastkl::levels(); *level; ++level) {
        double worst = 0, worst_near = 0;
        for (uint32_t sign : {0u, 0x80000000u}) {
            const uint32_t last = bits_of(sign ? 87.0f : 88.0f);
            for (uint32_t from = bits_of(1e-9f); from < last;) {
                for (float& value : x) {
                    value = from_bits((from < last ? from : last) | sign);
                    from += 41;
                }
                (*level)->exponential(x.data(), y.data(), kMany);
                for (int64_t i = 0; i < kMany; ++i) {
                    const double exact = std::exp(double{x[i]});
                    const double error = std::fabs(y[i] - exact) / exact;
                    worst = std::fmax(worst, error);
                    if (std::fabs(x[i]) < 16) worst_near = std::fmax(worst_near, error);
                }
            }
        }
        std::printf("%s: relative error of e^x at most %.3g, %.3g for |x| < 16\n", (*level)->name,
                    worst, worst_near);
        check(worst < 4.2e-7, "e^x", (*level)->name, 0, worst, 4.2e-7);
        check(worst_near < 2.2e-7, "e^x near 0", (*level)->name, 0, worst_near, 2.2e-7);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int many = argc > 1 ? std::atoi(argv[1]) : 300;
    exponentials();
    for (int i = 0; i < many; ++i) problem();
    std::printf("%d problems, %d failures\n", many, failures);
    return failures != 0;
}
