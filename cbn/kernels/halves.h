/* Loads and stores of elements of 16 bits, float16 or bfloat16: to and from lanes of float32, rounded to nearest, ties to even. A part of lanes.h. */
#ifndef CBN_HALVES_H
#define CBN_HALVES_H

#define BRAIN (CBN_ELEMENT == 3)

#if defined(LANES_NEON)
/* bfloat16 is in the upper halves of these. */
FORCED uint32x4_t rounded_to_bfloat16(float32x4_t f)
{
    uint32x4_t bits = vreinterpretq_u32_f32(f), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vbslq_u32(vceqq_f32(f, f), vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), vorrq_u32(bits, vdupq_n_u32(0x400000)));
}
#elif !defined(LANES_AVX512)
#if defined(LANES_AVX2)
#define SHARED FORCED
#else                   /* many instructions: once in a module, not once in each loop */
#define SHARED static __attribute__((noinline, unused))
#endif

SHARED void floats_of_halves(const elem *p, real *to)
{
    int j;
    for (j = 0; j < 16; j++)
        to[j] = BRAIN ? float_of_bfloat16(p[j]) : float_of_half(p[j]);
}

SHARED void halves_of_floats(const real *from, elem *p)
{
    int j;
    for (j = 0; j < 16; j++)
        p[j] = BRAIN ? bfloat16_of_float(from[j]) : half_of_float(from[j]);
}
#endif

FORCED lanes load(const elem *p)
{
#if defined(LANES_AVX512)
    __m256i a = _mm256_loadu_si256((const __m256i *)p);
    EACH(BRAIN ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)) : _mm512_cvtph_ps(a));
#elif defined(LANES_AVX2)
    EACH(BRAIN ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p + k)), 16))
               : _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + k)));
#elif defined(LANES_NEON)
    EACH(BRAIN ? vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + WIDTH * k), 16)) : vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + WIDTH * k))));
#else
    real some[16];
    floats_of_halves(p, some);
    return load_reals(some);
#endif
}

FORCED void store(elem *p, lanes a)
{
#if defined(LANES_AVX512)
    _mm256_storeu_si256((__m256i *)p, BRAIN ? _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_to_bfloat16(a.r[0]), 16))
                                            : _mm512_cvtps_ph(a.r[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(LANES_NEON)
    unsigned k;
    for (k = 0; k < REGS; k++)
        vst1_u16(p + WIDTH * k, BRAIN ? vshrn_n_u32(rounded_to_bfloat16(a.r[k]), 16) : vreinterpret_u16_f16(vcvt_f16_f32(a.r[k])));
#else
    real some[16];
#if defined(LANES_AVX2)
    if (!BRAIN) {
        _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.r[0], _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128((__m128i *)p + 1, _mm256_cvtps_ph(a.r[1], _MM_FROUND_TO_NEAREST_INT));
        return;
    }
#endif
    store_reals(some, a);
    halves_of_floats(some, p);
#endif
}

FORCED void stream(elem *p, lanes a)
{
    elem some[16];
    store(some, a);
#if defined(__SSE2__)
    _mm_stream_si128((__m128i *)p, _mm_loadu_si128((const __m128i *)some));
    _mm_stream_si128((__m128i *)p + 1, _mm_loadu_si128((const __m128i *)some + 1));
#else
    memcpy(p, some, sizeof(some));
#endif
}

#endif
