/* What the threads of a parallel region need to walk through phases together; of a serial build's one thread, nothing. */
#ifndef CBN_TEAM_H
#define CBN_TEAM_H

#include <time.h>

static inline double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Around a parallel region Cython releases the GIL where this function says that the thread has it. cbn itself calls kernels without, and before
 * Python 3.12 it says so of every thread once the interpreter is ending: a daemon thread would release what it doesn't have, which ends the process. */
#define PyGILState_Check() 0

#ifdef _OPENMP
#include <omp.h>

static inline int team_size(void) { return omp_get_num_threads(); }

static inline void team_barrier(void) {
#pragma omp barrier
}
#else
static inline int team_size(void) { return 1; }
static inline void team_barrier(void) {}
#endif

#endif
