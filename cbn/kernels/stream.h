/* Stores that bypass the caches: what neither Cython nor plain C can say. Both ends of the destination lie on 16-byte boundaries. */
#include <stddef.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>

static inline __attribute__((always_inline)) void stream_store(void *destination, const void *source, size_t bytes)
{
    size_t i = 0;
#if defined(__AVX512F__)
    if ((size_t)destination % 64 == 0)
        for (; i + 64 <= bytes; i += 64)
            _mm512_stream_si512((void *)((char *)destination + i), _mm512_loadu_si512((const char *)source + i));
#elif defined(__AVX__)
    if ((size_t)destination % 32 == 0)
        for (; i + 32 <= bytes; i += 32)
            _mm256_stream_si256((__m256i *)((char *)destination + i), _mm256_loadu_si256((const __m256i *)((const char *)source + i)));
#endif
    for (; i + 16 <= bytes; i += 16)
        _mm_stream_si128((__m128i *)((char *)destination + i), _mm_loadu_si128((const __m128i *)((const char *)source + i)));
}

static inline void stream_fence(void) { _mm_sfence(); }

#else

static inline void stream_store(void *destination, const void *source, size_t bytes) { memcpy(destination, source, bytes); }
static inline void stream_fence(void) { }

#endif
#ifndef PF
#define PF 8192
#endif
static inline __attribute__((always_inline)) void prefetch_rows(const void *p, size_t stride, size_t width)
{
    const char *c = (const char *)p;
    if (stride == width) { for (int r = 0; r < 8; r++) for (size_t k = 0; k < width; k += 64) __builtin_prefetch(c + PF + r * width + k, 0, 2); }
    else for (int r = 0; r < 8; r++) for (size_t k = 0; k < width; k += 64) __builtin_prefetch(c + 8 * stride + r * stride + k, 0, 2);
}
