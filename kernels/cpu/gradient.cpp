// How the rows of a gradient spread over threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "kl.hpp"

namespace fastkl {
namespace {

// A thread costs about as long to start as this many logits' gradients.
constexpr int64_t kPairsPerThread = 1 << 15;
constexpr int kBuffers = 7;

// A thread's buffers of a row each, on cache lines' boundaries.
class Buffers {
  public:
    explicit Buffers(int64_t n_cols) {
        const int64_t length = (n_cols + 63) / 64 * 64;
        memory_.reset(new float[length * kBuffers + 16]);
        const auto address = reinterpret_cast<uintptr_t>(memory_.get());
        float* first = reinterpret_cast<float*>((address + 63) / 64 * 64);
        const auto next = [&] { return std::exchange(first, first + length); };
        room = {next(), next(), next(), next(), next(), next(), next()};
    }

    GradientRoom room;

  private:
    std::unique_ptr<float[]> memory_;
};

class Job {
  public:
    Job(const Level& level, const GradientProblem& problem, int n_threads, const Poll& caller)
        : level_(level), problem_(problem), caller_(caller) {
        const int64_t pairs = problem.n_rows * problem.n_cols * std::max<int64_t>(1, problem.n_circuits);
        const int64_t useful = std::min(problem.n_rows, 1 + pairs / kPairsPerThread);
        const int64_t n = std::max<int64_t>(1, std::min<int64_t>(n_threads, useful));
        // All that is allocated is allocated here, where running out of memory can be reported.
        for (int64_t i = 0; i < n; ++i) buffers_.emplace_back(problem.n_cols);
    }

    bool run() {
        std::vector<std::thread> threads;
        threads.reserve(buffers_.size());
        try {
            for (std::size_t i = 1; i < buffers_.size(); ++i)
                threads.emplace_back([this, i] { work(buffers_[i].room, {keep_going, this}); });
        } catch (const std::system_error&) {
            // As many threads as the system gives; the calling one does what is left.
        }
        work(buffers_[0].room, {ask_caller, this});
        for (std::thread& thread : threads) thread.join();
        return !stop_;
    }

  private:
    static bool keep_going(void* job) { return !static_cast<Job*>(job)->stop_; }

    static bool ask_caller(void* context) {
        Job& job = *static_cast<Job*>(context);
        if (!job.stop_ && !job.caller_.keep_going(job.caller_.context)) job.stop_ = true;
        return !job.stop_;
    }

    void work(const GradientRoom& room, const Poll& poll) {
        for (int64_t row; (row = next_.fetch_add(1)) < problem_.n_rows;)
            if (!level_.gradient(problem_, row, room, poll)) return;
    }

    const Level& level_;
    const GradientProblem& problem_;
    const Poll& caller_;
    std::vector<Buffers> buffers_;
    std::atomic<int64_t> next_{0};
    std::atomic<bool> stop_{false};
};

}  // namespace

bool run(const Level& level, const GradientProblem& problem, int n_threads,
         const Poll& keep_going) {
    if (problem.n_rows <= 0 || problem.n_cols <= 0) return true;
    return Job(level, problem, n_threads, keep_going).run();
}

}  // namespace fastkl
