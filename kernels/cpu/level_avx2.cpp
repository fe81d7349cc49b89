// x86-64 with AVX2, FMA and F16C: about 2013 on.
#if defined(__x86_64__)
#include "level.hpp"

namespace fastkl {
namespace {

bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

}  // namespace

extern const Level level_avx2;
constexpr Level level_avx2 = level_table("avx2", supported);

}  // namespace fastkl
#endif
