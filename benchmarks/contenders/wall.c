/* The wall: the least an operation can do with memory: z = a*x + b for two arrays, z = a*x + b*y for three, z = v = a*x + b*y + w for five,
and z = a*x + b of bytes x for images.

Arrays begin on a cache line and have all of their last one. */
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
typedef unsigned char Bytes __attribute__((vector_size(LANES), may_alias));
typedef short Shorts __attribute__((vector_size(2 * LANES)));
typedef int Ints __attribute__((vector_size(4 * LANES)));
/* In steps of two, or gcc takes element by element. */
#define FLOATS(bytes) __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, Shorts), Ints), Vector)

enum form { IMAGES, TWO, THREE, FIVE };

struct job {
    const void *x, *y, *w;
    void *z, *v;
    ptrdiff_t size;
    int form, threads, streaming;
};

int can_stream(void) { return CAN_STREAM; }

/* `form` and `streaming` are constants wherever this is inlined. */
static inline __attribute__((always_inline)) void walk(const struct job *job, ptrdiff_t i, ptrdiff_t end, enum form form, int streaming)
{
    const Bytes *bytes = job->x;
    const Vector *x = job->x, *y = job->y, *w = job->w;
    Vector *z = job->z, *v = job->v, value;
    for (i /= LANES, end /= LANES; i < end; i++) {
        value = 1.5f * (form == IMAGES ? FLOATS(bytes[i]) : x[i]);
        value = form < THREE ? value + 0.25f : value + 0.25f * y[i];
        if (form == FIVE)
            value += w[i];
        if (streaming)
            STREAM((float *)(z + i), value);
        else
            z[i] = value;
        if (form == FIVE && streaming)
            STREAM((float *)(v + i), value);
        else if (form == FIVE)
            v[i] = value;
    }
    if (streaming)
        _mm_sfence();
}

static void part(const struct job *job, ptrdiff_t i, ptrdiff_t end)
{
#define FORM(form) case form: if (job->streaming) walk(job, i, end, form, 1); else walk(job, i, end, form, 0); break
    switch (job->form) {
        FORM(IMAGES);
        FORM(TWO);
        FORM(THREE);
        FORM(FIVE);
    }
}

void wall(const struct job *job)
{
    ptrdiff_t lines = (job->size + LINE - 1) / LINE;
    if (job->threads == 1) {
        part(job, 0, lines * LINE);
        return;
    }
    _Pragma("omp parallel for schedule(static) num_threads(job->threads)")
    for (int t = 0; t < job->threads; t++)
        part(job, lines * t / job->threads * LINE, lines * (t + 1) / job->threads * LINE);
}
