// The distribution of a gradient's rows over threads.
#include <algorithm>
#include <vector>

#include "kl.hpp"
#include "threads.hpp"

namespace fastkl {
namespace {

// Starting a thread takes about as long as the gradients of this many logits.
constexpr int64_t kPairsPerThread = 1 << 15;

}  // namespace

bool run(const Level& level, const GradientProblem& problem, int n_threads,
         const Poll& keep_going) {
    if (problem.n_rows <= 0 || problem.n_cols <= 0) return true;
    const int64_t pairs = problem.n_rows * problem.n_cols * std::max<int64_t>(1, problem.n_circuits);
    const int64_t n = useful_threads(problem.n_rows, pairs, kPairsPerThread, n_threads);
    // Allocate everything here, where running out of memory can be reported.
    const bool both = problem.dp.data != nullptr;
    std::vector<RowBuffers> buffers;
    for (int64_t i = 0; i < n; ++i) buffers.emplace_back(problem.n_cols, both ? 4 : 2);
    const auto work = [&](int64_t row, int64_t i, const Poll& poll) {
        const RowBuffers& room = buffers[i];
        float* const none = nullptr;
        return level.gradient(
            problem, row, {room[0], room[1], both ? room[2] : none, both ? room[3] : none}, poll);
    };
    return run_tasks(problem.n_rows, n, n_threads, keep_going, work);
}

}  // namespace fastkl
