/* Sums across the lanes of a vector, which loops leave to scalars. The order is the same at every vector width. */
#ifndef CBN_LANES_H
#define CBN_LANES_H

#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float cbn_float8 __attribute__((vector_size(32)));
typedef double cbn_double2 __attribute__((vector_size(16)));
typedef double cbn_double4 __attribute__((vector_size(32)));
typedef double cbn_double8 __attribute__((vector_size(64)));

static inline __attribute__((always_inline)) double halves_upon_halves(const cbn_double8 *a)
{
#if defined(__AVX512F__)
    __m256d b = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)*a), _mm512_extractf64x4_pd((__m512d)*a, 1));
    __m128d d = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    return _mm_cvtsd_f64(_mm_add_sd(d, _mm_unpackhi_pd(d, d)));
#else
    cbn_double4 b, c;
    cbn_double2 d, e;
    memcpy(&b, a, 32);
    memcpy(&c, (const char *)a + 32, 32);
    b += c;
    memcpy(&d, &b, 16);
    memcpy(&e, (char *)&b + 16, 16);
    d += e;
    return d[0] + d[1];
#endif
}

/* Of 16 elements, in float64. */
static inline __attribute__((always_inline)) double sum_of_floats(const float *p)
{
    cbn_double8 sums;
#if defined(__AVX512F__)
    sums = (cbn_double8)_mm512_add_pd(_mm512_cvtps_pd(_mm256_loadu_ps(p)), _mm512_cvtps_pd(_mm256_loadu_ps(p + 8)));
#else
    cbn_float8 a, b;
    memcpy(&a, p, 32);
    memcpy(&b, p + 8, 32);
    sums = __builtin_convertvector(a, cbn_double8) + __builtin_convertvector(b, cbn_double8);
#endif
    return halves_upon_halves(&sums);
}

static inline __attribute__((always_inline)) double sum_of_doubles(const double *p)
{
    cbn_double8 a, b;
    memcpy(&a, p, 64);
    memcpy(&b, p + 8, 64);
    a += b;
    return halves_upon_halves(&a);
}

#endif
