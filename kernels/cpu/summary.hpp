// The summary of one side's row by itself: what does not depend on the other side.
#pragma once

#include <cmath>
#include <cstdint>

#include "functions.hpp"
#include "groups.hpp"
#include "kl.hpp"
#include "matrix.hpp"
#include "rows.hpp"
#include "simd.hpp"

namespace fastkl {
namespace {

inline float read_block(const Matrix& matrix, int64_t row, int64_t start, int64_t n, float* to,
                        bool& undefined) {
    return with_dtype(matrix.dtype, address(matrix, row, start),
                      [&](auto logits) { return read_row(logits, n, to, undefined); });
}

// Calls visit(start, n) for each of the row's blocks.
template <class Visit> inline void for_blocks(int64_t n_cols, Visit visit) {
    const int64_t length = piece_length(n_cols, kBlock);
    for (int64_t start = 0; start < n_cols; start += length)
        visit(start, n_cols - start < length ? n_cols - start : length);
}

inline int64_t padded_to_groups(int64_t n) { return (n + kGroup - 1) / kGroup * kGroup; }

// Returns Σ w (x - base) scale, given the weights w.
inline double weighted_exponents(const float* x, const float* w, int64_t padded, float base,
                                 float scale) {
    Sum sum;
    for (int64_t i = 0; i < padded; i += kGroup) {
        for (int u = 0; u < U; ++u) {
            // Clamp the exponent, so that a token without weight adds nothing: not 0 · inf.
            const vf exponent = max((load(x + i + u * W) - base) * scale, splat(kLowest));
            sum.part[u] = fma(load(w + i + u * W), exponent, sum.part[u]);
        }
        if ((i + kGroup) % kChunk == 0) sum.fold();
    }
    sum.fold();
    return sum.value();
}

// Returns the combined summary of two disjoint pieces of a row, each with some mass or none.
inline Summary joined(const Summary& first, const Summary& second, double scale) {
    if (second.sum == 0) return first;
    if (first.sum == 0) return second;
    const Summary& higher = second.max > first.max ? second : first;
    Summary whole{higher.max, 0.0, 0.0, higher.likeliest};
    const Summary pieces[2] = {first, second};
    for (const Summary& piece : pieces) {
        const double x = (piece.max - whole.max) * scale, e = ::exp(x);
        whole.sum += e * piece.sum;
        whole.below += e * (piece.below + x * piece.sum);
    }
    return whole;
}

inline Summary summary_of(const Matrix& matrix, int64_t row, int64_t n_cols, float scale, bool below,
                          Scratch& scratch) {
    constexpr float inf = __builtin_inff();
    Summary whole{-double(inf), 0.0, 0.0, 0};
    bool defined = true;
    for_blocks(n_cols, [&](int64_t start, int64_t n) {
        bool undefined;
        const int64_t padded = padded_to_groups(n);
        const float max = read_block(matrix, row, start, n, scratch.p, undefined);
        defined &= !undefined;
        if (undefined || max == -inf) return;
        const double sum = with_dtype(matrix.dtype, address(matrix, row, start + n), [&](auto next) {
            return weigh_row(scratch.p, padded, max, scale, scratch.w, next);
        });
        Summary block{max, sum, 0.0, 0};
        if (below) block.below = weighted_exponents(scratch.p, scratch.w, padded, max, scale);
        // The position is needed only if this block's maximum is the largest so far.
        if (max > whole.max) block.likeliest = start + position(scratch.p, padded, max);
        whole = joined(whole, block, scale);
    });
    if (!defined) whole.sum = __builtin_nan("");
    return whole;
}

Summary summarize(const SummaryProblem& problem, int64_t side, int64_t row, Scratch& scratch) {
    const FlushSubnormals flush;
    return summary_of(problem.sides[side], row, problem.n_cols, problem.inverse_temperature,
                      side == 0, scratch);
}

}  // namespace
}  // namespace fastkl
