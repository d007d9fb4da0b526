/* Sums of lanes in float64; of float64 elements with what each sum loses by rounding. A part of lanes.h. */
#ifndef CBN_TOTALS_H
#define CBN_TOTALS_H

/* The sum a + b, and what it loses by rounding: Knuth 1969, The Art of Computer Programming 2, 4.2.2. */
FORCED double two_sum(double a, double b, double *lost)
{
    double total = a + b, b_in_it = total - a;
    *lost += (a - (total - b_in_it)) + (b - b_in_it);
    return total;
}

/* The product of a and b, and what it loses by rounding, where it is far from overflow and underflow: Dekker 1971, A floating-point technique for
 * extending the available precision. */
FORCED double two_product(double a, double b, double *lost)
{
    double p = a * b, c = a * 134217729, d = b * 134217729;
    double a1 = c - (c - a), a2 = a - a1, b1 = d - (d - b), b2 = b - b1;
    *lost = a2 * b2 - (((p - a1 * b1) - a2 * b1) - a1 * b2);
    return p;
}

/* Totals of LANES columns, and what those of float64 elements lose by rounding: the first ones, and more. */
FORCED void begin_totals(double *totals, double *lost, lanes a)
{
#if CBN_ELEMENT == 1
    store_reals(totals, a);
    store_reals(lost, spread(0));
#elif defined(LANES_AVX512)
    _mm512_storeu_pd(totals, _mm512_cvtps_pd(_mm512_castps512_ps256(a.r[0])));
    _mm512_storeu_pd(totals + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.r[0], 1)));
    (void)lost;
#else
    real some[16];
    int j;
    (void)lost;
    store_reals(some, a);
    for (j = 0; j < 16; j++)
        totals[j] = some[j];
#endif
}

FORCED void add_to_totals(double *totals, double *lost, lanes a)
{
#if CBN_ELEMENT == 1
    lanes t = load_reals(totals), sum = add(t, a), in_it = sub(sum, t);
    store_reals(lost, add(load_reals(lost), add(sub(t, sub(sum, in_it)), sub(a, in_it))));
    store_reals(totals, sum);
#elif defined(LANES_AVX512)
    _mm512_storeu_pd(totals, _mm512_add_pd(_mm512_loadu_pd(totals), _mm512_cvtps_pd(_mm512_castps512_ps256(a.r[0]))));
    _mm512_storeu_pd(totals + 8, _mm512_add_pd(_mm512_loadu_pd(totals + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.r[0], 1))));
    (void)lost;
#else
    real some[16];
    int j;
    (void)lost;
    store_reals(some, a);
    for (j = 0; j < 16; j++)
        totals[j] += some[j];
#endif
}

/* A sum in float64 and, of float64 elements, what it has lost by rounding. */
typedef struct { double number, lost; } twice;

#if defined(LANES_AVX512)
FORCED double halves_upon_halves(__m512d a)
{
    __m256d b = _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
    __m128d c = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    return _mm_cvtsd_f64(_mm_add_sd(c, _mm_unpackhi_pd(c, c)));
}
#endif

/* The sum of LANES totals, halves upon halves; what they have lost stands after them. */
FORCED twice sum_of_totals(const double *totals)
{
    twice sum = {0, 0};
#if CBN_ELEMENT == 1
    double a[4];
    int j;
    for (j = 0; j < 4; j++)
        a[j] = two_sum(totals[j], totals[j + 4], &sum.lost);
    sum.lost += ((totals[8] + totals[12]) + (totals[10] + totals[14])) + ((totals[9] + totals[13]) + (totals[11] + totals[15]));
    sum.number = two_sum(two_sum(a[0], a[2], &sum.lost), two_sum(a[1], a[3], &sum.lost), &sum.lost);
#elif defined(LANES_AVX512)
    sum.number = halves_upon_halves(_mm512_add_pd(_mm512_loadu_pd(totals), _mm512_loadu_pd(totals + 8)));
#else
    double a[8];
    int j;
    for (j = 0; j < 8; j++)
        a[j] = totals[j] + totals[j + 8];
    for (j = 0; j < 4; j++)
        a[j] += a[j + 4];
    sum.number = (a[0] + a[2]) + (a[1] + a[3]);
#endif
    return sum;
}

/* The sum of the lanes, in the same order. */
FORCED twice sum_of_lanes(lanes a)
{
#if CBN_ELEMENT == 1
    double totals[16];
    begin_totals(totals, totals + LANES, a);
    return sum_of_totals(totals);
#elif defined(LANES_AVX512)
    twice sum = {halves_upon_halves(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a.r[0])), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.r[0], 1)))), 0};
    return sum;
#elif defined(LANES_AVX2)
    __m256d s0 = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.r[0])), _mm256_cvtps_pd(_mm256_castps256_ps128(a.r[1])));
    __m256d s1 = _mm256_add_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a.r[0], 1)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.r[1], 1)));
    __m256d b = _mm256_add_pd(s0, s1);
    __m128d c = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    twice sum = {_mm_cvtsd_f64(_mm_add_sd(c, _mm_unpackhi_pd(c, c))), 0};
    return sum;
#elif defined(LANES_SSE2)
    __m128d s[4], c;
    twice sum = {0, 0};
    int k;
    for (k = 0; k < 2; k++) {
        s[2 * k] = _mm_add_pd(_mm_cvtps_pd(a.r[k]), _mm_cvtps_pd(a.r[k + 2]));
        s[2 * k + 1] = _mm_add_pd(_mm_cvtps_pd(_mm_movehl_ps(a.r[k], a.r[k])), _mm_cvtps_pd(_mm_movehl_ps(a.r[k + 2], a.r[k + 2])));
    }
    c = _mm_add_pd(_mm_add_pd(s[0], s[2]), _mm_add_pd(s[1], s[3]));
    sum.number = _mm_cvtsd_f64(_mm_add_sd(c, _mm_unpackhi_pd(c, c)));
    return sum;
#else
    real some[16];
    double totals[16];
    int j;
    store_reals(some, a);
    for (j = 0; j < 16; j++)
        totals[j] = some[j];
    return sum_of_totals(totals);
#endif
}

#endif
