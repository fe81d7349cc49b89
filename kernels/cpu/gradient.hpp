// The gradients of a row's divergences. The algebra is that of fastkl/gradient.py, whose names these are:
// t = e^(p - m_p) expm1(-d'), summed at a rounded pivot c, and x, what c is off by.

// Writes or adds up one circuit's gradients of a row: `dq` may be null, and so may `total`. `scale` is
// the loss's gradient over z_p, NaN in a row without a divergence.
inline void gradient_of_circuit(const GradientRoom& room, int64_t padded, int64_t likeliest,
                                double m_p, double z_p, double m_q, double z_q, double scale,
                                float* dq, float* total) {
    constexpr float inf = __builtin_inff();
    const double apart = m_p - m_q, pivot = apart + ::log(z_p / z_q);
    // Beyond this p - q may overflow, no token is near, and c - apart would be off by more than 1.
    constexpr double kFar = 1e38;
    const bool far_apart = __builtin_fabs(pivot) > kFar;
    const double least = pivot < 0 ? -kFar : kFar;
    const Pivot c(m_p, __builtin_isnan(pivot) ? 0.0 : far_apart ? least : pivot);
    const float ratio = float(far_apart ? z_p / z_q : ::exp(c.value() - apart));
    // What is masked on one side has gradient 0 in a row that is not NaN.
    const float nothing = __builtin_isnan(scale) ? __builtin_nanf("") : 0.0f;
    // Where one token has nearly all mass, d - KL is 0 but for a last few digits of d: so d from there.
    const float there =
        ((room.p[likeliest] - c.of_p) - (room.q[likeliest] + c.of_q)) - c.rest;
    Sum sum_t, sum_d;
    vi infinite = {};
    for (int64_t i = 0; i < padded; i += kGroup) {
        for (int u = 0; u < U; ++u) {
            const int64_t j = i + u * W;
            const vf p = load(room.p + j), q = load(room.q + j), w = load(room.w + j);
            // Exact for logits alike. NaN where both are masked: neither near nor of any weight.
            const vf d = ((p - c.of_p) - (q + c.of_q)) - c.rest;
            const vf square = d * d;
            const vf near = w * fma(square, phi_over_square(d), -d);
            const vf far = fma(load(room.e + j), splat(ratio), -w);
            const vf t = square < kNear * kNear ? near : far;
            const vf first = w == 0.0f ? vf{} : w * (d - there);
            infinite |= (q == -inf) & (p != -inf);
            sum_t.part[u] += t;
            sum_d.part[u] += first;
            store(room.t + j, t);
            store(room.d + j, first);
        }
        if ((i + kGroup) % kChunk == 0) sum_t.fold(), sum_d.fold();
    }
    sum_t.fold(), sum_d.fold();

    if (dq) {
        const double x = -::log1p(sum_t.value() / z_p);
        const float of_t = float(scale * ::exp(x)), of_w = float(scale * ::expm1(x));
        for (int64_t j = 0; j < padded; j += W) {
            const vf value = fma(load(room.t + j), splat(of_t), load(room.w + j) * of_w);
            store(dq + j, load(room.q + j) == -inf ? splat(nothing) : value);
        }
    }
    if (total) {
        double mean = sum_d.value() / z_p;
        if (any(infinite) || !__builtin_isfinite(mean)) mean = __builtin_nan("");
        const float of_d = float(scale), of_w = float(-scale * mean);
        for (int64_t j = 0; j < padded; j += W) {
            const vf w = load(room.w + j);
            const vf value = fma(load(room.d + j), splat(of_d), w * of_w);
            const vi masked = (load(room.p + j) == -inf) | (load(room.q + j) == -inf);
            store(total + j, load(total + j) + (masked ? splat(nothing) : value));
        }
    }
}

bool gradient(const GradientProblem& problem, int64_t row, const GradientRoom& room,
              const Poll& poll) {
    const FlushSubnormals flush;
    const int64_t n = problem.n_cols, padded = (n + kGroup - 1) / kGroup * kGroup;
    const auto read = [&](const Matrix& matrix, float* to, bool& undefined) {
        return with_dtype(matrix.dtype, address(matrix, row, 0), [&](auto logits) {
            return read_row(logits, n, problem.inverse_temperature, to, undefined);
        });
    };
    bool undefined_p;
    const float m_p = finite_base(read(problem.reference, room.p, undefined_p));
    const double z_p = weigh_row(room.p, padded, m_p, 1.0f, room.w);
    float* const total = problem.dp.data ? room.total : nullptr;
    const int64_t likeliest = total ? position(room.p, padded, m_p) : 0;
    if (total) __builtin_memset(total, 0, padded * int64_t(sizeof *total));

    for (int64_t k = 0; k < problem.n_circuits; ++k) {
        if (!poll.keep_going(poll.context)) return false;
        const bool wanted = problem.dqs[k].data != nullptr;
        if (!wanted && !total) continue;
        const double grad = problem.grad[k * problem.n_rows + row];
        if (grad == 0) {
            if (!wanted) continue;
            __builtin_memset(room.t, 0, padded * int64_t(sizeof *room.t));
            write_row(problem.dqs[k], row, room.t, n);
            continue;
        }
        bool undefined_q;
        const float m_q = finite_base(read(problem.circuits[k], room.q, undefined_q));
        const double z_q = weigh_row(room.q, padded, m_q, 1.0f, room.e);
        const bool defined = z_p > 0 && z_q > 0 && !undefined_p && !undefined_q;
        const double scale = defined ? grad / z_p : __builtin_nan("");
        gradient_of_circuit(room, padded, likeliest, m_p, z_p, m_q, z_q, scale,
                            wanted ? room.e : nullptr, total);
        if (wanted) write_row(problem.dqs[k], row, room.e, n);
    }
    if (total) write_row(problem.dp, row, total, n);
    return true;
}
