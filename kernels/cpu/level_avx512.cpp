// x86-64 with AVX-512 F, BW, DQ and VL: from about 2017 on.
#if defined(__x86_64__)
#include "level.hpp"

namespace fastkl {
namespace {

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

extern const Level level_avx512;
constexpr Level level_avx512 = level_table("avx512", supported);

}  // namespace fastkl
#endif
