# The apply pass: what is written of each element, forward and backward (conclude.pxi has the formulas), over runs and over rows of columns.

cdef enum:              # what is written: a constant of the inlined loops
    AFFINE              # y
    FUSED               # y, after the residual and the activation
    GRADIENT            # dx
    ANY_GRADIENT        # dx behind an activation, or where the statistics are constants, or both

# Where the elements of a box are, and where results go; gradient is the residual's, or y if it isn't wanted.
ctypedef struct Target:
    Source from_
    elem* y
    elem* gradient
    Py_ssize_t y_step
    Py_ssize_t ahead            # elements to what of y is fetched to be written
    bint with_gradient

# Coefficients of LANES columns, or LANES times those of a channel.
ctypedef struct Map:
    lanes hi, scale, offset, slope
    Gate gate
    bint frozen

ctypedef struct Result:
    lanes y, gradient


cdef inline Map map_of(const Job* job, Py_ssize_t c, const Activation* activation, bint one_channel) noexcept nogil:
    cdef Map m
    cdef const real* at = coefficients_of(job, 0) + c
    cdef Py_ssize_t stride = coefficient_stride(job.columns)
    if one_channel:
        m.hi, m.scale, m.offset, m.slope = spread(at[0]), spread(at[stride]), spread(at[2 * stride]), spread(at[3 * stride])
        m.gate.hi, m.gate.scale, m.gate.offset = spread(at[4 * stride]), spread(at[5 * stride]), spread(at[6 * stride])
    else:
        m.hi, m.scale = load_reals(at), load_reals(at + stride)
        m.offset, m.slope = load_reals(at + 2 * stride), load_reals(at + 3 * stride)
        m.gate.hi, m.gate.scale = load_reals(at + 4 * stride), load_reals(at + 5 * stride)
        m.gate.offset = load_reals(at + 6 * stride)
    m.gate.activation = activation
    m.frozen = job.apply == FROZEN
    return m


cdef inline Result result_of(const Map* m, const Source* at, Py_ssize_t x, Py_ssize_t dy, int kind) noexcept nogil:
    cdef Result r
    if kind == AFFINE or kind == FUSED:
        r.y = add(mul(sub(load(at.x + x), m.hi), m.scale), m.offset)
        if kind == FUSED:
            if at.with_residual:
                r.y = add(r.y, load(at.residual + x))
            r.y = activated(m.gate.activation, r.y)
        r.gradient = r.y
        return r
    r.gradient = behind(&m.gate, at, x, dy) if kind == ANY_GRADIENT and m.gate.activation.kind else load(at.dy + dy)
    if kind == ANY_GRADIENT and m.frozen:
        r.y = mul(r.gradient, m.scale)
    else:
        r.y = mul(sub(sub(r.gradient, m.offset), mul(sub(load(at.x + x), m.hi), m.slope)), m.scale)
    return r


cdef inline void put(const Target* to, Py_ssize_t i, Result r, int kind, bint streamed) noexcept nogil:
    if streamed:
        stream(to.y + i, r.y)
    else:
        store(to.y + i, r.y)
    if kind >= GRADIENT and to.with_gradient:
        store(to.gradient + i, r.gradient)


cdef inline Py_ssize_t to_cache_line(const elem* y) noexcept nogil:
    """The number of elements from y to where a streamed store may begin: LANES elements are a line, or half of one."""
    return <Py_ssize_t>((LANES * sizeof(elem) - <size_t>y % (LANES * sizeof(elem))) % (LANES * sizeof(elem)) // sizeof(elem))


# ---- row layout ------------------------------------------------------------------------------------------------------------------------

cdef inline void apply_run(const Target* to, Py_ssize_t n, const Map* m, int kind, bint streamed) noexcept nogil:
    """A run of n >= LANES elements. Both ends are computed before anything is stored, as y may be x, dy or the residual, and overlap what is between;
    past the caches, where nothing is stored twice, y is none of these."""
    cdef const Source* at = &to.from_
    cdef Py_ssize_t i = to_cache_line(to.y) if streamed or n >= ALIGNED_RUN else 0, end = n - LANES, head = i
    cdef Result r, first, final = result_of(m, at, end, end, kind)
    if head:
        first = result_of(m, at, 0, 0, kind)
    if head and streamed:
        stream_first(to.y, head, first.y)
    while i <= end:
        if streamed:
            fetch(at.x + i + STREAM_AHEAD)
            if kind >= GRADIENT:
                fetch(at.dy + i + STREAM_AHEAD)
        else:
            fetch_to_write(to.y + i + to.ahead)
        r = result_of(m, at, i, i, kind)
        put(to, i, r, kind, streamed)
        i += LANES
    if streamed:
        if i < n:
            stream_last(to.y + n, n - i, final.y)
        put_ends(to, n, i, head, &first, &final, kind)
        return
    if head:
        put(to, 0, first, kind, False)
    if i < n:
        put(to, end, final, kind, False)


cdef inline void put_ends(const Target* to, Py_ssize_t n, Py_ssize_t done, Py_ssize_t head, const Result* first, const Result* final,
                          int kind) noexcept nogil:
    """The residual's gradient at both ends of a run of which y has been streamed."""
    if kind >= GRADIENT and to.with_gradient:
        if head:
            store(to.gradient, first.gradient)
        if done < n:
            store(to.gradient + n - LANES, final.gradient)


# ---- column layout ---------------------------------------------------------------------------------------------------------------------

cdef inline void apply_rows(const Target* to, Py_ssize_t rows, const Map* m, int units, Py_ssize_t short, int kind, bint streamed) noexcept nogil:
    """`units` x LANES columns, a constant, of each row; of the lanes, the first `short` aren't stored."""
    cdef Target here = to[0]
    cdef Result r
    cdef Py_ssize_t k, row
    for row in range(rows):
        for k in range(units):
            if streamed:
                fetch(here.from_.x + k * LANES + STREAM_AHEAD)
                if kind >= GRADIENT:
                    fetch(here.from_.dy + k * LANES + STREAM_AHEAD)
            elif kind < GRADIENT:
                fetch_to_write(here.y + k * LANES + here.ahead)
            r = result_of(&m[k], &here.from_, k * LANES, k * LANES, kind)
            if not short:
                put(&here, k * LANES, r, kind, streamed)
        if short:
            store_last(here.y + LANES, LANES - short, r.y)
            if kind >= GRADIENT and here.with_gradient:
                store_last(here.gradient + LANES, LANES - short, r.gradient)
        here.from_ = moved(&here.from_, here.from_.x_step, here.from_.dy_step)
        here.y += here.y_step
        here.gradient += here.y_step


cdef inline Target shifted(const Target* to, Py_ssize_t columns) noexcept nogil:
    cdef Target t = to[0]
    t.from_ = moved(&t.from_, columns, columns)
    t.y += columns
    t.gradient += columns
    return t


cdef inline void apply_tiles(const Job* job, const Target* to, Py_ssize_t rows, Py_ssize_t c, Py_ssize_t width, const Activation* activation, int kind,
                             bint streamed) noexcept nogil:
    """Some rows of columns c to c + width, tile by tile; LANES elements before the rows' end can be read."""
    cdef Map m[APPLIED_UNITS]
    cdef Target tile
    cdef Py_ssize_t done = 0, k, short
    while width - done >= APPLIED_UNITS * LANES:
        for k in range(APPLIED_UNITS):
            m[k] = map_of(job, c + done + k * LANES, activation, False)
        tile = shifted(to, done)
        apply_rows(&tile, rows, m, APPLIED_UNITS, 0, kind, streamed)
        done += APPLIED_UNITS * LANES
    while done < width:
        short = max(0, LANES - (width - done))
        m[0] = map_of(job, c + done - short, activation, False)
        tile = shifted(to, done - short)
        apply_rows(&tile, rows, m, 1, short, kind, streamed)
        done += LANES


cdef inline void apply_columns(const Job* job, const Target* to, Py_ssize_t rows, Py_ssize_t c, Py_ssize_t width, const Activation* activation,
                               int kind) noexcept nogil:
    cdef Py_ssize_t n = 0, some, y_bytes = to.y_step * sizeof(elem), line = LANES * sizeof(elem)
    cdef Target here = to[0]
    cdef bint streamed = job.stream and width % LANES == 0 and (<size_t>to.y | <size_t>y_bytes) % <size_t>line == 0
    some = 1 if job.beyond else max(<Py_ssize_t>8, BLOCK // width)
    while n < rows:
        some = min(some, rows - n)
        apply_tiles(job, &here, some, c, width, activation, kind, streamed)
        here.from_ = moved(&here.from_, some * here.from_.x_step, some * here.from_.dy_step)
        here.y += some * here.y_step
        here.gradient += some * here.y_step
        n += some


# ---- either ----------------------------------------------------------------------------------------------------------------------------

cdef inline bint one_stretch(const Job* job, const Target* to, Py_ssize_t width) noexcept nogil:
    """Whether rows are all columns, and follow one another in memory."""
    return width == job.columns and width % LANES == 0 and to.y_step == width and to.from_.x_step == width and to.from_.dy_step == width


cdef inline void apply_target(const Job* job, const Target* to, const Box* b, const Activation* activation, int kind) noexcept nogil:
    cdef Target part
    cdef Map m
    cdef Py_ssize_t head = 0, c
    if not job.by_columns:
        for c in range(b.width):
            m = map_of(job, b.c + c, activation, True)
            part = to[0]
            part.from_ = moved(&to.from_, c * job.x.channel_stride, c * job.dy.channel_stride)
            part.y += c * job.y.channel_stride
            part.gradient += c * job.y.channel_stride
            apply_run(&part, b.length, &m, kind, job.stream and b.length >= ALIGNED_RUN)
        return
    if job.stream and one_stretch(job, to, b.width) and <size_t>to.y % sizeof(elem) == 0:
        # Rows may begin anywhere, so let them begin on cache lines, the coefficients going round. What is streamed is none of what is read.
        head = to_cache_line(to.y)
    if not head:
        apply_columns(job, to, b.rows, b.c, b.width, activation, kind)
        return
    apply_tiles(job, to, 1, b.c, LANES, activation, kind, False)
    part = shifted(to, head)
    apply_columns(job, &part, b.rows - 1, head, b.width, activation, kind)
    part = shifted(&part, (b.rows - 1) * b.width)
    apply_tiles(job, &part, 1, head, b.width - head, activation, kind, False)


cdef inline Target target(const Job* job, const Box* b) noexcept nogil:
    cdef Target to
    cdef Source* from_ = &to.from_
    cdef Py_ssize_t step
    if job.apply == FROZEN and not job.activation:          # nothing depends on x
        from_.x = from_.dy = readable(job, OF_DY, b, &from_.dy_step)
        from_.x_step = from_.dy_step
    else:
        from_.x = from_.dy = readable(job, OF_X, b, &from_.x_step)
        from_.dy_step = from_.x_step
        if job.apply != FORWARD:
            from_.dy = readable(job, OF_DY, b, &from_.dy_step)
    from_.residual, from_.with_residual = from_.x, job.with_residual
    if job.with_residual:
        from_.residual = readable(job, OF_RESIDUAL, b, &step)
    to.y = to.gradient = where(job, OF_Y, b, &to.y_step)
    to.ahead = OUTPUT_AHEAD if job.fetches else 0
    to.with_gradient = job.with_residual_grad
    if to.with_gradient:
        to.gradient = where(job, OF_RESIDUAL_GRAD, b, &step)
    return to


cdef void apply_box(const Job* job, const Box* b) noexcept nogil:
    """All of a box that is read and written where it is, or a piece of one that isn't."""
    cdef Target to = target(job, b)
    cdef Activation activation = activation_of(job)
    if job.apply == FROZEN or job.apply == BACKWARD and job.activation:
        apply_target(job, &to, b, &activation, ANY_GRADIENT)
    elif job.apply == BACKWARD:
        apply_target(job, &to, b, &activation, GRADIENT)
    elif job.activation or job.with_residual:
        apply_target(job, &to, b, &activation, FUSED)
    else:
        apply_target(job, &to, b, &activation, AFFINE)
    put_back(job, OF_Y, b)
    if job.with_residual_grad:
        put_back(job, OF_RESIDUAL_GRAD, b)


cdef void apply(const Job* job, Py_ssize_t n0, Py_ssize_t n1, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i0, Py_ssize_t i1) noexcept nogil:
    """The apply pass over rows [n0, n1) x columns [c0, c1) x inner indices [i0, i1); copies are taken piece by piece."""
    cdef Py_ssize_t n = n0, c, i, rows = n1 - n0 if job.by_columns else 1, width = c1 - c0
    cdef Box b
    if job.places != NULL or width * (i1 - i0) < LANES:
        width = min(width, <Py_ssize_t>COPIED) if job.by_columns else 1
        rows = min(rows, COPIED // max(width, LANES))
    while n < n1:
        c = c0
        while c < c1:
            i = i0
            while i < i1:
                b = box(n, c, i, min(rows, n1 - n), min(width, c1 - c), piece_of_run(i1 - i, job.places != NULL))
                apply_box(job, &b)
                i += b.length
            c += width
        n += rows
