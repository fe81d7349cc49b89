// Divergences of rows of logits: what the files of this folder share.
//
// For the KL divergence the vocabulary is cut into slices, and each slice into blocks. Each piece is
// summarized by a `State`. The cuts depend on the vocabulary's size alone, and pieces are merged from
// left to right, so that a row's bits depend neither on the number of threads nor on the rows around it.
#pragma once

#include <cstdint>

namespace fastkl {

// The largest number of elements in a block: what is kept of the reference, 144 KiB, stays in the
// second-level cache while all circuits of the block stream past it.
constexpr int64_t kBlock = 12288;
constexpr int64_t kSlice = 32768;

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Rows of logits: contiguous along the vocabulary; the stride from row to row counts elements.
struct Matrix {
    const void* data;
    int64_t row_stride;
    Dtype dtype;
};

struct Problem {
    const Matrix* circuits;
    int64_t n_circuits;
    Matrix reference;
    int64_t n_rows;
    int64_t n_cols;
    double temperature;
};

// A row's mass over a piece of the vocabulary: Σ e^logit = sum · e^max. `max` is some number near the
// largest logit, and means nothing if `sum` is 0. A NaN in `sum` means that the row has no answer. The
// two are kept apart, since in a single number a large `max` would round the logarithm of `sum` away.
struct Mass {
    double max;
    double sum;
};

// The summary of a piece of the vocabulary: both rows' masses, and the divergence of the two
// distributions given that the token lies in the piece.
struct State {
    Mass p;
    Mass q;
    double kl;
};

// Inputs and outputs of the gradients of Σ grad · KL. A gradient whose matrix has no data is not
// wanted.
struct GradientProblem {
    const double* grad;   // (K, R), with the temperature's inverse included
    const State* states;  // (K, R), of logits divided by the temperature
    const Matrix* circuits;
    const Matrix* dqs;
    int64_t n_circuits;
    Matrix reference;
    Matrix dp;
    int64_t n_rows;
    int64_t n_cols;
    double temperature;
};

// A thread's buffers for a gradient, one row each: 8 bytes per token, or 16 with the reference's
// gradient, to stay in the second-level cache. The last two are null if the reference's gradient is not
// wanted.
struct GradientRoom {
    float *w, *t;   // e^(p - m_p); t, and then the circuit's gradient
    float *first;   // w (d - kl)
    float *total;   // the reference's gradient so far
};

// The weights of a mixture of two distributions, the heavier one first, and the constants that follow
// from them: see jensen_shannon.hpp, which also says what the polynomials approximate.
struct Mixture {
    static constexpr int kTerms = 8;

    // `lighter` is the weight of the lighter side. A weight below 1e-30 counts as 1e-30.
    explicit Mixture(double lighter);

    float heavy, light;
    float log_heavy, log_light;
    float light_over_heavy, heavy_over_light;
    float even;  // the log-ratio at which both sides contribute equally to the mixture
    float divergence[kTerms], share[kTerms];
};

// Inputs of the Jensen-Shannon divergences of rows. In every pair of sides, here and below, the side
// with the heavier weight comes first.
struct JsProblem {
    Matrix sides[2];
    int64_t n_rows;
    int64_t n_cols;
    Mixture mixture;
    float inverse_temperature;
};

// Outputs of the gradients of Σ grad · JS. A gradient whose matrix has no data is not wanted. `grad` is
// (R), and includes the temperature's inverse.
struct JsGradients {
    const double* grad;
    Matrix sides[2];
};

// A thread's buffers for one side's gradient, one row each: the tokens' masses, not normalized, and each
// mass times its token's worth (see JsWorths). Both are null if the side's gradient is not wanted.
struct JsRoom {
    float *mass, *worth;
};

// The summary of one side's row, with x = (logit - max) / temperature. `sum` is NaN if a logit is NaN or
// +inf, and 0 if all logits are -inf.
struct Summary {
    double max;         // the largest logit
    double sum;         // Σ e^x
    double below;       // Σ x e^x, if requested
    int64_t likeliest;  // the first index of the largest logit
};

// Inputs of the summaries of all rows of all sides. Only the first side's summaries have `below`.
struct SummaryProblem {
    const Matrix* sides;
    int64_t n_sides;
    int64_t n_rows;
    int64_t n_cols;
    float inverse_temperature;
};

// How a circuit's block is looked at: see looks.hpp. `exponentials` is enough only for large
// divergences. The next three are for other blocks: `near` if hardly any token has |d| >= kNear, `wide`
// if hardly any has |d| >= kWide, and `far` if so many have that a branch on it would be mispredicted.
// Blocks that need several looks are looked at `alone`.
enum class Look : uint8_t { exponentials, near, wide, far, alone };

// The largest number of circuits whose blocks are looked at together.
constexpr int kMostTogether = 4;

// A thread's memory besides the inputs. `divided` is used only if a temperature divides the logits.
struct Scratch {
    alignas(64) float p[kBlock + 64];
    alignas(64) float a[kBlock + 64];
    alignas(64) float w[kBlock + 64];
    alignas(64) float divided[kMostTogether][kBlock + 64];
};

// Called before every block, or other piece of work; returning false stops the work.
struct Poll {
    bool (*keep_going)(void*);
    void* context;
};

// One instruction-set level.
struct Level {
    const char* name;
    bool (*supported)();
    // Sets states[k] to the state of circuit k over columns [begin, end) of a row, of logits divided by
    // the temperature. looks[k] is room for the look that the circuit's next block is likely to need.
    // Returns false if it was stopped.
    bool (*slice)(const Problem&, int64_t row, int64_t begin, int64_t end, State* states,
                  Look* looks, Scratch&, const Poll&);
    // Writes the gradients of one row. Returns false if it was stopped.
    bool (*gradient)(const GradientProblem&, int64_t row, const GradientRoom&, const Poll&);
    // Returns the Jensen-Shannon divergence of one row.
    float (*js)(const JsProblem&, int64_t row, Scratch&);
    // Writes one row of the gradients of the Jensen-Shannon divergence.
    void (*js_gradient)(const JsProblem&, const JsGradients&, int64_t row, Scratch&,
                        const JsRoom (&)[2]);
    // Returns the summary of one row of one side.
    Summary (*summarize)(const SummaryProblem&, int64_t side, int64_t row, Scratch&);
    // Set y = e^x, y = log x, and y = φ(d) / d² by the shorter or the longer series, for the tests of
    // their error bounds.
    void (*exponential)(const float* x, float* y, int64_t n);
    void (*logarithm)(const float* x, const float* rest, float* y, int64_t n);
    void (*phi_over_square)(const float* d, float* y, int64_t n, bool wide);
};

// Returns a temperature's inverse as a float32, but never 0 or inf, so that -inf times it stays -inf.
float inverse_of(double temperature);

// The levels of this build that this processor can run, best first, ended by a null pointer.
const Level* const* levels();

// Returns the length of the pieces that `n` elements are cut into: as few pieces as `most` allows, of
// the same length, which is a multiple of 64. Static, since each level compiles it with its own
// instructions.
static inline int64_t piece_length(int64_t n, int64_t most) {
    const int64_t count = (n + most - 1) / most;
    return ((n + count - 1) / count + 63) / 64 * 64;
}

// How two disjoint pieces share a row's mass.
struct Shares {
    Mass total;
    double first, second;
    double log_first, log_second;
};

Shares shares(const Mass& first, const Mass& second);

// Returns the log-ratio of two masses, or 0 if it is next to nothing. The masses of identical rows may
// differ in their last digits, since the exponentials of unlikely tokens are clamped below a different
// logit on each side, but the divergence of identical rows must be exactly 0. Static for the same reason
// as piece_length().
static inline double without_rounding(double log_ratio) {
    return log_ratio > -0x1p-50 && log_ratio < 0x1p-50 ? 0.0 : log_ratio;
}

// Returns the log of p's mass over q's.
double log_ratio(const Mass& p, const Mass& q);

// Returns the combined state of two disjoint pieces, by the chain rule of the divergence: the divergence
// of the shares themselves, plus each piece's divergence times the reference's share. No term is
// negative. The reference's shares are the same for all circuits.
State merge(const Shares& reference, const State& first, const State& second);

// Returns the divergence of a state that covers the whole vocabulary, in nats.
double finalize(const State&);

// Where the results go: one float per circuit and row (K, R), and its state (K, R). Either may be null.
struct Output {
    float* kl;
    State* states;
};

// Computes all rows with up to `n_threads` threads, including the calling thread. Only the calling
// thread calls `keep_going`. Returns false if it was stopped.
bool run(const Level&, const Problem&, const Output&, int n_threads, const Poll& keep_going);
bool run(const Level&, const GradientProblem&, int n_threads, const Poll& keep_going);
bool run(const Level&, const JsProblem&, float* js, int n_threads, const Poll& keep_going);
bool run(const Level&, const JsProblem&, const JsGradients&, int n_threads,
         const Poll& keep_going);
// `summaries` is (sides, R).
bool run(const Level&, const SummaryProblem&, Summary* summaries, int n_threads,
         const Poll& keep_going);

}  // namespace fastkl
