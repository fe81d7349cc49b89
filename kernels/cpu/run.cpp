// The levels of this build, and the distribution of rows over threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "kl.hpp"
#include "threads.hpp"

namespace fastkl {

extern const Level level_baseline;
#if defined(__x86_64__)
extern const Level level_avx2;
extern const Level level_avx512;
#endif

const Level* const* levels() {
    static const Level* found[4] = {};
    static const bool filled = [] {
        int n = 0;
#if defined(__x86_64__)
        __builtin_cpu_init();
        for (const Level* level : {&level_avx512, &level_avx2})
            if (level->supported()) found[n++] = level;
#endif
        found[n] = &level_baseline;
        return true;
    }();
    static_cast<void>(filled);
    return found;
}

namespace {

// Starting a thread takes about as long as measuring this many logits.
constexpr int64_t kPairsPerThread = 1 << 16;
// From this many rows per thread on, a row is one task, and its slices' states need no room.
constexpr int64_t kRowsPerThread = 4;

// One call of run().
class Job {
  public:
    Job(const Level& level, const Problem& problem, const Output& output, int team,
        const Poll& caller)
        : level_(level), problem_(problem), output_(output), caller_(caller), team_(team) {
        length_ = piece_length(problem.n_cols, kSlice);
        n_slices_ = (problem.n_cols + length_ - 1) / length_;
        const int64_t pairs = problem.n_rows * problem.n_cols * problem.n_circuits;
        n_threads_ = useful_threads(problem.n_rows * n_slices_, pairs, kPairsPerThread, team);
        by_rows_ = n_slices_ == 1 || problem.n_rows >= kRowsPerThread * n_threads_;
        n_tasks_ = by_rows_ ? problem.n_rows : problem.n_rows * n_slices_;
        if (!by_rows_) states_.resize(n_tasks_ * problem.n_circuits);
        // Allocate everything here, where running out of memory can be reported.
        for (int64_t i = 0; i < n_threads_; ++i) rooms_.push_back(Room(problem.n_circuits));
    }

    bool run() {
        const auto work = [this](int64_t task, int64_t thread, const Poll& poll) {
            return by_rows_ ? measure_row(task, rooms_[thread], poll)
                            : measure(task / n_slices_, task % n_slices_,
                                      &states_[task * problem_.n_circuits], rooms_[thread], poll);
        };
        if (!run_tasks(n_tasks_, n_threads_, team_, caller_, work)) return false;
        if (!by_rows_) {
            for (int64_t row = 0; row < problem_.n_rows; ++row) {
                State* states = &states_[row * n_slices_ * problem_.n_circuits];
                for (int64_t i = 1; i < n_slices_; ++i)
                    absorb(states, states + i * problem_.n_circuits);
                write(row, states);
            }
        }
        return true;
    }

  private:
    struct Room {
        explicit Room(int64_t n_circuits)
            : scratch(new Scratch), row(n_circuits), slice(n_circuits), looks(n_circuits) {}

        std::unique_ptr<Scratch> scratch;
        std::vector<State> row, slice;
        std::vector<Look> looks;
    };

    bool measure_row(int64_t row, Room& room, const Poll& poll) {
        for (int64_t i = 0; i < n_slices_; ++i) {
            State* states = i == 0 ? room.row.data() : room.slice.data();
            if (!measure(row, i, states, room, poll)) return false;
            if (i > 0) absorb(room.row.data(), states);
        }
        write(row, room.row.data());
        return true;
    }

    bool measure(int64_t row, int64_t i, State* states, Room& room, const Poll& poll) {
        const int64_t begin = i * length_;
        const int64_t end = std::min(begin + length_, problem_.n_cols);
        return level_.slice(problem_, row, begin, end, states, room.looks.data(), *room.scratch,
                            poll);
    }

    void absorb(State* states, const State* slice) const {
        const Shares share = shares(states[0].p, slice[0].p);
        for (int64_t k = 0; k < problem_.n_circuits; ++k)
            states[k] = merge(share, states[k], slice[k]);
    }

    void write(int64_t row, const State* states) const {
        for (int64_t k = 0; k < problem_.n_circuits; ++k) {
            const int64_t i = k * problem_.n_rows + row;
            if (output_.kl) output_.kl[i] = static_cast<float>(finalize(states[k]));
            if (output_.states) output_.states[i] = states[k];
        }
    }

    const Level& level_;
    const Problem& problem_;
    const Output& output_;
    const Poll& caller_;
    int team_;
    int64_t length_, n_slices_, n_threads_, n_tasks_;
    bool by_rows_;
    std::vector<State> states_;
    std::vector<Room> rooms_;
};

}  // namespace

bool run(const Level& level, const Problem& problem, const Output& output, int n_threads,
         const Poll& keep_going) {
    if (problem.n_rows <= 0 || problem.n_cols <= 0 || problem.n_circuits <= 0) return true;
    return Job(level, problem, output, n_threads, keep_going).run();
}

}  // namespace fastkl
