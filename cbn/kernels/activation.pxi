# Activations on lanes, forward and gradient: the only place that knows them.

ctypedef struct Activation:
    int kind
    lanes low, high, slope


cdef inline Activation activation_of(const Job* job) noexcept nogil:
    cdef Activation a
    a.kind = job.activation
    a.low, a.high, a.slope = spread(<real>job.low), spread(<real>job.high), spread(<real>job.slope)
    return a


cdef inline lanes activated(const Activation* a, lanes v) noexcept nogil:
    """NaN stays NaN."""
    return least(a.high, most(a.low, v)) if a.kind == CLIPPED else otherwise_activated(a, v)


cdef lanes otherwise_activated(const Activation* a, lanes v) noexcept nogil:
    if a.kind == LEAKY:
        return if_less(v, a.low, mul(v, a.slope), v)
    elif a.kind == HARD_SWISH:
        return quotient(mul(v, least(spread(6), most(spread(0), add(v, spread(3))))), spread(6))
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
    else:
        return d
