/* The wall: the least an operation can do with memory, z = a*x + b for two arrays and z = a*x + b*y for three.

Arrays begin on a cache line. */
#include <stddef.h>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 Vector;
#define STREAM _mm512_stream_ps
#elif defined(__AVX__)
#include <immintrin.h>
typedef __m256 Vector;
#define STREAM _mm256_stream_ps
#elif defined(__SSE__)
#include <immintrin.h>
typedef __m128 Vector;
#define STREAM _mm_stream_ps
#else
typedef float Vector __attribute__((vector_size(16)));
#endif

#ifdef STREAM
enum { CAN_STREAM = 1 };
#else
enum { CAN_STREAM = 0 };
#define STREAM(to, value) (*(Vector *)(to) = (value))
#define _mm_sfence()
#endif
enum { LANES = sizeof(Vector) / sizeof(float), LINE = 16 };

struct job {
    const float *x, *y;
    float *z;
    ptrdiff_t size;
    int threads, streaming;
};

int can_stream(void) { return CAN_STREAM; }

#define WALL(name, EXPRESSION)                                                                          \
    static void name##_part(const struct job *job, ptrdiff_t i, ptrdiff_t end)                          \
    {                                                                                                   \
        const float *p = job->x, *q = job->y;                                                           \
        float *r = job->z;                                                                              \
        if (job->streaming) {                                                                           \
            for (; i + LANES <= end; i += LANES)                                                        \
                STREAM(r + i, EXPRESSION(*(const Vector *)(p + i), *(const Vector *)(q + i)));          \
            _mm_sfence();                                                                               \
        } else                                                                                          \
            for (; i + LANES <= end; i += LANES)                                                        \
                *(Vector *)(r + i) = EXPRESSION(*(const Vector *)(p + i), *(const Vector *)(q + i));    \
        for (; i < end; i++)                                                                            \
            r[i] = EXPRESSION(p[i], q[i]);                                                              \
    }                                                                                                   \
                                                                                                        \
    void name(const struct job *job)                                                                    \
    {                                                                                                   \
        ptrdiff_t lines = (job->size + LINE - 1) / LINE;                                                \
        if (job->threads == 1) {                                                                        \
            name##_part(job, 0, job->size);                                                             \
            return;                                                                                     \
        }                                                                                               \
        _Pragma("omp parallel for schedule(static) num_threads(job->threads)")                          \
        for (int t = 0; t < job->threads; t++) {                                                        \
            ptrdiff_t end = lines * (t + 1) / job->threads * LINE;                                      \
            name##_part(job, lines * t / job->threads * LINE, end < job->size ? end : job->size);       \
        }                                                                                               \
    }

#define TWO(p, q) (1.5f * (p) + 0.25f)
#define THREE(p, q) (1.5f * (p) + 0.25f * (q))
WALL(two_arrays, TWO)
WALL(three_arrays, THREE)
