// x86-64 with AVX2, FMA and F16C: from about 2013 on.
#if defined(__x86_64__)
#include <cpuid.h>

#include "level.hpp"

namespace fastkl {
namespace {

// Clang before 18 has no __builtin_cpu_supports("f16c").
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

}  // namespace

extern const Level level_avx2;
constexpr Level level_avx2 = level_table("avx2", supported);

}  // namespace fastkl
#endif
