// PyTorch's threads. After a parallel loop of PyTorch they wait busily for the next one, for some
// milliseconds. Threads of our own would share the cores with them, and a call right after such a loop
// would take up to twice as long.
#pragma once

#if defined(__linux__)
#include <unistd.h>

#include <cstdio>
#include <cstring>

// From the OpenMP library that PyTorch has loaded, GNU's or a compatible one; null if there is none.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* context,
                                                    unsigned n_threads, unsigned flags);
#endif

namespace fastkl {

#if defined(__linux__)
// Whether this process is a fork that has not called exec since, according to Linux. Such a process has
// its parent's team in memory, but not the team's threads, and would wait for them forever.
inline bool is_fork() {
    constexpr unsigned kForkedWithoutExec = 0x40;  // PF_FORKNOEXEC
    std::FILE* file = std::fopen("/proc/self/stat", "r");
    if (!file) return false;
    char text[512];
    text[std::fread(text, 1, sizeof text - 1, file)] = '\0';
    std::fclose(file);
    // The program's name comes first, in parentheses, and may contain parentheses itself.
    const char* after_name = std::strrchr(text, ')');
    unsigned flags = 0;
    return after_name &&
           std::sscanf(after_name, ") %*c %*d %*d %*d %*d %*d %u", &flags) == 1 &&
           (flags & kForkedWithoutExec);
}

// The only process that may use the team: not a fork, nor a process forked from it later. 0 for none.
inline const pid_t kOwner = is_fork() ? 0 : getpid();

// Calls work(context) on the calling thread and on `n_threads` - 1 others, or fewer if the library so
// decides, and waits for all of them. Returns false, without calling anything, if there is no team.
//
// The library keeps as many threads as it was last asked for, so always ask for as many as PyTorch asks
// for. If the system cannot provide a thread, the library ends the process, as it does for PyTorch's own
// operations.
inline bool run_on_team(void (*work)(void*), void* context, int n_threads) {
    if (!GOMP_parallel || getpid() != kOwner) return false;
    GOMP_parallel(work, context, static_cast<unsigned>(n_threads), 0);
    return true;
}
#else
inline bool run_on_team(void (*)(void*), void*, int) { return false; }
#endif

}  // namespace fastkl
