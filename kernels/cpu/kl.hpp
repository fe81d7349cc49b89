// Divergences of rows of logits: what the files of this folder share.
//
// For the KL divergence the vocabulary is cut into slices, a slice into blocks, and each piece is summed
// up by a `State`. Where the cuts lie depends on the vocabulary's size alone, and pieces are merged from
// left to right, so that a row's bits depend neither on the number of threads nor on the rows around it.
#pragma once

#include <cstdint>

namespace fastkl {

// Elements of a block, at the most: what is kept of the reference, 144 KiB, stays in the second level cache
// while all circuits of the block stream past it.
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
// largest logit, -inf where `sum` is 0; a NaN in `sum` means that the row has no answer. Kept apart,
// since in one number a large `max` would round the logarithm of `sum` away.
struct Mass {
    double max;
    double sum;
};

// A piece of the vocabulary, summed up: both rows' masses, and the divergence of the two
// distributions given that the token lies in it.
struct State {
    Mass p;
    Mass q;
    double kl;
};

// Inputs and outputs of the gradients of Σ grad · KL. A gradient whose matrix has no data is not
// wanted.
struct GradientProblem {
    const double* grad;   // (K, R), the temperature's inverse in it
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

// A thread's buffers for a gradient, a row each: 8 bytes a token, 16 with the reference's, to stay in the
// second level cache. The last two are null where the reference's gradient is not wanted.
struct GradientRoom {
    float *w, *t;   // e^(p - m_p), and t, then the circuit's gradient
    float *first;   // w (d - kl)
    float *total;   // the reference's gradient so far
};

// A mixture of two distributions by its weights, the heavier first, and what follows from them:
// see jensen_shannon.hpp, which also says what the polynomials are of.
struct Mixture {
    static constexpr int kTerms = 8;

    // `lighter` is the weight of the lighter side. One below 1e-30 counts as 1e-30.
    explicit Mixture(double lighter);

    float heavy, light;
    float log_heavy, log_light;
    float light_over_heavy, heavy_over_light;
    float even;  // the log-ratio at which both sides have as much of the mixture
    float divergence[kTerms], share[kTerms];
};

// Inputs of the Jensen-Shannon divergences of rows. In every pair of sides, here and below, the one of
// the heavier weight is first.
struct JsProblem {
    Matrix sides[2];
    int64_t n_rows;
    int64_t n_cols;
    Mixture mixture;
    float inverse_temperature;
};

// Where the gradients of Σ grad · JS go: a matrix without data is not wanted. `grad` is (R), the
// temperature's inverse in it.
struct JsGradients {
    const double* grad;
    Matrix sides[2];
};

// A thread's buffers for them, a row each: tokens' masses, not normalized, and these times what a token's
// mass is worth. Both null for a side whose gradient is not wanted.
struct JsRoom {
    float *mass, *worth;
};

// One side's row by itself, x being (logit - max) / temperature. Where there is a NaN or +inf, `sum` is NaN,
// and of nothing but -inf it is 0.
struct Summary {
    double max;         // the largest logit
    double sum;         // Σ e^x
    double below;       // Σ x e^x, where it was asked for
    int64_t likeliest;  // where the largest logit stands first
};

// What is asked for the summaries of all rows of all sides; `below` of the first side alone.
struct SummaryProblem {
    const Matrix* sides;
    int64_t n_sides;
    int64_t n_rows;
    int64_t n_cols;
    float inverse_temperature;
};

// How a circuit's block is looked at: see looks.hpp. `exponentials` are enough for large divergences
// alone. The next three are for others: hardly any token has |d| >= kNear, or kWide, or so many have that
// a branch on it would be mispredicted. Blocks that need several looks are looked at `alone`.
enum class Look : uint8_t { exponentials, near, wide, far, alone };

// Circuits whose blocks are looked at together, at the most.
constexpr int kMostTogether = 4;

// What one thread needs beside the inputs; the last only where a temperature divides them.
struct Scratch {
    alignas(64) float p[kBlock + 64];
    alignas(64) float a[kBlock + 64];
    alignas(64) float w[kBlock + 64];
    alignas(64) float cooled[kMostTogether][kBlock + 64];
};

// Asked before every block; false stops the work.
struct Poll {
    bool (*keep_going)(void*);
    void* context;
};

// One instruction-set level.
struct Level {
    const char* name;
    bool (*supported)();
    // Sets states[k] to the state of circuit k over columns [begin, end) of a row, of logits divided by
    // the temperature; looks[k] is room for the look that its next block is likely to need. False if it
    // was stopped.
    bool (*slice)(const Problem&, int64_t row, int64_t begin, int64_t end, State* states,
                  Look* looks, Scratch&, const Poll&);
    // Writes the gradients of one row. False if it was stopped.
    bool (*gradient)(const GradientProblem&, int64_t row, const GradientRoom&, const Poll&);
    // Returns the Jensen-Shannon divergence of one row.
    float (*js)(const JsProblem&, int64_t row, Scratch&);
    // Writes one row of its gradients.
    void (*js_gradient)(const JsProblem&, const JsGradients&, int64_t row, Scratch&,
                        const JsRoom (&)[2]);
    // Returns the summary of one row of one side.
    Summary (*summarize)(const SummaryProblem&, int64_t side, int64_t row, Scratch&);
    // y = e^x, y = log x, and y = φ(d) / d² by the shorter or the longer series, for the tests of their error
    // bounds.
    void (*exponential)(const float* x, float* y, int64_t n);
    void (*logarithm)(const float* x, const float* rest, float* y, int64_t n);
    void (*phi_over_square)(const float* d, float* y, int64_t n, bool wide);
};

// A temperature's inverse as a float32 that is not rounded to 0 or inf, by which -inf stays what it is.
float inverse_of(double temperature);

// The levels of this build that this processor can run, best first, ended by a null pointer.
const Level* const* levels();

// The length of `n` elements' pieces: as few as `most` allows, alike, and a multiple of 64. Static,
// since each level compiles it with instructions of its own.
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

// The log-ratio of two masses, or 0 where it is next to nothing. The masses of identical rows may
// differ in their last digits, since the exponentials of unlikely tokens are clamped, below a different
// logit on each side; but the divergence of identical rows is to be exactly 0. Static, as piece_length
// is.
static inline double without_rounding(double log_ratio) {
    return log_ratio > -0x1p-50 && log_ratio < 0x1p-50 ? 0.0 : log_ratio;
}

// log of p's mass over q's.
double log_ratio(const Mass& p, const Mass& q);

// The state of two disjoint pieces together, by the chain rule of the divergence: the shares' own
// divergence plus the pieces' divergences, each with the reference's share. No term is negative. The
// reference's shares are the same for all circuits.
State merge(const Shares& reference, const State& first, const State& second);

// The divergence of a state that covers the whole vocabulary, in nats.
double finalize(const State&);

// Where the results go: one float (K, R) a row and circuit, or its state (K, R). The other is null.
struct Output {
    float* kl;
    State* states;
};

// Computes all rows with so many threads, the calling one included. `keep_going` is asked by the
// calling thread alone. False if it was stopped.
bool run(const Level&, const Problem&, const Output&, int n_threads, const Poll& keep_going);
bool run(const Level&, const GradientProblem&, int n_threads, const Poll& keep_going);
bool run(const Level&, const JsProblem&, float* js, int n_threads, const Poll& keep_going);
bool run(const Level&, const JsProblem&, const JsGradients&, int n_threads,
         const Poll& keep_going);
// `summaries` is (sides, R).
bool run(const Level&, const SummaryProblem&, Summary* summaries, int n_threads,
         const Poll& keep_going);

}  // namespace fastkl
