// One instruction-set level: the table of its functions. Each level_*.cpp file includes this header, is
// compiled with its level's flags, and defines its level's table, the only name that other files see.
#pragma once

#include <cstdint>

#include "slice.hpp"
#include "gradient.hpp"
#include "jensen_shannon.hpp"
#include "summary.hpp"

#include "functions.hpp"
#include "kl.hpp"
#include "simd.hpp"

namespace fastkl {
namespace {

void exponential_of(const float* x, float* y, int64_t n) {
    for (int64_t i = 0; i + W <= n; i += W) store(y + i, exponential<true>(load(x + i)));
}

void logarithm_of(const float* x, const float* rest, float* y, int64_t n) {
    for (int64_t i = 0; i + W <= n; i += W) store(y + i, logarithm(load(x + i), load(rest + i)));
}

void phi_over_square_of(const float* d, float* y, int64_t n, bool wide) {
    for (int64_t i = 0; i + W <= n; i += W) {
        const vf x = load(d + i), square = x * x;
        store(y + i, wide ? phi_over_square<true>(x, square) : phi_over_square<false>(x, square));
    }
}

// A constant, since code that fills in the table at run time could use instructions that the processor
// lacks.
constexpr Level level_table(const char* name, bool (*supported)()) {
    return {name,      supported,      slice,        gradient,          js, js_gradient,
            summarize, exponential_of, logarithm_of, phi_over_square_of};
}

}  // namespace
}  // namespace fastkl
