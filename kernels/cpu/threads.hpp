// The distribution of tasks over threads, and the memory that each thread has to itself.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "kl.hpp"
#include "team.hpp"

namespace fastkl {

// Returns how many of `n_threads` threads are worth starting for the tasks: starting one takes about as
// long as `worth` logits.
inline int64_t useful_threads(int64_t n_tasks, int64_t n_logits, int64_t worth, int n_threads) {
    const int64_t useful = std::min(n_tasks, 1 + n_logits / worth);
    return std::max<int64_t>(1, std::min<int64_t>(n_threads, useful));
}

// Returns the scratch memory of `n_threads` threads.
inline std::vector<std::unique_ptr<Scratch>> scratch_for(int64_t n_threads) {
    std::vector<std::unique_ptr<Scratch>> scratch;
    for (int64_t i = 0; i < n_threads; ++i) scratch.emplace_back(new Scratch);
    return scratch;
}

// `count` rows of float32 for one thread, aligned to cache lines.
class RowBuffers {
  public:
    RowBuffers(int64_t n_cols, int count) : length_((n_cols + 63) / 64 * 64) {
        memory_.reset(new float[length_ * count + 16]);
        const auto address = reinterpret_cast<uintptr_t>(memory_.get());
        first_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
    }

    float* operator[](int i) const { return first_ + i * length_; }

  private:
    int64_t length_;
    std::unique_ptr<float[]> memory_;
    float* first_;
};

// Hands out tasks by a counter. `work(task, thread, poll)` returns false if the poll stopped it. The
// calling thread is thread 0, and the only one that calls `caller`. `work` must not throw: all memory
// must be allocated before.
template <class Work> class Tasks {
  public:
    Tasks(int64_t n_tasks, int64_t n_threads, const Poll& caller, const Work& work)
        : n_tasks_(n_tasks), n_threads_(n_threads), caller_(caller), work_(work) {}

    // Runs the tasks on PyTorch's team of `team` threads, or, without one, on threads of our own.
    // Returns false if it was stopped.
    bool run(int team) {
        if (n_threads_ == 1) {
            take(0);
        } else if (!run_on_team(join, this, team)) {
            run_on_own_threads();
        }
        return !stop_;
    }

  private:
    void run_on_own_threads() {
        std::vector<std::thread> threads;
        threads.reserve(n_threads_);
        try {
            for (int64_t i = 1; i < n_threads_; ++i) threads.emplace_back(join, this);
        } catch (const std::system_error&) {
            // Use as many threads as the system gives; the calling thread does what is left.
        } catch (const std::bad_alloc&) {
            // Use as many threads as there is memory for.
        }
        take(0);
        for (std::thread& thread : threads) thread.join();
    }

    // The function that each thread runs. A team may have more threads than there is work for.
    static void join(void* context) {
        Tasks& tasks = *static_cast<Tasks*>(context);
        const bool calls = std::this_thread::get_id() == tasks.calling_;
        const int64_t thread = calls ? 0 : tasks.joined_.fetch_add(1) + 1;
        if (thread < tasks.n_threads_) tasks.take(thread);
    }

    static bool keep_going(void* tasks) { return !static_cast<Tasks*>(tasks)->stop_; }

    static bool ask_caller(void* context) {
        Tasks& tasks = *static_cast<Tasks*>(context);
        if (!tasks.stop_ && !tasks.caller_.keep_going(tasks.caller_.context)) tasks.stop_ = true;
        return !tasks.stop_;
    }

    void take(int64_t thread) {
        const Poll poll{thread == 0 ? ask_caller : keep_going, this};
        for (int64_t task; (task = next_.fetch_add(1)) < n_tasks_;)
            if (!work_(task, thread, poll)) return;
    }

    const int64_t n_tasks_, n_threads_;
    const Poll& caller_;
    const Work& work_;
    const std::thread::id calling_ = std::this_thread::get_id();
    std::atomic<int64_t> joined_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<bool> stop_{false};
};

// Runs tasks on `n_threads` of the `team` threads that PyTorch has. Returns false if it was stopped.
template <class Work>
bool run_tasks(int64_t n_tasks, int64_t n_threads, int team, const Poll& caller, const Work& work) {
    return Tasks<Work>(n_tasks, n_threads, caller, work).run(team);
}

}  // namespace fastkl
