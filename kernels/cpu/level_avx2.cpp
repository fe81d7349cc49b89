// x86-64 with AVX2, FMA and F16C: about 2013 on.
#if defined(__x86_64__)
#define LEVEL_NAME "avx2"
#define LEVEL_TABLE level_avx2
#define LEVEL_SUPPORTED                                                       \
    (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&       \
     __builtin_cpu_supports("f16c"))
#include "slice.hpp"
#endif
