/* How a thread computes: a caller may have set another rounding, or denormals to be taken for zeros, which its own team does not share. */
#ifndef CBN_FLOAT_MODE_H
#define CBN_FLOAT_MODE_H

/* Both are barriers: what is loaded from memory after one, and stored before the next, is computed between them. */
#if defined(__x86_64__)
static inline unsigned long default_float_mode(void) {
    unsigned before, standard = 0x1f80;     /* round to nearest, denormals as they are, no exception traps */
    __asm__ volatile("stmxcsr %0\n\tldmxcsr %1" : "=m"(before) : "m"(standard) : "memory");
    return before;
}

static inline void restore_float_mode(unsigned long mode) {
    unsigned before = (unsigned)mode;
    __asm__ volatile("ldmxcsr %0" : : "m"(before) : "memory");
}
#elif defined(__aarch64__)
static inline unsigned long default_float_mode(void) {
    unsigned long before, standard = 0;
    __asm__ volatile("mrs %0, fpcr\n\tmsr fpcr, %1" : "=&r"(before) : "r"(standard) : "memory");
    return before;
}

static inline void restore_float_mode(unsigned long mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
static inline unsigned long default_float_mode(void) { return 0; }
static inline void restore_float_mode(unsigned long mode) { (void)mode; }
#endif

#endif
