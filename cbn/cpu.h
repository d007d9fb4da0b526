/* What this CPU, and the operating system on it, can run. */
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define cpu_has_avx2() (__builtin_cpu_init(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#define cpu_has_avx512() \
    (__builtin_cpu_init(), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") \
     && __builtin_cpu_supports("avx512vl"))
#else
#define cpu_has_avx2() 0
#define cpu_has_avx512() 0
#endif
