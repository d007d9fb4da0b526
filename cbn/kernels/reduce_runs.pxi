# Sums of the row layout, a run after the other.

cdef inline void add_run(Sums* sums, const Source* at, Py_ssize_t n, const Gate* gate, int kind) noexcept nogil:
    """Add at most TREES trees of a run of n elements; LANES elements before its end can be read."""
    cdef Sums a = sums[0], few
    cdef lanes b[4]
    cdef lanes d[4]
    cdef Py_ssize_t i = 0, j, rest = n % (4 * LANES), end = n - LANES
    while i < n - rest:
        for j in range(4 if at.x_ahead else 0):
            fetch_ahead(at, i + j * LANES, kind)
        for j in range(4):
            b[j] = sub(load(at.x + i + j * LANES), gate.centre)
            d[j] = d_of(gate, at, i + j * LANES, i + j * LANES, b[j], kind)
        add_tree(&a, d, b)
        i += 4 * LANES
    if rest:
        few.s = few.q = spread(0)
        while i <= end:
            if at.x_ahead:
                fetch_ahead(at, i, kind)
            b[0] = sub(load(at.x + i), gate.centre)
            add_term(&few, d_of(gate, at, i, i, b[0], kind), b[0])
            i += LANES
        if i < n:           # lanes that end where the run does, of which those before count as 0
            b[0] = last(n - i, sub(load(at.x + end), gate.centre), spread(0))
            add_term(&few, last(n - i, d_of(gate, at, end, end, b[0], kind), spread(0)), b[0])
        a.s, a.q = add(a.s, few.s), add(a.q, few.q)
    sums[0] = a


cdef inline Py_ssize_t piece_of_run(Py_ssize_t rest, bint copies) noexcept nogil:
    """How much of a run is taken at a time: all or, of copies, a multiple of TREES trees, so that no less than a tree is left over."""
    return COPIED - LONG_RUN if copies and rest > COPIED else rest


cdef void add_run_apart(Sums* sums, const Source* at, Py_ssize_t n, const Gate* gate, int kind) noexcept nogil:
    """The same, for where a run takes much longer than a call."""
    if kind == OF_MOMENTS:
        add_run(sums, at, n, gate, OF_MOMENTS)
    elif kind == OF_DY_ALONE:
        add_run(sums, at, n, gate, OF_DY_ALONE)
    else:
        add_run(sums, at, n, gate, OF_DY_BEHIND)


cdef inline void flush(Sums* a, Totals* totals, bint begun) noexcept nogil:
    """Add what the lanes hold to the totals, which it may begin."""
    if begun:
        add_to_totals(totals.s, totals.s + LANES, a.s)
        add_to_totals(totals.q, totals.q + LANES, a.q)
    else:
        begin_totals(totals.s, totals.s + LANES, a.s)
        begin_totals(totals.q, totals.q + LANES, a.q)
    a.s = a.q = spread(0)


cdef inline void add_part(Sums* a, Totals* totals, Py_ssize_t* filled, const Source* at, Py_ssize_t n, const Gate* gate, int kind) noexcept nogil:
    """Add n elements of a run, TREES trees at a time; what the lanes hold goes to `totals` whenever `filled`, the trees in them, would be more."""
    cdef Py_ssize_t i = 0, part
    cdef Source here = at[0]
    while i < n:
        part = min(n - i, TREES * 4 * LANES)
        filled[0] += ceil_div(part, 4 * LANES)
        if filled[0] > TREES:
            flush(a, totals, True)
            filled[0] = ceil_div(part, 4 * LANES)
        add_run_apart(a, &here, part, gate, kind)
        here = moved(&here, part, part)
        i += part


cdef void long_channel(const Job* job, const Chunk* chunk, Py_ssize_t c, const Gate* gate, double* to, Py_ssize_t stride, int kind) noexcept nogil:
    """The sums of a channel of any length, in arrays of any kind."""
    cdef Sums a
    cdef Totals totals
    cdef Source at
    cdef Py_ssize_t n, i, part, filled = 0
    cdef bint paired = kind != OF_MOMENTS, copies = copied(job, OF_X) or paired and copied(job, OF_DY)
    a.s = a.q = spread(0)
    flush(&a, &totals, False)
    if not copies:
        at = source_in(job, chunk.n0, c, chunk.i0, paired)
    for n in range(chunk.n0, chunk.n1):
        i = chunk.i0
        while i < chunk.i1:
            part = piece_of_run(chunk.i1 - i, copies)
            if copies:
                copy_source(job, n, c, i, part, paired, &at)
            add_part(&a, &totals, &filled, &at, part, gate, kind)
            i += part
        if not copies:
            at = moved(&at, at.x_step, at.dy_step)
    flush(&a, &totals, True)
    put_sums(to, stride, sum_of_totals(totals.s), sum_of_totals(totals.q))


cdef inline bint short_runs(const Job* job, const Chunk* chunk, bint paired) noexcept nogil:
    """Whether a run is at most TREES trees of elements that are taken from where they are."""
    return chunk.i1 - chunk.i0 <= TREES * 4 * LANES and not copied(job, OF_X) and not (paired and copied(job, OF_DY))


cdef inline Gate gate_of(const Centres* of, Py_ssize_t c) noexcept nogil:
    """Of one channel."""
    cdef Gate gate
    gate.centre = spread(of.centre[c])
    gate.hi, gate.scale, gate.offset = spread(of.hi[c]), spread(of.scale[c]), spread(of.offset[c])
    gate.activation = &of.activation
    return gate


cdef inline void sum_runs(const Job* job, const Chunk* chunk, Py_ssize_t c0, Py_ssize_t width, const Centres* of, double* to,
                          Py_ssize_t stride, int kind) noexcept nogil:
    """Of a group of channels, one after the other. Lanes that hold all of a channel are added up in the end, as each of these additions waits for the
    last one."""
    cdef Sums sums[MOST_GROUP]
    cdef Sums a
    cdef Totals totals
    cdef Source channel, at
    cdef Gate gate
    cdef Py_ssize_t c, n, filled, length = chunk.i1 - chunk.i0, trees = ceil_div(length, 4 * LANES)
    cdef bint flushed = False
    if not short_runs(job, chunk, kind != OF_MOMENTS):
        for c in range(width):
            gate = gate_of(of, c)
            long_channel(job, chunk, c0 + c, &gate, to + c, stride, kind)
        return
    channel = source_in(job, chunk.n0, c0, chunk.i0, kind != OF_MOMENTS)
    for c in range(width):
        gate = gate_of(of, c)
        a.s = a.q = spread(0)
        at, filled, flushed = channel, 0, False
        for n in range(chunk.n0, chunk.n1):
            filled += trees
            if filled > TREES:
                flush(&a, &totals, flushed)
                filled, flushed = trees, True
            add_run(&a, &at, length, &gate, kind)
            at = moved(&at, at.x_step, at.dy_step)
        sums[c] = a
        if flushed:
            flush(&a, &totals, True)
            put_sums(to + c, stride, sum_of_totals(totals.s), sum_of_totals(totals.q))
        channel = moved(&channel, job.x.channel_stride, job.dy.channel_stride)
    for c in range(0 if flushed else width):
        put_sums(to + c, stride, sum_of_lanes(sums[c].s), sum_of_lanes(sums[c].q))
