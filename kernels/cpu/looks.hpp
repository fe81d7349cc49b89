// The passes over a block while it is in the cache: three kinds of looks.
//
// p, a = p - m_p and w = e^a of the reference are float32 and padded to whole groups of lanes by
// tokens without mass; q is a circuit's, in its own dtype and of any alignment. MASKED looks take
// any logits, the others only finite ones: anything else shows as a sum that is not finite.

constexpr int64_t kGroup = kLanes;
// Elements summed in float32 before the lanes go to float64: 32 a lane, so that a sum of positive
// terms is off by less than 32 half ulps, 2e-6, whatever the terms, and by about 5e-8 typically.
constexpr int64_t kChunk = 32 * kGroup;

// A sum in 16 float32 lanes, and in as many float64 lanes beyond a chunk.
struct Sum {
    vf part[U] = {};
    vd total[U] = {};

    void fold() {
        for (int u = 0; u < U; ++u) {
            total[u] += __builtin_convertvector(part[u], vd);
            part[u] = vf{};
        }
    }

    double value() const {
        double lanes[kLanes];
        __builtin_memcpy(lanes, total, sizeof lanes);
        for (int width = kLanes / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
        return lanes[0];
    }
};

// A block of the reference.
struct Block {
    const float* p;
    const float* a;
    const float* w;
    int64_t n;
    float max;    // m_p; -inf without mass
    double sum;   // Σ w; NaN if a logit is NaN or +inf
    double first; // Σ w of the first kChunk tokens
    bool masked;  // a logit is -inf
};

struct Exponentials {
    double y;  // Σ e^(q - base)
    double s;  // Σ w d, with d = (p - m_p) - (q - base)
    bool undefined;  // a NaN or +inf in q (MASKED only)
    bool infinite;   // q = -inf where p is finite (MASKED only)
};

struct Divergence {
    double s;  // Σ w d, with d = p - q - c
    double h;  // Σ w φ(d)
};

// Calls body(offset, pointer to q) for groups of kGroup tokens, `bare` for whole ones and `padded`
// for the rest, which is copied and padded by -inf; fold() after each chunk.
template <class T, class Bare, class Padded, class Fold>
inline __attribute__((always_inline)) void for_groups(const T* q, int64_t n, const char* ahead,
                                                      Bare bare, Padded padded, Fold fold) {
    const int64_t whole = n - n % kGroup;
    for (int64_t i = 0; i < whole;) {
        const int64_t end = i + kChunk < whole ? i + kChunk : whole;
        for (; i < end; i += kGroup) {
            // The next circuit's block is elsewhere in memory: no prefetcher guesses that. To the
            // second level only: to the first it was slower by a tenth.
            __builtin_prefetch(ahead + i * int64_t(sizeof(T)), 0, 2);
            bare(i, q + i);
        }
        fold();
    }
    if (whole < n) {
        T rest[kGroup];
        for (int64_t j = 0; j < kGroup; ++j)
            rest[j] = whole + j < n ? q[whole + j] : minus_infinity<T>();
        padded(whole, rest);
        fold();
    }
}

template <class T> float maximum(const T* q, int64_t n) {
    vf high = splat(-__builtin_inff());
    const auto group = [&](int64_t, const T* from) {
        // In this order a NaN is dropped.
        for (int u = 0; u < U; ++u) high = max(load(from + u * W), high);
    };
    for_groups(q, n, reinterpret_cast<const char*>(q), group, group, [] {});
    return largest(high);
}

// Look 1: the circuit's exponentials, and the first moment of d. One exponential a token.
template <class T, bool MASKED>
Exponentials sum_exponentials(const Block& block, const T* q, float base, const char* ahead) {
    constexpr float inf = __builtin_inff();
    Sum y, s;
    vi undefined = {}, infinite = {};
    const auto group = [&](auto masked, int64_t i, const T* from) {
        for (int u = 0; u < U; ++u) {
            vf x = load(from + u * W) - base;
            // A finite logit keeps a finite x, as it keeps a finite a.
            if constexpr (masked) x = max(x, splat(-__FLT_MAX__));
            vf e = exponential<masked>(x);
            vf d = load(block.a + i + u * W) - x;
            if constexpr (masked) {
                const vf logit = load(from + u * W);
                const vi no_p = load(block.p + i + u * W) == -inf;
                const vi no_q = logit == -inf;
                undefined |= ~(logit < inf);
                infinite |= no_q & ~no_p;
                e = no_q ? vf{} : e;
                d = no_p ? vf{} : d;
            }
            y.part[u] += e;
            s.part[u] = fma(load(block.w + i + u * W), d, s.part[u]);
        }
    };
    for_groups(
        q, block.n, ahead, [&](int64_t i, const T* from) { group(Flag<MASKED>{}, i, from); },
        [&](int64_t i, const T* from) { group(Flag<true>{}, i, from); },
        [&] { y.fold(), s.fold(); });
    return {y.value(), s.value(), any(undefined), any(infinite)};
}

// Look 2: the divergence without cancellation. Tokens with |d| >= kNear, and those without
// reference mass, take w φ(d) = e^(q - base) + w (d - 1), where base = m_p - c: what rounding takes
// from it, 4e-6 where logits are 100, is as much of the circuit's mass, and is given back.
template <class T, bool MASKED>
Divergence sum_divergence(const Block& block, const T* q, float base, float c, const char* ahead) {
    constexpr float inf = __builtin_inff();
    const float lost = block.max > -inf ? float((double(block.max) - c) - base) : 0.0f;
    Sum s, h;
    const auto group = [&](auto masked, int64_t i, const T* from) {
        vf d[U], square[U], largest_square = {};
        for (int u = 0; u < U; ++u) {
            const vf p = load(block.p + i + u * W);
            // Exact for logits alike, unlike the difference of a and q - base.
            d[u] = (p - load(from + u * W)) - c;
            if constexpr (masked) d[u] = p == -inf ? vf{} : d[u];
            square[u] = d[u] * d[u];
            vf extent = square[u];
            if constexpr (masked) extent = p == -inf ? splat(kNear * kNear) : extent;
            largest_square = u == 0 ? extent : max(extent, largest_square);
        }
        if (__builtin_expect(any_at_least(largest_square, kNear * kNear), 0)) {
            for (int u = 0; u < U; ++u) {
                const vf x = load(from + u * W);
                const vf w = load(block.w + i + u * W);
                vf e = exponential<true>((x - base) - lost);
                if constexpr (masked) e = x == -inf ? vf{} : e;
                vi far = square[u] >= kNear * kNear;
                if constexpr (masked) far |= load(block.p + i + u * W) == -inf;
                const vf t = w * d[u];
                const vf near = w * (square[u] * phi_over_square(d[u]));
                s.part[u] += t;
                h.part[u] += far ? e + (t - w) : near;
            }
        } else {
            for (int u = 0; u < U; ++u) {
                const vf w = load(block.w + i + u * W);
                s.part[u] = fma(w, d[u], s.part[u]);
                h.part[u] = fma(w, square[u] * phi_over_square(d[u]), h.part[u]);
            }
        }
    };
    for_groups(
        q, block.n, ahead, [&](int64_t i, const T* from) { group(Flag<MASKED>{}, i, from); },
        [&](int64_t i, const T* from) { group(Flag<true>{}, i, from); },
        [&] { s.fold(), h.fold(); });
    return {s.value(), h.value()};
}

// Reads a block of the reference into `scratch`: its logits, its weights, and what they sum to.
template <class T> Block read_reference(const T* p, int64_t n, Scratch& scratch) {
    constexpr float inf = __builtin_inff();
    vf high = splat(-inf);
    vi undefined = {};
    const auto copy = [&](int64_t i, const T* from) {
        for (int u = 0; u < U; ++u) {
            const vf x = load(from + u * W);
            high = max(x, high);
            undefined |= ~(x < inf);
            store(scratch.p + i + u * W, x);
        }
    };
    for_groups(p, n, reinterpret_cast<const char*>(p), copy, copy, [] {});

    Block block{scratch.p, scratch.a, scratch.w, n, largest(high), 0.0, 0.0, false};
    const float base = block.max == -inf ? 0.0f : block.max;
    // The same exponentials in the same order as a circuit's: identical rows have identical sums.
    Sum z;
    vi masked = {};
    const auto weigh = [&](int64_t i, const float*) {
        for (int u = 0; u < U; ++u) {
            const vf p = load(scratch.p + i + u * W);
            const vi none = p == -inf;
            // A finite logit keeps a finite a, or its weight of 0 would not take it out of a sum.
            const vf a = none ? p : max(p - base, splat(-__FLT_MAX__));
            const vf e = none ? vf{} : exponential<true>(a);
            masked |= i + (u + 1) * W <= n ? none : vi{};
            z.part[u] += e;
            store(scratch.a + i + u * W, a);
            store(scratch.w + i + u * W, a < kLowest ? vf{} : e);
        }
    };
    bool first = true;
    for_groups(scratch.p, n, reinterpret_cast<const char*>(p), weigh, weigh, [&] {
        z.fold();
        if (first) block.first = z.value();
        first = false;
    });
    // The last group may be padding for the most part: its own tokens are asked one by one.
    for (int64_t i = n - n % kGroup; i < n; ++i) block.masked |= scratch.p[i] == -inf;
    block.masked |= any(masked);
    block.sum = any(undefined) ? __builtin_nan("") : z.value();
    return block;
}
