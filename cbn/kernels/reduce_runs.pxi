# Sums of the row layout, a run after the other.

cdef inline Sums tree_of_run(const Source* at, Py_ssize_t i, const Gate* gate, int kind) noexcept nogil:
    cdef lanes b[4]
    cdef lanes d[4]
    cdef Py_ssize_t j
    for j in range(4 if at.x_ahead else 0):
        fetch_ahead(at, i + j * LANES, i + j * LANES, kind)
    for j in range(4):
        b[j] = sub(load(at.x + i + j * LANES), gate.centre)
        d[j] = d_of(gate, at, i + j * LANES, i + j * LANES, b[j], kind)
    return tree_of(d, b)


cdef inline void add_run(Sums* sums, const Source* at, Py_ssize_t n, const Gate* gate, int kind) noexcept nogil:
    """Add at most TREES trees of a run of n elements; LANES elements before its end can be read."""
    cdef Sums a = sums[0], few, tree
    cdef lanes b[1]
    cdef Py_ssize_t i = 0, rest = n % (4 * LANES), end = n - LANES
    while i < n - (rest + 4 * LANES):
        tree = tree_of_run(at, i, gate, kind)
        add_sums(&tree, tree_of_run(at, i + 4 * LANES, gate, kind))
        add_sums(&a, tree)
        i += 8 * LANES
    if i < n - rest:
        add_sums(&a, tree_of_run(at, i, gate, kind))
        i += 4 * LANES
    if rest:
        few.s = few.q = spread(0)
        while i <= end:
            if at.x_ahead:
                fetch_ahead(at, i, i, kind)
            b[0] = sub(load(at.x + i), gate.centre)
            add_term(&few, d_of(gate, at, i, i, b[0], kind), b[0])
            i += LANES
        if i < n:           # lanes that end where the run does, of which those before count as 0
            b[0] = last(n - i, sub(load(at.x + end), gate.centre), spread(0))
            add_term(&few, last(n - i, d_of(gate, at, end, end, b[0], kind), spread(0)), b[0])
        add_sums(&a, few)
    sums[0] = a


cdef inline Py_ssize_t piece_of_run(Py_ssize_t rest, bint copies) noexcept nogil:
    """How much of a run is taken at a time: all or, of copies, a multiple of TREES trees, so that no less than a tree is left over."""
    return COPIED - LONG_RUN if copies and rest > COPIED else rest


cdef inline void flush(Sums* a, Totals* totals, bint begun) noexcept nogil:
    """Add what the lanes hold to the totals, which it may begin."""
    if begun:
        add_to_totals(totals.s, totals.s + LANES, a.s)
        add_to_totals(totals.q, totals.q + LANES, a.q)
    else:
        begin_totals(totals.s, totals.s + LANES, a.s)
        begin_totals(totals.q, totals.q + LANES, a.q)
    a.s = a.q = spread(0)


cdef inline bint add_channel(Sums* a, Totals* totals, const Job* job, const Chunk* chunk, Py_ssize_t c, const Source* first, const Gate* gate,
                             int kind) noexcept nogil:
    """Add a channel's part of a chunk, TREES trees at a time; what the lanes hold goes to `totals` whenever the trees in them would be more. Returns
    whether it has. `first` is where its runs begin, or NULL: pieces of them are copied."""
    cdef Source run, at
    cdef Py_ssize_t n, i, part, trees, filled = 0
    cdef bint flushed = False, copies = first == NULL
    if not copies:
        run = first[0]
    for n in range(chunk.n0, chunk.n1):
        i = chunk.i0
        if not copies:
            at = run
            run = moved(&run, at.x_step, at.dy_step)
        while i < chunk.i1:
            part = min(chunk.i1 - i, TREES * 4 * LANES)
            trees = ceil_div(part, 4 * LANES)
            filled += trees
            if filled > TREES:
                flush(a, totals, flushed)
                filled, flushed = trees, True
            if copies:
                copy_source(job, n, c, i, part, kind != OF_MOMENTS, &at)
            add_run(a, &at, part, gate, kind)
            if not copies:
                at = moved(&at, part, part)
            i += part
    return flushed


cdef void sum_copied_run(const Job* job, const Chunk* chunk, Py_ssize_t c, const Gate* gate, double* to, Py_ssize_t stride, int kind) noexcept nogil:
    """Of a channel of which pieces are copied."""
    cdef Sums a
    cdef Totals totals
    cdef bint flushed
    a.s = a.q = spread(0)
    if kind == OF_MOMENTS:
        flushed = add_channel(&a, &totals, job, chunk, c, NULL, gate, OF_MOMENTS)
    elif kind == OF_DY_ALONE:
        flushed = add_channel(&a, &totals, job, chunk, c, NULL, gate, OF_DY_ALONE)
    else:
        flushed = add_channel(&a, &totals, job, chunk, c, NULL, gate, OF_DY_BEHIND)
    flush(&a, &totals, flushed)
    put_sums(to, stride, sum_of_totals(totals.s), sum_of_totals(totals.q))


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
    cdef Source first
    cdef Gate gate
    cdef Py_ssize_t c
    cdef bint flushed = False
    if copied(job, OF_X) or kind != OF_MOMENTS and copied(job, OF_DY):
        for c in range(width):
            gate = gate_of(of, c)
            sum_copied_run(job, chunk, c0 + c, &gate, to + c, stride, kind)
        return
    first = source_in(job, chunk.n0, c0, chunk.i0, kind != OF_MOMENTS)
    for c in range(width):
        gate = gate_of(of, c)
        a.s = a.q = spread(0)
        flushed = add_channel(&a, &totals, job, chunk, c0 + c, &first, &gate, kind)
        first = moved(&first, job.x.channel_stride, job.dy.channel_stride)
        if flushed:
            flush(&a, &totals, True)
            put_sums(to + c, stride, sum_of_totals(totals.s), sum_of_totals(totals.q))
        else:
            sums[c] = a
    for c in range(0 if flushed else width):
        put_sums(to + c, stride, sum_of_lanes(sums[c].s), sum_of_lanes(sums[c].q))
