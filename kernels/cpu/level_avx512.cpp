// x86-64 with AVX-512 F, BW, DQ and VL: about 2017 on.
#if defined(__x86_64__)
#define LEVEL_NAME "avx512"
#define LEVEL_TABLE level_avx512
#define LEVEL_SUPPORTED                                                       \
    (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
#include "slice.hpp"
#endif
