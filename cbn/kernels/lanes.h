/* LANES elements side by side, as a value: one register of AVX-512, two of AVX2, four of SSE2 or NEON, plain C elsewhere.
 *
 * The only file that knows an instruction set. Operations round as IEEE 754 says and are the same at every level, so results are the same bits.
 * CBN_ELEMENT (as Job.dtype counts) says how elements are stored; they are computed with as `real`, and what is loaded or stored is converted. */
#ifndef CBN_LANES_H
#define CBN_LANES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "elements.h"

#define FORCED static inline __attribute__((always_inline))

/* CBN_PLAIN asks for what is compared with the others in tests. */
#if defined(CBN_PLAIN)
#elif defined(__AVX512F__)
#define LANES_AVX512
#elif defined(__AVX2__)
#define LANES_AVX2
#elif defined(__SSE2__)
#define LANES_SSE2
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define LANES_NEON
#endif

#if CBN_ELEMENT == 1
typedef double real;
typedef double elem;
#define SUFFIX pd
#else
typedef float real;
#define SUFFIX ps
#if CBN_ELEMENT == 0
typedef float elem;
#else
typedef uint16_t elem;
#endif
#endif

#define LANES ((ptrdiff_t)(64 / sizeof(real)))
#define JOINED_(a, b, c) a##b##_##c
#define JOINED(a, b, c) JOINED_(a, b, c)

/* What is added to a number so that its last bits are those of the next whole number, and the bits of the exponent's zero and place. */
#if CBN_ELEMENT == 1
#define WHOLE 0x1.8p52
#define BIAS 1023
#define FRACTION 52
#else
#define WHOLE 0x1.8p23f
#define BIAS 127
#define FRACTION 23
#endif

/* ---- registers ---------------------------------------------------------------------------------------------------------------------------- */

#if defined(LANES_AVX512)
#define OP(name) JOINED(_mm512_, name, SUFFIX)
#if CBN_ELEMENT == 1
typedef __m512d reg;
#else
typedef __m512 reg;
#endif
FORCED reg reg_less(reg a, reg b, reg yes, reg no) { return OP(mask_blend)(JOINED(_mm512_cmp_, SUFFIX, mask)(a, b, _CMP_LT_OQ), no, yes); }
FORCED reg reg_up_to(reg a, reg b, reg yes, reg no) { return OP(mask_blend)(JOINED(_mm512_cmp_, SUFFIX, mask)(a, b, _CMP_LE_OQ), no, yes); }
#if CBN_ELEMENT == 1
FORCED reg reg_exponent(reg a) { return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(a), FRACTION)); }
#else
FORCED reg reg_exponent(reg a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), FRACTION)); }
#endif
#define TILE_LANES 4
#elif defined(LANES_AVX2)
#define OP(name) JOINED(_mm256_, name, SUFFIX)
#if CBN_ELEMENT == 1
typedef __m256d reg;
#else
typedef __m256 reg;
#endif
FORCED reg reg_less(reg a, reg b, reg yes, reg no) { return OP(blendv)(no, yes, OP(cmp)(a, b, _CMP_LT_OQ)); }
FORCED reg reg_up_to(reg a, reg b, reg yes, reg no) { return OP(blendv)(no, yes, OP(cmp)(a, b, _CMP_LE_OQ)); }
#if CBN_ELEMENT == 1
FORCED reg reg_exponent(reg a) { return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(a), FRACTION)); }
#else
FORCED reg reg_exponent(reg a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), FRACTION)); }
#endif
#define TILE_LANES 2
#elif defined(LANES_SSE2)
#define OP(name) JOINED(_mm_, name, SUFFIX)
#if CBN_ELEMENT == 1
typedef __m128d reg;
#else
typedef __m128 reg;
#endif
FORCED reg reg_pick(reg mask, reg yes, reg no) { return OP(or)(OP(and)(mask, yes), OP(andnot)(mask, no)); }
FORCED reg reg_less(reg a, reg b, reg yes, reg no) { return reg_pick(OP(cmplt)(a, b), yes, no); }
FORCED reg reg_up_to(reg a, reg b, reg yes, reg no) { return reg_pick(OP(cmple)(a, b), yes, no); }
#if CBN_ELEMENT == 1
FORCED reg reg_exponent(reg a) { return _mm_castsi128_pd(_mm_slli_epi64(_mm_castpd_si128(a), FRACTION)); }
#else
FORCED reg reg_exponent(reg a) { return _mm_castsi128_ps(_mm_slli_epi32(_mm_castps_si128(a), FRACTION)); }
#endif
#define TILE_LANES 1
#elif defined(LANES_NEON)
#include <arm_neon.h>
#if CBN_ELEMENT == 1
typedef float64x2_t reg;
#define NEON(name) name##_f64
#else
typedef float32x4_t reg;
#define NEON(name) name##_f32
#endif
#define OP_loadu NEON(vld1q)
#define OP_storeu NEON(vst1q)
#define OP_stream NEON(vst1q)
#define OP_set1 NEON(vdupq_n)
#define OP_add NEON(vaddq)
#define OP_sub NEON(vsubq)
#define OP_mul NEON(vmulq)
#define OP_div NEON(vdivq)
#define OP(name) OP_##name
FORCED reg reg_less(reg a, reg b, reg yes, reg no) { return NEON(vbslq)(NEON(vcltq)(a, b), yes, no); }
FORCED reg reg_up_to(reg a, reg b, reg yes, reg no) { return NEON(vbslq)(NEON(vcleq)(a, b), yes, no); }
FORCED reg OP_max(reg a, reg b) { return reg_less(b, a, a, b); }
FORCED reg OP_min(reg a, reg b) { return reg_less(a, b, a, b); }
#if CBN_ELEMENT == 1
FORCED reg reg_exponent(reg a) { return vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(a), FRACTION)); }
#else
FORCED reg reg_exponent(reg a) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a), FRACTION)); }
#endif
#define TILE_LANES 2
#else
typedef real reg;
#define OP(name) op_##name
FORCED reg op_loadu(const real *p) { return *p; }
FORCED void op_storeu(real *p, reg a) { *p = a; }
FORCED void op_stream(real *p, reg a) { *p = a; }
FORCED reg op_set1(real a) { return a; }
FORCED reg op_add(reg a, reg b) { return a + b; }
FORCED reg op_sub(reg a, reg b) { return a - b; }
FORCED reg op_mul(reg a, reg b) { return a * b; }
FORCED reg op_div(reg a, reg b) { return a / b; }
FORCED reg op_max(reg a, reg b) { return a > b ? a : b; }
FORCED reg op_min(reg a, reg b) { return a < b ? a : b; }
FORCED reg reg_less(reg a, reg b, reg yes, reg no) { return a < b ? yes : no; }
FORCED reg reg_up_to(reg a, reg b, reg yes, reg no) { return a <= b ? yes : no; }
#if CBN_ELEMENT == 1
FORCED reg reg_exponent(reg a) { return double_of_bits(bits_of_double(a) << FRACTION); }
#else
FORCED reg reg_exponent(reg a) { return float_of_bits(bits_of_float(a) << FRACTION); }
#endif
#define TILE_LANES 1
#endif

#define WIDTH ((ptrdiff_t)(sizeof(reg) / sizeof(real)))
#define REGS (64 / sizeof(reg))

typedef struct { reg r[REGS]; } lanes;

#define EACH(expression) do { lanes o; unsigned k; for (k = 0; k < REGS; k++) o.r[k] = (expression); return o; } while (0)

/* ---- arithmetic --------------------------------------------------------------------------------------------------------------------------- */

FORCED lanes spread(real a) { EACH(OP(set1)(a)); }
FORCED lanes add(lanes a, lanes b) { EACH(OP(add)(a.r[k], b.r[k])); }
FORCED lanes sub(lanes a, lanes b) { EACH(OP(sub)(a.r[k], b.r[k])); }
FORCED lanes mul(lanes a, lanes b) { EACH(OP(mul)(a.r[k], b.r[k])); }
FORCED lanes quotient(lanes a, lanes b) { EACH(OP(div)(a.r[k], b.r[k])); }
FORCED lanes most(lanes a, lanes b) { EACH(OP(max)(a.r[k], b.r[k])); }      /* a > b ? a : b, so b where either is NaN */
FORCED lanes least(lanes a, lanes b) { EACH(OP(min)(a.r[k], b.r[k])); }     /* a < b ? a : b */
FORCED lanes if_less(lanes a, lanes b, lanes yes, lanes no) { EACH(reg_less(a.r[k], b.r[k], yes.r[k], no.r[k])); }
FORCED lanes if_up_to(lanes a, lanes b, lanes yes, lanes no) { EACH(reg_up_to(a.r[k], b.r[k], yes.r[k], no.r[k])); }     /* a <= b */

FORCED lanes rounded(lanes a) { return sub(add(a, spread(WHOLE)), spread(WHOLE)); }        /* to whole numbers, for |a| < 2**20 */
FORCED lanes power_of_2(lanes n) { EACH(reg_exponent(OP(add)(n.r[k], OP(set1)(WHOLE + BIAS)))); }     /* for whole numbers from 1 - BIAS to BIAS */

/* ---- memory ------------------------------------------------------------------------------------------------------------------------------- */

FORCED lanes load_reals(const real *p) { EACH(OP(loadu)(p + WIDTH * k)); }
FORCED void store_reals(real *p, lanes a) { unsigned k; for (k = 0; k < REGS; k++) OP(storeu)(p + WIDTH * k, a.r[k]); }

#if CBN_ELEMENT < 2
FORCED lanes load(const elem *p) { return load_reals(p); }
FORCED void store(elem *p, lanes a) { store_reals(p, a); }
/* Past the caches; on a 64-byte boundary. */
FORCED void stream(elem *p, lanes a) { unsigned k; for (k = 0; k < REGS; k++) OP(stream)(p + WIDTH * k, a.r[k]); }
#else
#include "halves.h"
#endif

#if CBN_ELEMENT < 2
FORCED double real_of(elem a) { return a; }
#else
FORCED double real_of(elem a) { return BRAIN ? float_of_bfloat16(a) : float_of_half(a); }
#endif

/* Its last n lanes; the others hold `fill`. */
FORCED lanes last(ptrdiff_t n, lanes a, lanes fill)
{
#if defined(LANES_AVX512)
    lanes o;
    o.r[0] = OP(mask_blend)((0xffff >> (16 - LANES)) & (0xffff << (LANES - n)), fill.r[0], a.r[0]);
    return o;
#else
    static const real place[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    lanes first = spread((real)(LANES - n));
    EACH(reg_less(first.r[k], OP(loadu)(place + WIDTH * k), a.r[k], fill.r[k]));
#endif
}

/* Store the last n lanes so that they end at `end`. */
FORCED void store_last(elem *end, ptrdiff_t n, lanes a)
{
#if defined(LANES_AVX512) && CBN_ELEMENT < 2
    OP(mask_storeu)(end - LANES, (0xffff >> (16 - LANES)) & (0xffff << (LANES - n)), a.r[0]);
#else
    elem some[16];
    store(some, a);
    memcpy(end - n, some + LANES - n, n * sizeof(elem));
#endif
}

/* n < LANES elements past the caches. What stands on either side of them in their lines is streamed, too: parts of a line that are written soon after
 * one another leave as one, and a store of the other kind would wait for the line to come back. */
static inline void stream_few(elem *p, const elem *from, ptrdiff_t n)
{
    ptrdiff_t bytes = n * (ptrdiff_t)sizeof(elem), i = 0;
#if defined(__SSE2__)
    for (; i + 4 <= bytes && (uintptr_t)p % 4 == 0; i += 4) {
        int a;
        memcpy(&a, (const char *)from + i, 4);
        _mm_stream_si32((int *)((char *)p + i), a);
    }
#endif
    memcpy((char *)p + i, (const char *)from + i, bytes - i);
}

FORCED void stream_first(elem *p, ptrdiff_t n, lanes a)
{
    elem some[16];
    store(some, a);
    stream_few(p, some, n);
}

FORCED void stream_last(elem *end, ptrdiff_t n, lanes a)
{
    elem some[16];
    store(some, a);
    stream_few(end - n, some + LANES - n, n);
}

#if defined(__SSE2__)
static inline void stream_fence(void) { _mm_sfence(); }
#else
static inline void stream_fence(void) { }
#endif

FORCED void fetch(const void *p) { __builtin_prefetch(p, 0, 2); }          /* into the second-level cache */
FORCED void fetch_to_write(const void *p) { __builtin_prefetch(p, 1, 3); }

#include "totals.h"

#endif
