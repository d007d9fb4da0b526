/* What this CPU, and the operating system on it, can run. */
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define cpu_has_avx2() (__builtin_cpu_init(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#define cpu_has_avx512() \
    (__builtin_cpu_init(), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") \
     && __builtin_cpu_supports("avx512vl"))
/* AMD's fetch ahead by themselves: being told so costs them 4 to 10 %. Intel's gain by it. */
#define cpu_fetches() (__builtin_cpu_init(), __builtin_cpu_is("intel"))
#else
#define cpu_fetches() 0
#define cpu_has_avx2() 0
#define cpu_has_avx512() 0
#endif

#ifndef _WIN32
#include <unistd.h>
#endif
#ifdef _SC_LEVEL3_CACHE_SIZE
static long second_level_cache(void) { return sysconf(_SC_LEVEL2_CACHE_SIZE); }
static long last_level_cache(void)
{
    long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return size > 0 ? size : second_level_cache();
}
#else
static long second_level_cache(void) { return 0; }
static long last_level_cache(void) { return 0; }
#endif
