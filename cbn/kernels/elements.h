/* Elements that the loops don't compute with, or not where they are: blocks of them, of any type, byte order and strides, to floats and back. */
#ifndef CBN_ELEMENTS_H
#define CBN_ELEMENTS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "stream.h"

static inline float float_of_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t bits_of_float(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
static inline double double_of_bits(uint64_t bits) { double d; memcpy(&d, &bits, 8); return d; }
static inline uint64_t bits_of_double(double d) { uint64_t bits; memcpy(&bits, &d, 8); return bits; }

static inline float float_of_uint8(uint8_t a) { return (float)a; }
static inline float float_of_int8(uint8_t a) { return (float)(int8_t)a; }
static inline float float_of_uint16(uint16_t a) { return (float)a; }
static inline float float_of_int16(uint16_t a) { return (float)(int16_t)a; }
static inline float float_of_bfloat16(uint16_t a) { return float_of_bits((uint32_t)a << 16); }

/* The exponent and fraction are shifted into place, and the exponent's bias is made right by a power of two: exact, for subnormal ones too. */
static inline float float_of_half(uint16_t a)
{
    uint32_t rest = (uint32_t)(a & 0x7fff) << 13, sign = (uint32_t)(a & 0x8000) << 16;
    uint32_t number = bits_of_float(float_of_bits(rest) * 0x1p112f);
    return float_of_bits(sign | ((a & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : number));
}

/* To nearest, ties to even. */
static inline uint16_t bfloat16_of_float(float f)
{
    uint32_t a = bits_of_float(f), number = (a + 0x7fff + (a >> 16 & 1)) >> 16;
    return (uint16_t)((a & 0x7fffffff) > 0x7f800000 ? a >> 16 | 0x40 : number);
}

/* Below the least normal number, adding 0.5, whose last bit is the unit of subnormal ones, rounds in place. */
static inline uint16_t half_of_float(float f)
{
    uint32_t a = bits_of_float(f), sign = a >> 16 & 0x8000, subnormal, number;
    a &= 0x7fffffff;
    subnormal = bits_of_float(float_of_bits(a) + 0.5f) - 0x3f000000;
    number = (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13;
    number = a < 0x38800000 ? subnormal : number;
    number = a >= 0x477ff000 ? 0x7c00 : number;
    return (uint16_t)(sign | (a > 0x7f800000 ? 0x7e00 : number));
}

#define SWAPPED(a) (sizeof(a) == 1 ? (a) : sizeof(a) == 2 ? __builtin_bswap16((uint16_t)(a)) : \
                    sizeof(a) == 4 ? __builtin_bswap32((uint32_t)(a)) : __builtin_bswap64((uint64_t)(a)))

/* 16 elements of 16 bits: float16 or, if `brain`, bfloat16. What is stored past the caches is on a 32-byte boundary. */
static inline __attribute__((always_inline)) void load_16(int brain, const void *p, float *to)
{
#if defined(__AVX512F__)
    __m256i a = _mm256_loadu_si256((const __m256i *)p);
    _mm512_storeu_ps(to, brain ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)) : _mm512_cvtph_ps(a));
#else
    uint16_t some[16];
    int k;
#if defined(__F16C__)
    if (!brain) {
        _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)));
        _mm256_storeu_ps(to + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1)));
        return;
    }
#endif
    memcpy(some, p, sizeof(some));
    for (k = 0; k < 16; k++)
        to[k] = brain ? float_of_bfloat16(some[k]) : float_of_half(some[k]);
#endif
}

#if defined(__AVX512F__)
/* bfloat16 is in the upper halves of these. */
static inline __attribute__((always_inline)) __m512i rounded_to_bfloat16(__m512 f)
{
    __m512i bits = _mm512_castps_si512(f), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
}
#endif

static inline __attribute__((always_inline)) void store_16(int brain, const float *from, void *p, int stream)
{
    uint16_t some[16];
#if defined(__AVX512F__)
    __m512 f = _mm512_loadu_ps(from);
    __m256i a = brain ? _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_to_bfloat16(f), 16))
                      : _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (stream)
        _mm256_stream_si256((__m256i *)p, a);
    else
        _mm256_storeu_si256((__m256i *)p, a);
    (void)some;
#else
    int k;
#if defined(__F16C__)
    if (!brain) {
        _mm_storeu_si128((__m128i *)some, _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128((__m128i *)some + 1, _mm256_cvtps_ph(_mm256_loadu_ps(from + 8), _MM_FROUND_TO_NEAREST_INT));
    } else
#endif
        for (k = 0; k < 16; k++)
            some[k] = brain ? bfloat16_of_float(from[k]) : half_of_float(from[k]);
    if (stream)
        stream_store(p, some, sizeof(some));
    else
        memcpy(p, some, sizeof(some));
#endif
}

/* 32 of them: a cache line, which leaves as one if it begins on a boundary. */
static inline __attribute__((always_inline)) void store_32(int brain, const float *from, void *p, int stream)
{
#if defined(__AVX512BW__)
    __m512 f = _mm512_loadu_ps(from), g = _mm512_loadu_ps(from + 16);
    __m512i a;
    if (brain) {
        const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
                                               31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        a = _mm512_permutex2var_epi16(rounded_to_bfloat16(f), upper, rounded_to_bfloat16(g));
    } else
        a = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)),
                               _mm512_cvtps_ph(g, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), 1);
    if (!stream)
        _mm512_storeu_si512(p, a);
    else if ((size_t)p % 64 == 0)
        _mm512_stream_si512(p, a);
    else {
        _mm256_stream_si256((__m256i *)p, _mm512_castsi512_si256(a));
        _mm256_stream_si256((__m256i *)p + 1, _mm512_extracti64x4_epi64(a, 1));
    }
#else
    store_16(brain, from, p, stream);
    store_16(brain, from + 16, (char *)p + 32, stream);
#endif
}

/* A block of `rows` rows of `width` elements, which are stored as `bits`; strides in bytes, `step` in elements. Rows of contiguous elements, and
 * those of every third one (a colour of an image), are loops with constant strides, which vectorize. `some` converts as many as it can. */
#define LOADS(name, bits, real, convert, some) \
static void name(int swapped, const char *p, ptrdiff_t row_stride, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t width, real *to, ptrdiff_t step) \
{ \
    const ptrdiff_t size = sizeof(bits); \
    ptrdiff_t j; \
    bits a; \
    if (row_stride == width * stride && step == width) { \
        width *= rows; \
        rows = rows > 0; \
    } \
    for (; rows > 0; rows--, p += row_stride, to += step) { \
        if (!swapped && stride == size) { \
            prefetch_row(p, width * size); \
            for (j = some(p, width, to); j < width; j++) { \
                memcpy(&a, p + j * size, size); \
                to[j] = convert(a); \
            } \
        } else if (!swapped && stride == 3 * size) \
            for (j = 0; j < width; j++) { \
                memcpy(&a, p + j * 3 * size, size); \
                to[j] = convert(a); \
            } \
        else \
            for (j = 0; j < width; j++) { \
                memcpy(&a, p + j * stride, size); \
                to[j] = convert(swapped ? (bits)SWAPPED(a) : a); \
            } \
    } \
}

#define PAST 1024       /* elements that are converted before they are written past the caches */

#define STORES(name, bits, real, convert, some) \
static void name(int swapped, const real *from, ptrdiff_t step, ptrdiff_t rows, ptrdiff_t width, char *p, ptrdiff_t row_stride, ptrdiff_t stride, \
                 int stream) \
{ \
    const ptrdiff_t size = sizeof(bits); \
    bits a, line[PAST]; \
    ptrdiff_t i, j, n; \
    if (row_stride == width * stride && step == width) { \
        width *= rows; \
        rows = rows > 0; \
    } \
    for (; rows > 0; rows--, p += row_stride, from += step) { \
        if (!swapped && stride == size) \
            for (i = 0; i < width; i += n) { \
                char *to = stream ? (char *)line : p + i * size; \
                n = stream && width - i > PAST ? PAST : width - i; \
                for (j = some(from + i, n, to); j < n; j++) { \
                    a = convert(from[i + j]); \
                    memcpy(to + j * size, &a, size); \
                } \
                if (stream) \
                    copy_past_caches(p + i * size, to, n * size); \
            } \
        else \
            for (j = 0; j < width; j++) { \
                a = convert(from[j]); \
                a = swapped ? (bits)SWAPPED(a) : a; \
                memcpy(p + j * stride, &a, size); \
            } \
    } \
}

/* Whole cache lines past the caches; what is left at either end, not. */
static void copy_past_caches(char *to, const char *from, size_t bytes)
{
    size_t head = -(size_t)to & 63, middle;
    if (head > bytes)
        head = bytes;
    middle = (bytes - head) & ~(size_t)63;
    memcpy(to, from, head);
    stream_store(to + head, from + head, middle);
    memcpy(to + head + middle, from + head + middle, bytes - head - middle);
}

static inline ptrdiff_t floats_of_halves(const char *from, ptrdiff_t n, float *to)
{
    ptrdiff_t j;
    for (j = 0; j + 16 <= n; j += 16)
        load_16(0, from + 2 * j, to + j);
    return j;
}

static inline ptrdiff_t halves_of_floats(const float *from, ptrdiff_t n, char *to)
{
    ptrdiff_t j;
    for (j = 0; j + 16 <= n; j += 16)
        store_16(0, from + j, to + 2 * j, 0);
    return j;
}

#define NONE(from, n, to) 0

LOADS(load_float32, uint32_t, float, float_of_bits, NONE)
LOADS(load_float16, uint16_t, float, float_of_half, floats_of_halves)
LOADS(load_bfloat16, uint16_t, float, float_of_bfloat16, NONE)
LOADS(load_int8, uint8_t, float, float_of_int8, NONE)
LOADS(load_uint8, uint8_t, float, float_of_uint8, NONE)
LOADS(load_int16, uint16_t, float, float_of_int16, NONE)
LOADS(load_uint16, uint16_t, float, float_of_uint16, NONE)
LOADS(load_float64, uint64_t, double, double_of_bits, NONE)
STORES(store_float32, uint32_t, float, bits_of_float, NONE)
STORES(store_float16, uint16_t, float, half_of_float, halves_of_floats)
STORES(store_bfloat16, uint16_t, float, bfloat16_of_float, NONE)
STORES(store_float64, uint64_t, double, bits_of_double, NONE)

#endif
