# What sums over a chunk are made of: with b = x - centre, and d = b, or dy, or dy behind an activation, those of d and of d * b. Their order: order.pxd.

cdef enum:              # what d is: a constant of the inlined loops
    OF_MOMENTS          # b
    OF_DY_ALONE         # dy
    OF_DY_BEHIND        # dy taken back through an activation, whose input is computed anew

cdef enum:
    BLOCK_ROWS = 4 * TREES      # of the column layout, between additions in float64

# Elements of x, dy and the residual; what isn't needed is another of them. The steps lead from row to row.
ctypedef struct Source:
    const elem* x
    const elem* dy
    const elem* residual
    Py_ssize_t x_step, dy_step
    Py_ssize_t x_ahead, dy_ahead        # to what is soon needed from farther than the core's own cache, or 0
    bint with_residual

# What sums are about, and by which the activation's input is found: v = (x - hi) * scale + offset + residual.
ctypedef struct Gate:
    lanes centre, hi, scale, offset
    const Activation* activation

ctypedef struct Sums:
    lanes s, q

# Those of a channel in float64; of float64 elements LANES numbers, and what they have lost.
ctypedef struct Totals:
    double s[16]
    double q[16]

# What the sums of a group of columns need, one for each column; each array may be read LANES before its beginning.
ctypedef struct Centres:
    real padding[16]
    real centre[WIDE]
    real hi[WIDE]
    real scale[WIDE]
    real offset[WIDE]
    Activation activation


cdef inline Source source(const Job* job, const Box* b, bint paired) noexcept nogil:
    cdef Source at
    at.x = at.dy = at.residual = readable(job, OF_X, b, &at.x_step)
    at.dy_step, at.with_residual, at.x_ahead, at.dy_ahead = at.x_step, paired and job.with_residual, 0, 0
    if paired:
        at.dy = readable(job, OF_DY, b, &at.dy_step)
    if at.with_residual:
        at.residual = readable(job, OF_RESIDUAL, b, &at.x_step)
    return at


cdef inline Source source_in(const Job* job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, bint paired) noexcept nogil:
    """Of arrays that aren't copied."""
    cdef Source at
    at.x = at.dy = at.residual = element(job, OF_X, n, c, i)
    at.x_step, at.dy_step, at.with_residual = job.x.outer_stride, job.dy.outer_stride, paired and job.with_residual
    at.x_ahead = at.dy_ahead = FURTHER if job.far and job.fetches else 0
    if paired:
        at.dy = element(job, OF_DY, n, c, i)
    if at.with_residual:
        at.residual = element(job, OF_RESIDUAL, n, c, i)
    return at


cdef void copy_source(const Job* job, Py_ssize_t n, Py_ssize_t c, Py_ssize_t i, Py_ssize_t length, bint paired, Source* at) noexcept nogil:
    """Of a piece of a run of arrays that are."""
    cdef Box b = box(n, c, i, 1, 1, length)
    at[0] = source(job, &b, paired)


cdef inline Source moved(const Source* at, Py_ssize_t to_x, Py_ssize_t to_dy) noexcept nogil:
    cdef Source to = at[0]
    to.x += to_x
    to.dy += to_dy
    to.residual += to_x
    return to


cdef inline lanes behind(const Gate* gate, const Source* at, Py_ssize_t x, Py_ssize_t dy) noexcept nogil:
    """dy taken back through the activation."""
    cdef lanes v = add(mul(sub(load(at.x + x), gate.hi), gate.scale), gate.offset)
    if at.with_residual:
        v = add(v, load(at.residual + x))
    return taken_back(gate.activation, v, load(at.dy + dy))


cdef inline void fetch_ahead(const Source* at, Py_ssize_t x, Py_ssize_t dy, int kind) noexcept nogil:
    fetch(at.x + x + at.x_ahead)
    if kind != OF_MOMENTS:
        fetch(at.dy + dy + at.dy_ahead)


cdef inline lanes d_of(const Gate* gate, const Source* at, Py_ssize_t x, Py_ssize_t dy, lanes b, int kind) noexcept nogil:
    if kind == OF_MOMENTS:
        return b
    elif kind == OF_DY_ALONE:
        return load(at.dy + dy)
    return behind(gate, at, x, dy)


cdef inline Sums tree_of(const lanes* d, const lanes* b) noexcept nogil:
    cdef Sums t
    t.s = add(add(d[0], d[1]), add(d[2], d[3]))
    t.q = add(add(mul(d[0], b[0]), mul(d[1], b[1])), add(mul(d[2], b[2]), mul(d[3], b[3])))
    return t


cdef inline void add_sums(Sums* a, Sums t) noexcept nogil:
    a.s, a.q = add(a.s, t.s), add(a.q, t.q)


cdef inline void add_term(Sums* a, lanes d, lanes b) noexcept nogil:
    a.s, a.q = add(a.s, d), add(a.q, mul(d, b))


cdef inline void put_sums(double* to, Py_ssize_t stride, Twice s, Twice q) noexcept nogil:
    to[0], to[stride] = s.number, q.number
    if sizeof(real) == 8:
        to[2 * stride], to[3 * stride] = s.lost, q.lost
