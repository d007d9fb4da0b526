/* What cbn asks of OpenMP, what stands for it in a build without, and what makes it survive a fork. */
#include <pthread.h>

#ifdef _OPENMP
#include <omp.h>
#define openmp_version() _OPENMP
/* OpenMP 5.0; weak, as older runtimes lack it. */
extern int omp_pause_resource_all(omp_pause_resource_t) __attribute__((weak));
#else
#define openmp_version() 0
#define omp_get_max_threads() 1
#endif

/* Set in a forked child whose OpenMP runtime believes in threads that the fork left behind: the next region would wait for them for ever. */
static int forked_without_threads = 0;

#ifdef _OPENMP
static void before_fork(void)
{
    /* Ends the forking thread's pool; the next region, in parent and child, makes a new one. */
    if (omp_pause_resource_all)
        omp_pause_resource_all(omp_pause_soft);
}

static void in_child(void)
{
    if (!omp_pause_resource_all)
        forked_without_threads = 1;
}

static void survive_forks(void) { pthread_atfork(before_fork, NULL, in_child); }
#else
static void survive_forks(void) { }
#endif
