/* Elements that the loops don't compute with, or not where they are: blocks of them, of any type, byte order and strides, to floats and back. */
#ifndef CBN_ELEMENTS_H
#define CBN_ELEMENTS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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

#if defined(__AVX512F__)
/* bfloat16 is in the upper halves of these. */
static inline __attribute__((always_inline)) __m512i rounded_to_bfloat16(__m512 f)
{
    __m512i bits = _mm512_castps_si512(f), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
}
#endif

/* n elements that are stored as `bits`, `stride` bytes apart. Contiguous ones, and every third one (a colour of an image), are loops with constant
 * strides, which vectorize. */
#define LOADS(name, bits, real, convert) \
static void name(int swapped, const char *p, ptrdiff_t stride, ptrdiff_t n, real *to) \
{ \
    const ptrdiff_t size = sizeof(bits); \
    ptrdiff_t j; \
    bits a; \
    if (!swapped && stride == size) \
        for (j = 0; j < n; j++) { \
            memcpy(&a, p + j * size, size); \
            to[j] = convert(a); \
        } \
    else if (!swapped && stride == 3 * size) \
        for (j = 0; j < n; j++) { \
            memcpy(&a, p + j * 3 * size, size); \
            to[j] = convert(a); \
        } \
    else \
        for (j = 0; j < n; j++) { \
            memcpy(&a, p + j * stride, size); \
            to[j] = convert(swapped ? (bits)SWAPPED(a) : a); \
        } \
}

#define PAST 1024       /* elements that are converted before they are written past the caches */

#define STORES(name, bits, real, convert) \
static void name(int swapped, const real *from, ptrdiff_t n, char *p, ptrdiff_t stride, int stream) \
{ \
    const ptrdiff_t size = sizeof(bits); \
    bits a, line[PAST]; \
    ptrdiff_t i, j, part; \
    if (!swapped && stride == size) \
        for (i = 0; i < n; i += part) { \
            char *to = stream ? (char *)line : p + i * size; \
            part = stream && n - i > PAST ? PAST : n - i; \
            for (j = 0; j < part; j++) { \
                a = convert(from[i + j]); \
                memcpy(to + j * size, &a, size); \
            } \
            if (stream) \
                copy_past_caches(p + i * size, to, part * size); \
        } \
    else \
        for (j = 0; j < n; j++) { \
            a = convert(from[j]); \
            a = swapped ? (bits)SWAPPED(a) : a; \
            memcpy(p + j * stride, &a, size); \
        } \
}

#if defined(__SSE2__)
/* Whole cache lines past the caches; what is left at either end, not. */
static void copy_past_caches(char *to, const char *from, size_t bytes)
{
    size_t i, head = -(size_t)to & 15, middle;
    if (head > bytes)
        head = bytes;
    middle = (bytes - head) & ~(size_t)15;
    memcpy(to, from, head);
    for (i = head; i < head + middle; i += 16)
        _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
    memcpy(to + i, from + i, bytes - i);
}
#else
static void copy_past_caches(char *to, const char *from, size_t bytes) { memcpy(to, from, bytes); }
#endif

#if CBN_ELEMENT == 1
LOADS(load_float64, uint64_t, double, double_of_bits)
STORES(store_float64, uint64_t, double, bits_of_double)
static inline void load_elements(int dtype, int swapped, const char *p, ptrdiff_t stride, ptrdiff_t n, double *to)
{
    (void)dtype;
    load_float64(swapped, p, stride, n, to);
}
static inline void store_elements(int dtype, int swapped, const double *from, ptrdiff_t n, char *p, ptrdiff_t stride, int stream)
{
    (void)dtype;
    store_float64(swapped, from, n, p, stride, stream);
}
#elif CBN_ELEMENT == 0
LOADS(load_float32, uint32_t, float, float_of_bits)
LOADS(load_float16, uint16_t, float, float_of_half)
LOADS(load_bfloat16, uint16_t, float, float_of_bfloat16)
LOADS(load_int8, uint8_t, float, float_of_int8)
LOADS(load_uint8, uint8_t, float, float_of_uint8)
LOADS(load_int16, uint16_t, float, float_of_int16)
LOADS(load_uint16, uint16_t, float, float_of_uint16)
STORES(store_float32, uint32_t, float, bits_of_float)
STORES(store_float16, uint16_t, float, half_of_float)
STORES(store_bfloat16, uint16_t, float, bfloat16_of_float)

/* By Job's numbers of types, job.pxd. */
static void load_elements(int dtype, int swapped, const char *p, ptrdiff_t stride, ptrdiff_t n, float *to)
{
    static void (*const loads[])(int, const char *, ptrdiff_t, ptrdiff_t, float *) = {
        load_float32, NULL, load_float16, load_bfloat16, load_int8, load_uint8, load_int16, load_uint16};
    loads[dtype](swapped, p, stride, n, to);
}

static void store_elements(int dtype, int swapped, const float *from, ptrdiff_t n, char *p, ptrdiff_t stride, int stream)
{
    static void (*const stores[])(int, const float *, ptrdiff_t, char *, ptrdiff_t, int) = {store_float32, NULL, store_float16, store_bfloat16};
    stores[dtype](swapped, from, n, p, stride, stream);
}
#else       /* what isn't contiguous is computed with as float32 */
static inline void load_elements(int dtype, int swapped, const char *p, ptrdiff_t stride, ptrdiff_t n, float *to)
{
    (void)dtype, (void)swapped, (void)p, (void)stride, (void)n, (void)to;
}
static inline void store_elements(int dtype, int swapped, const float *from, ptrdiff_t n, char *p, ptrdiff_t stride, int stream)
{
    (void)dtype, (void)swapped, (void)from, (void)n, (void)p, (void)stride, (void)stream;
}
#endif

#endif
