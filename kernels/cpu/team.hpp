// PyTorch's threads. Those of a parallel loop of its wait busily for the next one, for some milliseconds, and
// threads of our own would share the cores with them: a call right after such a loop would take up to twice
// as long.
#pragma once

#if defined(__linux__)
#include <unistd.h>

#include <cstdio>
#include <cstring>

// From the OpenMP library that PyTorch has loaded, GNU's or one that stands in for it; null without one.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* context,
                                                    unsigned n_threads, unsigned flags);
#endif

namespace fastkl {

#if defined(__linux__)
// Whether this process is a fork that has run no other program since, as Linux says. It has its parent's team
// in memory then, but not the threads, and would wait for them for ever.
inline bool is_fork() {
    constexpr unsigned kForkedWithoutExec = 0x40;  // PF_FORKNOEXEC
    std::FILE* file = std::fopen("/proc/self/stat", "r");
    if (!file) return false;
    char text[512];
    text[std::fread(text, 1, sizeof text - 1, file)] = '\0';
    std::fclose(file);
    // The program's name comes before, in brackets, and may have some in it.
    const char* after_name = std::strrchr(text, ')');
    unsigned flags = 0;
    return after_name &&
           std::sscanf(after_name, ") %*c %*d %*d %*d %*d %*d %u", &flags) == 1 &&
           (flags & kForkedWithoutExec);
}

// The process whose team may be asked: not a fork, nor one that is made later. 0 for none.
inline const pid_t kOwner = is_fork() ? 0 : getpid();

// Calls work(context) on the calling thread and on `n_threads` - 1 others, or fewer if the library so decides,
// and waits for all of them. False, and nothing is called, where there is no team to ask.
//
// The library keeps as many threads as it was last asked for: always to be asked for as many as PyTorch asks
// for. Where the system gives none it ends the process, as it does for PyTorch's own operations.
inline bool run_on_team(void (*work)(void*), void* context, int n_threads) {
    if (!GOMP_parallel || getpid() != kOwner) return false;
    GOMP_parallel(work, context, static_cast<unsigned>(n_threads), 0);
    return true;
}
#else
inline bool run_on_team(void (*)(void*), void*, int) { return false; }
#endif

}  // namespace fastkl
