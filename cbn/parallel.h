/* The OpenMP calls that cbn makes, and what stands for them in a build without OpenMP. */
#ifdef _OPENMP
#include <omp.h>
#define openmp_version() _OPENMP
#else
#define openmp_version() 0
#define omp_get_max_threads() 1
#endif
