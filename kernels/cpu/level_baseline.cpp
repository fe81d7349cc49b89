// Every processor of the architecture: SSE2 on x86-64, NEON on arm64.
#define LEVEL_NAME "baseline"
#define LEVEL_TABLE level_baseline
#define LEVEL_SUPPORTED true
#include "slice.hpp"
