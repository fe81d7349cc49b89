// The distribution of the summaries of rows over threads.
#include "kl.hpp"
#include "threads.hpp"

namespace fastkl {
namespace {

// Starting a thread takes about as long as summarizing this many logits.
constexpr int64_t kLogitsPerThread = 1 << 16;

}  // namespace

bool run(const Level& level, const SummaryProblem& problem, Summary* summaries, int n_threads,
         const Poll& keep_going) {
    const int64_t n_tasks = problem.n_sides * problem.n_rows;
    if (n_tasks <= 0 || problem.n_cols <= 0) return true;
    const int64_t n =
        useful_threads(n_tasks, n_tasks * problem.n_cols, kLogitsPerThread, n_threads);
    const auto scratch = scratch_for(n);
    const auto work = [&](int64_t task, int64_t i, const Poll& poll) {
        if (!poll.keep_going(poll.context)) return false;
        const int64_t side = task / problem.n_rows, row = task % problem.n_rows;
        summaries[task] = level.summarize(problem, side, row, *scratch[i]);
        return true;
    };
    return run_tasks(n_tasks, n, n_threads, keep_going, work);
}

}  // namespace fastkl
