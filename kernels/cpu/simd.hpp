// SIMD vectors of W floats: compiler vector extensions, and the few operations that differ between
// levels.
//
// Each level compiles this header, and the headers that include it, with its own instructions. Their
// code is in an unnamed namespace, so that the linker cannot replace one level's functions with
// another's. For the same reason it calls C functions such as ::log, and no function of the C++ library.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastkl {
namespace {

// A call that is not inlined would keep sums in memory, not in registers.
#define INLINE_LAMBDA __attribute__((always_inline))
#define INLINE inline INLINE_LAMBDA

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// Every level keeps its sums in 16 lanes: U vectors.
constexpr int kLanes = 16;
constexpr int U = kLanes / W;

typedef float vf __attribute__((vector_size(4 * W)));
typedef double vd __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

inline vf splat(float x) { return x - vf{}; }

// Returns a b + c, rounded once if the level has a fused multiply-add.
inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// If a is NaN, the result is b. If b is NaN, the result depends on the level.
inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#elif defined(__aarch64__)
    return (vf)vmaxnmq_f32((float32x4_t)a, (float32x4_t)b);
#else
    return a > b ? a : b;
#endif
}

inline vf min(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vf)_mm_min_ps((__m128)a, (__m128)b);
#elif defined(__aarch64__)
    return (vf)vminnmq_f32((float32x4_t)a, (float32x4_t)b);
#else
    return a < b ? a : b;
#endif
}

// The first and the last W / 2 lanes, as float64. Written with intrinsics, since GCC moves the parts of
// vectors twice as long as the level's own through general registers.
inline vd first_half(vf x) {
#if defined(__AVX512F__)
    return (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
#elif defined(__AVX2__)
    return (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
#elif defined(__SSE2__)
    return (vd)_mm_cvtps_pd((__m128)x);
#elif defined(__aarch64__)
    return (vd)vcvt_f64_f32(vget_low_f32((float32x4_t)x));
#else
    return vd{x[0], x[1]};
#endif
}

inline vd last_half(vf x) {
#if defined(__AVX512F__)
    return (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
#elif defined(__AVX2__)
    return (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#elif defined(__SSE2__)
    return (vd)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x));
#elif defined(__aarch64__)
    return (vd)vcvt_high_f64_f32((float32x4_t)x);
#else
    return vd{x[2], x[3]};
#endif
}

inline bool any(vi mask) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)mask) != 0;
#elif defined(__aarch64__)
    return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
    int32_t found = 0;
    for (int i = 0; i < W; ++i) found |= mask[i];
    return found != 0;
#endif
}

// Whether any lane of x is at least as large as the bound; a NaN is not.
inline bool any_at_least(vf x, float bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bound), _CMP_GE_OQ) != 0;
#else
    return any(x >= bound);
#endif
}

// Whether all lanes of all vectors are below their vector's bound; a NaN is not.
class Below {
  public:
#if defined(__AVX512F__)
    INLINE void add(vf x, float bound) {
        below_ = _mm512_mask_cmp_ps_mask(below_, x, _mm512_set1_ps(bound), _CMP_LT_OQ);
    }
    INLINE bool all() const { return below_ == 0xffff; }

  private:
    __mmask16 below_ = 0xffff;
#else
    INLINE void add(vf x, float bound) { not_below_ |= ~(x < bound); }
    INLINE bool all() const { return !any(not_below_); }

  private:
    vi not_below_ = {};
#endif
};

// Returns a 2^n for an integer n of any size, if the level has the instruction; inf or 0 beyond float's
// range.
#if defined(__AVX512F__)
constexpr bool kScales = true;
inline vf scale(vf a, vf n) { return (vf)_mm512_scalef_ps((__m512)a, (__m512)n); }
#else
constexpr bool kScales = false;
inline vf scale(vf a, vf) { return a; }
#endif

inline float largest(vf x) {
    float result = x[0];
    for (int i = 1; i < W; ++i) result = x[i] > result ? x[i] : result;
    return result;
}

inline int64_t total(vi x) {
    int64_t sum = 0;
    for (int i = 0; i < W; ++i) sum += x[i];
    return sum;
}

inline void store(float* to, vf x) { __builtin_memcpy(to, &x, sizeof x); }

inline vf load(const float* from) {
    vf x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline vh load_bits(const void* from) {
    vh x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

inline vf load(const BFloat16* from) {
#if defined(__AVX512F__)
    // The compiler's own conversion takes three instructions: it joins two halves.
    return (vf)((vu)_mm512_cvtepu16_epi32((__m256i)load_bits(from)) << 16);
#elif defined(__AVX2__)
    // Broadcast the load to both halves, then shuffle once: instead of two shuffles and a shift.
    const __m256i twice = _mm256_broadcastsi128_si256((__m128i)load_bits(from));
    const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,
                                            -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1,
                                            14, 15);
    return (vf)_mm256_shuffle_epi8(twice, places);
#else
    return (vf)(__builtin_convertvector(load_bits(from), vu) << 16);
#endif
}

inline vf load(const Float16* from) {
#if defined(__F16C__)
#if defined(__AVX512F__)
    vf x = (vf)_mm512_cvtph_ps((__m256i)load_bits(from));
#else
    vf x = (vf)_mm256_cvtph_ps((__m128i)load_bits(from));
#endif
#if defined(__clang__)
    // If Clang saw the conversion, it would compare x == -inf in float16, one lane at a time.
    asm("" : "+v"(x));
#endif
    return x;
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16((float16x4_t)load_bits(from));
#else
    const vu bits = __builtin_convertvector(load_bits(from), vu);
    const vu sign = (bits & 0x8000) << 16;
    // Exponent and fraction at float's bit positions: the value times 2^-112, subnormals included.
    const vu shifted = (bits & 0x7fff) << 13;
    // Multiplying a subnormal by 2^112 would flush it to 0, so its fraction is converted as an integer.
    const vf subnormal = __builtin_convertvector((vi)(bits & 0x3ff), vf) * 0x1p-24f;
    const vu normal = shifted + (112u << 23);
    const vu special = shifted | 0x7f800000u;
    const vu exponent = bits & 0x7c00;
    const vu magnitude = exponent == 0 ? (vu)subnormal : exponent == 0x7c00 ? special : normal;
    return (vf)(magnitude | sign);
#endif
}

template <class T> inline T minus_infinity();
template <> inline float minus_infinity<float>() { return -__builtin_inff(); }
template <> inline BFloat16 minus_infinity<BFloat16>() { return {0xff80}; }
template <> inline Float16 minus_infinity<Float16>() { return {0xfc00}; }

// Flushes subnormal numbers to 0 during its lifetime: nothing here needs them, and some processors take
// a hundred times as long for each.
class FlushSubnormals {
  public:
#if defined(__SSE2__)
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#elif defined(__aarch64__)
    FlushSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t(1) << 24)));
    }
    ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

  private:
    uint64_t before_;
#else
    FlushSubnormals() {}
    ~FlushSubnormals() {}
#endif
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace
}  // namespace fastkl
