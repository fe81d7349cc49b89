// Every processor of the architecture: SSE2 on x86-64, NEON on arm64.
#include "level.hpp"

namespace fastkl {
namespace {

bool supported() { return true; }

}  // namespace

extern const Level level_baseline;
constexpr Level level_baseline = level_table("baseline", supported);

}  // namespace fastkl
