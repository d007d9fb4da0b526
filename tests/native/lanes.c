/* Every operation of lanes.h on memory, for test_lanes.py to call: out = operation(a, b, c, d), or of n lanes. */
#include "lanes.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT int lanes_of(void) { return (int)LANES; }

EXPORT void of_reals(int operation, const real *a, const real *b, const real *c, const real *d, ptrdiff_t n, real *out)
{
    lanes x = load_reals(a), y = load_reals(b), z = load_reals(c), w = load_reals(d);
    switch (operation) {
    case 0: x = add(x, y); break;
    case 1: x = sub(x, y); break;
    case 2: x = mul(x, y); break;
    case 3: x = quotient(x, y); break;
    case 4: x = most(x, y); break;
    case 5: x = least(x, y); break;
    case 6: x = if_less(x, y, z, w); break;
    case 7: x = if_up_to(x, y, z, w); break;
    case 8: x = last(n, x, y); break;
    case 9: x = spread(a[n - 1]); break;
    case 10: x = rounded(x); break;
    case 11: x = power_of_2(rounded(x)); break;
    }
    store_reals(out, x);
}

EXPORT void of_elements(int operation, const elem *a, ptrdiff_t n, elem *out)
{
    lanes x = load(a);
    switch (operation) {
    case 0: store(out, x); break;
    case 1: stream(out, x); break;
    case 2: store_last(out + LANES, n, x); break;
    case 3: stream_first(out, n, x); break;
    case 4: stream_last(out + LANES, n, x); break;
    }
    stream_fence();
}

EXPORT void converted(const elem *a, real *out) { store_reals(out, load(a)); }

EXPORT void rounded_to_elements(const real *a, elem *out) { store(out, load_reals(a)); }

/* Sums of rows of lanes: totals and what they have lost, and of the last ones the sums across. */
EXPORT void of_totals(const real *a, ptrdiff_t rows, double *totals, double *across)
{
    ptrdiff_t row;
    twice s, t;
    begin_totals(totals, totals + LANES, load_reals(a));
    for (row = 1; row < rows; row++)
        add_to_totals(totals, totals + LANES, load_reals(a + row * LANES));
    s = sum_of_totals(totals);
    t = sum_of_lanes(load_reals(a + (rows - 1) * LANES));
    across[0] = s.number;
    across[1] = s.lost;
    across[2] = t.number;
    across[3] = t.lost;
}
