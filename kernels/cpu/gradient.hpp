// The gradients of a row's divergences. The algebra is that of fastkl/gradient.py, whose names these are:
// t = e^(p - m_p) expm1(-d'), summed at a rounded pivot c, and x, what c is off by.

// Pads a row with tokens that neither side has, as float32 divided by the temperature. Tells whether
// there is a NaN or +inf, and the largest logit.
template <class T>
float read_row(const T* from, int64_t n, float inverse_temperature, float* to, bool& undefined) {
    constexpr float inf = __builtin_inff();
    vf high = splat(-inf);
    vi odd = {};
    const auto copy = [&](int64_t i, const T* group) {
        for (int u = 0; u < U; ++u) {
            const vf x = load(group + u * W) * inverse_temperature;
            high = max(x, high);
            odd |= ~(x < inf);
            store(to + i + u * W, x);
        }
    };
    for_groups(from, n, reinterpret_cast<const char*>(from), copy, copy, [] {});
    undefined = any(odd);
    return largest(high);
}

// Sets e = e^(x - base), 0 where that is below float's normal numbers, and returns the sum.
inline double weigh_row(const float* x, int64_t padded, float base, float* e) {
    Sum z;
    for (int64_t i = 0; i < padded; i += kGroup) {
        for (int u = 0; u < U; ++u) {
            const vf a = load(x + i + u * W) - base;
            const vf weight = a < kLowest ? vf{} : exponential<true>(a);
            z.part[u] += weight;
            store(e + i + u * W, weight);
        }
        if ((i + kGroup) % kChunk == 0) z.fold();
    }
    z.fold();
    return z.value();
}

// Rounded to the nearest, ties to even; a NaN stays one.
inline void convert(const float* from, int64_t n, float* to) {
    __builtin_memcpy(to, from, n * int64_t(sizeof *to));
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline void convert(const float* from, int64_t n, BFloat16* to) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(from[i]);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        to[i].bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

inline void convert(const float* from, int64_t n, Float16* to) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(from[i]), sign = (bits >> 16) & 0x8000;
        const uint32_t magnitude = bits & 0x7fffffff;
        uint32_t half;
        if (magnitude > 0x7f800000) {
            half = 0x7e00;
        } else if (magnitude >= 0x47800000) {
            half = 0x7c00;
        } else if (magnitude < 0x38800000) {
            // Subnormal: adding 1/2 leaves multiples of 2^-24, rounded, in the lowest bits.
            const float x = from[i] < 0 ? -from[i] : from[i];
            half = bits_of(x + 0.5f) - bits_of(0.5f);
        } else {
            const uint32_t low = magnitude - (112u << 23);
            half = (low + 0xfff + ((low >> 13) & 1)) >> 13;
        }
        to[i].bits = uint16_t(sign | half);
    }
}

inline float finite_base(float max) { return max == -__builtin_inff() ? 0.0f : max; }

// Where the largest logit stands; 0 if it is nowhere.
inline int64_t position(const float* x, int64_t padded, float max) {
    for (int64_t i = 0; i < padded; i += W)
        if (any(load(x + i) == max))
            for (int64_t j = i; j < i + W; ++j)
                if (x[j] == max) return j;
    return 0;
}

// Writes or adds up one circuit's gradients of a row: `dq` may be null, and so may `total`. `scale` is
// the loss's gradient over z_p, NaN in a row without a divergence.
inline void gradient_of_circuit(const GradientRoom& room, int64_t padded, int64_t likeliest,
                                double z_p, double z_q, double apart, double scale, float* dq,
                                float* total) {
    constexpr float inf = __builtin_inff();
    const double pivot = apart + ::log(z_p / z_q);
    // Beyond this p - q may overflow, no token is near, and c - apart would be off by more than 1.
    constexpr double kFar = 1e38;
    const bool far_apart = __builtin_fabs(pivot) > kFar;
    const double least = pivot < 0 ? -kFar : kFar;
    const float c = __builtin_isnan(pivot) ? 0.0f : float(far_apart ? least : pivot);
    const float ratio = float(far_apart ? z_p / z_q : ::exp(double(c) - apart));
    // What is masked on one side has gradient 0 in a row that is not NaN.
    const float nothing = __builtin_isnan(scale) ? __builtin_nanf("") : 0.0f;
    // Where one token has nearly all mass, d - KL is 0 but for a last few digits of d: so d from there.
    const float there = (room.p[likeliest] - room.q[likeliest]) - c;
    Sum sum_t, sum_d;
    vi infinite = {};
    for (int64_t i = 0; i < padded; i += kGroup) {
        for (int u = 0; u < U; ++u) {
            const int64_t j = i + u * W;
            const vf p = load(room.p + j), q = load(room.q + j), w = load(room.w + j);
            // Exact for logits alike. NaN where both are masked: neither near nor of any weight.
            const vf d = (p - q) - c;
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
    const auto write = [&](const Matrix& matrix, const float* from) {
        char* to = const_cast<char*>(address(matrix, row, 0));
        switch (matrix.dtype) {
            case Dtype::bfloat16: convert(from, n, reinterpret_cast<BFloat16*>(to)); break;
            case Dtype::float16: convert(from, n, reinterpret_cast<Float16*>(to)); break;
            default: convert(from, n, reinterpret_cast<float*>(to));
        }
    };
    bool undefined_p;
    const float m_p = finite_base(read(problem.reference, room.p, undefined_p));
    const double z_p = weigh_row(room.p, padded, m_p, room.w);
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
            write(problem.dqs[k], room.t);
            continue;
        }
        bool undefined_q;
        const float m_q = finite_base(read(problem.circuits[k], room.q, undefined_q));
        const double z_q = weigh_row(room.q, padded, m_q, room.e);
        const bool defined = z_p > 0 && z_q > 0 && !undefined_p && !undefined_q;
        const double scale = defined ? grad / z_p : __builtin_nan("");
        gradient_of_circuit(room, padded, likeliest, z_p, z_q, double(m_p) - double(m_q), scale,
                            wanted ? room.e : nullptr, total);
        if (wanted) write(problem.dqs[k], room.e);
    }
    if (total) write(problem.dp, total);
    return true;
}
