# Sums of the column layout, tile by tile of neighbouring columns; and those of either layout.

# Where the sums of a group of columns go: s, q and, of float64 elements, what each has lost; `begun` if there is something to add to.
ctypedef struct Sink:
    double* to
    Py_ssize_t stride
    bint begun


cdef inline void take_lanes(const Sink* sink, Py_ssize_t c, const Sums* a) noexcept nogil:
    """The lanes' sums of columns c to c + LANES."""
    cdef double* to = sink.to + c
    if sink.begun:
        add_to_totals(to, to + 2 * sink.stride, a.s)
        add_to_totals(to + sink.stride, to + 3 * sink.stride, a.q)
    else:
        begin_totals(to, to + 2 * sink.stride, a.s)
        begin_totals(to + sink.stride, to + 3 * sink.stride, a.q)


cdef void take_last_lanes(const Sink* sink, Py_ssize_t c, Py_ssize_t n, const Sums* a) noexcept nogil:
    """The last n lanes' sums of columns c to c + n."""
    cdef double few[4 * 16]
    cdef Sink apart
    cdef Py_ssize_t i, j
    apart.to, apart.stride, apart.begun = few, 16, sink.begun
    for i in range(4 if sizeof(real) == 8 else 2):
        for j in range(n if sink.begun else 0):
            few[16 * i + LANES - n + j] = sink.to[i * sink.stride + c + j]
    take_lanes(&apart, 0, a)
    for i in range(4 if sizeof(real) == 8 else 2):
        for j in range(n):
            sink.to[i * sink.stride + c + j] = few[16 * i + LANES - n + j]


cdef inline Sums tree_of_rows(const Source* row, Py_ssize_t x, Py_ssize_t dy, const Gate* gate, int kind) noexcept nogil:
    """A tree of LANES columns of 4 rows, so many elements from where these are."""
    cdef lanes b[4]
    cdef lanes d[4]
    cdef Py_ssize_t j
    for j in range(4):
        b[j] = sub(load(row[j].x + x), gate.centre)
        d[j] = d_of(gate, &row[j], x, dy, b[j], kind)
    return tree_of(d, b)


cdef inline Source add_trees(Sums* a, const Source* at, const Gate* gate, int trees, int units, int kind) noexcept nogil:
    """Add a tree of 4 rows, or the sum of two, to `units` x LANES columns; both numbers are constants. Returns where the rows after them are."""
    cdef Sums sums
    cdef Source row[4]
    cdef Py_ssize_t j, k, x = 4 * at.x_step, dy = 4 * at.dy_step
    row[0] = at[0]
    for j in range(1, 4):
        row[j] = moved(&row[j - 1], at.x_step, at.dy_step)
    for j in range(4 if at.x_ahead else 0):
        for k in range(units):
            fetch_ahead(&row[j], k * LANES, k * LANES, kind)
            if trees == 2:
                fetch_ahead(&row[j], x + k * LANES, dy + k * LANES, kind)
    for k in range(units):
        sums = tree_of_rows(row, k * LANES, k * LANES, &gate[k], kind)
        if trees == 2:
            add_sums(&sums, tree_of_rows(row, x + k * LANES, dy + k * LANES, &gate[k], kind))
        add_sums(&a[k], sums)
    return moved(at, trees * x, trees * dy)


cdef inline void tile_sums(const Source* at, Py_ssize_t rows, const Centres* of, Py_ssize_t c, Py_ssize_t short, const Sink* sink, int units,
                           int kind) noexcept nogil:
    """The sums of `units` x LANES columns, a constant, from c - short on, over at most TREES trees of 4 rows; those of the first `short` are nobody's."""
    cdef Sums a[TILE_LANES]
    cdef Sums few
    cdef lanes b[1]
    cdef Gate gate[TILE_LANES]
    cdef Source row[2]
    cdef Py_ssize_t n = 0, j, k, rest = rows % 4
    row[0] = at[0]
    for k in range(units):
        a[k].s = a[k].q = spread(0)
        gate[k].centre = load_reals(of.centre + c - short + k * LANES)
        if kind == OF_DY_BEHIND:
            gate[k].hi, gate[k].scale = load_reals(of.hi + c - short + k * LANES), load_reals(of.scale + c - short + k * LANES)
            gate[k].offset = load_reals(of.offset + c - short + k * LANES)
            gate[k].activation = &of.activation
    while n < rows - (rest + 4):
        row[0] = add_trees(a, &row[0], gate, 2, units, kind)
        n += 8
    if n < rows - rest:
        row[0] = add_trees(a, &row[0], gate, 1, units, kind)
    for k in range(units if rest else 0):
        few.s = few.q = spread(0)
        row[1] = row[0]
        for j in range(rest):
            b[0] = sub(load(row[1].x + k * LANES), gate[k].centre)
            add_term(&few, d_of(&gate[k], &row[1], k * LANES, k * LANES, b[0], kind), b[0])
            row[1] = moved(&row[1], at.x_step, at.dy_step)
        add_sums(&a[k], few)
    if short:
        take_last_lanes(sink, c, LANES - short, &a[0])
        return
    for k in range(units):
        take_lanes(sink, c + k * LANES, &a[k])


cdef inline void sum_rows(const Job* job, const Box* rows, const Centres* of, const Sink* sink, int kind) noexcept nogil:
    """Of at most BLOCK_ROWS rows, tile by tile. Of a last unit that isn't whole, the lanes end where the columns do."""
    cdef Py_ssize_t c = 0, part, short
    cdef Source at
    cdef Box b = rows[0]
    while c < rows.width:
        part = TILE_LANES * LANES if rows.width - c >= TILE_LANES * LANES else min(LANES, rows.width - c)
        short = max(0, LANES - part)
        if rows.c + c >= short:         # in place of the missing columns, neighbours are read
            b.c, b.width = rows.c + c - short, part + short
            at = source(job, &b, kind != OF_MOMENTS)
        else:
            b.c, b.width = rows.c + c, part
            at = source(job, &b, kind != OF_MOMENTS)
            at = moved(&at, -short, -short)
        if job.far and job.fetches:     # the same of the next rows
            at.x_ahead, at.dy_ahead = BLOCK_ROWS * at.x_step, BLOCK_ROWS * at.dy_step
        if part == TILE_LANES * LANES:
            tile_sums(&at, rows.rows, of, c, 0, sink, TILE_LANES, kind)
        else:
            tile_sums(&at, rows.rows, of, c, short, sink, 1, kind)
        c += part


cdef inline void sum_columns(const Job* job, const Chunk* chunk, Py_ssize_t c0, Py_ssize_t width, const Centres* of, double* to,
                             Py_ssize_t stride, int kind) noexcept nogil:
    """Of a group of columns. The rest of a row that isn't whole belongs to the last chunk."""
    cdef Sink sink
    cdef Box rows = box(chunk.n0, c0, 0, 0, width, 1)
    sink.to, sink.stride, sink.begun = to, stride, False
    while rows.n < chunk.n1:
        rows.rows = min(BLOCK_ROWS, chunk.n1 - rows.n)
        sum_rows(job, &rows, of, &sink, kind)
        sink.begun = True
        rows.n += BLOCK_ROWS
    if job.tail > c0 and chunk.n1 == job.rows:
        rows.n, rows.rows, rows.width = job.rows, 1, min(job.tail - c0, width)
        sum_rows(job, &rows, of, &sink, kind)


cdef void sum_group(const Job* job, const Chunk* chunk, Py_ssize_t c0, Py_ssize_t width, const Centres* of, double* to,
                    Py_ssize_t stride) noexcept nogil:
    """The sums of columns c0 to c0 + width over a chunk, each kind `stride` after the one before."""
    if job.reduction == MOMENTS and job.by_columns:
        sum_columns(job, chunk, c0, width, of, to, stride, OF_MOMENTS)
    elif job.reduction == MOMENTS:
        sum_runs(job, chunk, c0, width, of, to, stride, OF_MOMENTS)
    elif job.by_columns and job.activation:
        sum_columns(job, chunk, c0, width, of, to, stride, OF_DY_BEHIND)
    elif job.by_columns:
        sum_columns(job, chunk, c0, width, of, to, stride, OF_DY_ALONE)
    elif job.activation:
        sum_runs(job, chunk, c0, width, of, to, stride, OF_DY_BEHIND)
    else:
        sum_runs(job, chunk, c0, width, of, to, stride, OF_DY_ALONE)
