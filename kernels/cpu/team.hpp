// PyTorch's threads. Those of a parallel loop of its wait busily for the next one, for some milliseconds, and
// threads of our own would share the cores with them: a call right after such a loop would take up to twice
// as long.
#pragma once

#if defined(__linux__)
#include <unistd.h>

// From the OpenMP library that PyTorch has loaded, GNU's or one that stands in for it; null without one.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* context,
                                                    unsigned n_threads, unsigned flags);
#endif

namespace fastkl {

#if defined(__linux__)
// A fork has the memory of its parent's threads, but not the threads.
inline const pid_t kLoadedIn = getpid();

// Calls work(context) on the calling thread and on `n_threads` - 1 others, or fewer if the library so decides,
// and waits for all of them. False, and nothing is called, where there is no such library.
//
// It keeps as many threads as it was last asked for: always to be asked for as many as PyTorch asks for.
inline bool run_on_team(void (*work)(void*), void* context, int n_threads) {
    if (!GOMP_parallel || getpid() != kLoadedIn) return false;
    GOMP_parallel(work, context, static_cast<unsigned>(n_threads), 0);
    return true;
}
#else
inline bool run_on_team(void (*)(void*), void*, int) { return false; }
#endif

}  // namespace fastkl
