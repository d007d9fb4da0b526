# Activations on lanes, forward and gradient: the only place that knows them.

ctypedef struct Activation:
    int kind
    lanes low, high, slope


cdef inline Activation activation_of(const Job* job) noexcept nogil:
    cdef Activation a
    a.kind = job.activation
    a.low, a.high, a.slope = spread(<real>job.low), spread(<real>job.high), spread(<real>job.slope)
    return a


cdef enum:
    FAR = 800           # what is further from 0 has an exponential of 0 or infinity

# 1 / k!
cdef real FACTORS[14]
FACTORS[:] = [1.0, 1.0, 1 / 2.0, 1 / 6.0, 1 / 24.0, 1 / 120.0, 1 / 720.0, 1 / 5040.0, 1 / 40320.0, 1 / 362880.0, 1 / 3628800.0, 1 / 39916800.0,
              1 / 479001600.0, 1 / 6227020800.0]


cdef inline lanes exponential(lanes v) noexcept nogil:
    """e ** v for v <= 0: 2 ** n * e ** r with |r| <= ln(2) / 2, where n * ln(2) is taken off in two parts, the first of which is exact, and e ** r is
    its Taylor series."""
    cdef lanes n, r, p
    cdef int k, degree = 7 if sizeof(real) == 4 else 13
    v = most(spread(<real>(-104 if sizeof(real) == 4 else -746)), v)
    n = rounded(mul(v, spread(<real>1.4426950408889634)))
    if sizeof(real) == 4:
        r = sub(sub(v, mul(n, spread(<real>0.693359375))), mul(n, spread(<real>-2.1219444005469057e-4)))
    else:
        r = sub(sub(v, mul(n, spread(<real>6.93147180369123816490e-01))), mul(n, spread(<real>1.90821492927058770002e-10)))
    p = spread(FACTORS[degree])
    for k in range(degree - 1, 1, -1):
        p = add(mul(p, r), spread(FACTORS[k]))
    p = add(add(mul(mul(p, r), r), r), spread(1))
    # In two steps, as a subnormal result is no power of two times a normal one.
    v = rounded(mul(n, spread(<real>0.5)))
    return mul(mul(p, power_of_2(v)), power_of_2(sub(n, v)))


ctypedef struct Logistic:
    lanes one, slope        # 1 / (1 + e ** -v), and its gradient


cdef inline Logistic logistic(lanes v) noexcept nogil:
    """By e ** -|v|, which is at most 1: nothing cancels, at either end."""
    cdef Logistic s
    cdef lanes e = exponential(least(v, sub(spread(0), v))), share = quotient(spread(1), add(spread(1), e))
    s.one = if_less(v, spread(0), mul(e, share), share)
    s.slope = mul(mul(e, share), share)
    return s


cdef inline lanes activated(const Activation* a, lanes v) noexcept nogil:
    """NaN stays NaN."""
    return least(a.high, most(a.low, v)) if a.kind == CLIPPED else otherwise_activated(a, v)


cdef lanes otherwise_activated(const Activation* a, lanes v) noexcept nogil:
    if a.kind == LEAKY:
        return if_less(v, a.low, mul(v, a.slope), v)
    elif a.kind == HARD_SWISH:
        return quotient(mul(v, least(spread(6), most(spread(0), add(v, spread(3))))), spread(6))
    elif a.kind == SIGMOID:
        return logistic(v).one
    elif a.kind == SILU:
        v = most(spread(-FAR), v)           # so that -infinity gives 0
        return mul(v, logistic(v).one)
    else:
        return v


cdef inline lanes taken_back(const Activation* a, lanes v, lanes d) noexcept nogil:
    """The gradient d behind the activation, whose input is v, before it. NaN lets it pass."""
    return if_up_to(a.high, v, spread(0), if_up_to(v, a.low, spread(0), d)) if a.kind == CLIPPED else otherwise_taken_back(a, v, d)


cdef lanes otherwise_taken_back(const Activation* a, lanes v, lanes d) noexcept nogil:
    if a.kind == LEAKY:
        return if_up_to(v, a.low, mul(d, a.slope), d)
    elif a.kind == HARD_SWISH:
        return if_up_to(spread(3), v, d, if_up_to(v, spread(-3), spread(0), mul(d, add(quotient(v, spread(3)), spread(0.5)))))
    elif a.kind == SIGMOID:
        return mul(d, logistic(v).slope)
    elif a.kind == SILU:
        v = least(spread(FAR), most(spread(-FAR), v))
        return mul(d, add(logistic(v).one, mul(v, logistic(v).slope)))
    else:
        return d
