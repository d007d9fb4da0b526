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
            for (j = 0; j < width * size; j += 64) \
                __builtin_prefetch(p + j + AHEAD, 0, 2); \
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

#define AHEAD 2048      /* bytes that are fetched ahead */
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

/* What the processor converts itself. */
static inline ptrdiff_t floats_of_halves(const char *from, ptrdiff_t n, float *to)
{
    ptrdiff_t j = 0;
#if defined(__AVX512F__)
    for (; j + 16 <= n; j += 16)
        _mm512_storeu_ps(to + j, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + 2 * j))));
#elif defined(__F16C__)
    for (; j + 8 <= n; j += 8)
        _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * j))));
#endif
    return j;
}

static inline ptrdiff_t halves_of_floats(const float *from, ptrdiff_t n, char *to)
{
    ptrdiff_t j = 0;
#if defined(__AVX512F__)
    for (; j + 16 <= n; j += 16)
        _mm256_storeu_si256((__m256i *)(to + 2 * j), _mm512_cvtps_ph(_mm512_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    for (; j + 8 <= n; j += 8)
        _mm_storeu_si128((__m128i *)(to + 2 * j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT));
#endif
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
