# What fixes bits: how a channel's elements are cut for its sums, from the shape alone, so that results never depend on threads or machines.
#
#   row layout: N,C,*spatial with planes of SMALL_PLANE elements and more       column layout: everything else
#
#        run (inner elements of a channel)                                           columns: channels; or, of few channels, those of `fold` pixels;
#      +----+----+----+----+----+--+                                                          or the elements of small planes
#      |    |    |    |    |    |  |  a tree: 4 x LANES elements                     +----+----+----+-
#      +----+----+----+----+----+--+    in a run, in a column 4 rows                 |    |    |    |   a tree: 4 rows of LANES columns
#        LANES                                                                       +----+----+----+-
#
# What is left of a run after whole trees, or of a block of rows, is added one after the other in place of a tree.
# Trees of 4 are added to a lane in pairs, as equal terms double exactly, TREES of them, and then to totals in float64; of float64 elements, what
# these lose by rounding is summed, too. Runs of a channel follow one another in the same lanes. A run is taken TREES trees at a time.
# A chunk is what of a channel (of a row of channels) is summed by itself: some rows or, of long runs, a part of one. The sums of chunks and of a
# channel's columns are added in their order, in float64.
# What fixes speed alone (windows, groups, pieces: who does what when) is in tuning.pxd.

from .job cimport FLOAT64, Job, View

cdef enum:
    TREES = 8           # additions to a lane before float64: nearly equal terms, which all round the same way, lose 2 ** -21 of their sum at the most
    SAMPLES = 16        # elements of a channel whose mean is what its sums are about, column layout
    RUN_SAMPLES = 8     # the same, row layout
    SMALL_PLANE = 16    # elements, from which on a plane is a run
    AROUND = 32         # columns whose coefficients stand once more after the last, for rows that begin later
    TILE = 64           # columns that few channels are folded to
    CHUNK = 16384       # elements of a channel worth a chunk of their own, row layout
    CHUNK_ROWS = 256    # rows worth a chunk of their own, column layout
    MAX_CHUNKS = 64     # bounds the memory of partial results and the parallelism of a single channel
    LONG_RUN = 1024     # elements, of which chunks of a part of a run are multiples: whole sequences of TREES trees


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t coefficient_stride(Py_ssize_t columns) noexcept nogil:
    return columns + AROUND


cdef inline int sums_of(const Job* job) noexcept nogil:
    """Numbers to a chunk and column: two sums and, of float64 elements, what they have lost."""
    return 4 if job.dtype == FLOAT64 else 2


cdef inline void cut_channels(Job* job) noexcept nogil:
    job.by_columns = job.inner < SMALL_PLANE
    job.length = 1 if job.by_columns else job.inner
    job.fold = 1
    if job.inner == 1 and 0 < job.channels < TILE:
        job.fold = TILE // (job.channels & -job.channels)       # the least that makes rows of whole tiles
        if job.outer < 8 * job.fold:
            job.fold = 1
    job.copies = job.fold
    job.copy_step, job.column_step = job.channels, 1
    if job.by_columns and job.inner > 1:
        job.copies = job.column_step = job.inner
        job.copy_step = 1
    job.rows = job.outer // job.fold
    job.columns = job.channels * job.copies
    job.tail = job.outer % job.fold * job.channels
    cut_chunks(job)


cdef inline void cut_chunks(Job* job) noexcept nogil:
    """At most about MAX_CHUNKS pieces of about CHUNK elements (CHUNK_ROWS in the column layout), all of one size but for the last."""
    cdef Py_ssize_t chunks, along = 1
    if job.by_columns:
        chunks = job.rows // CHUNK_ROWS
        if chunks > 2:          # so that threads reduce about the rows to which they apply the results
            chunks = ceil_div(chunks, 4) * 4
    else:
        chunks = ceil_div(job.rows, max(1, CHUNK // job.length))
        if job.length > CHUNK and job.rows < MAX_CHUNKS:
            along = min(ceil_div(job.length, CHUNK), MAX_CHUNKS // max(1, job.rows))
    job.chunk_rows = max(1, ceil_div(job.rows, max(1, min(chunks, MAX_CHUNKS))))
    job.chunk_length = max(1, ceil_div(ceil_div(job.length, along), LONG_RUN) * LONG_RUN)
    job.chunks_along = max(1, job.length // job.chunk_length)       # the last one takes what is left over
    job.chunks = max(1, ceil_div(job.rows, job.chunk_rows)) * job.chunks_along


# Rows [n0, n1) x inner indices [i0, i1) of a channel.
ctypedef struct Chunk:
    Py_ssize_t n0, n1, i0, i1


cdef inline Chunk chunk_of(const Job* job, Py_ssize_t k) noexcept nogil:
    cdef Chunk chunk
    cdef Py_ssize_t row = k // job.chunks_along * job.chunk_rows, part = k % job.chunks_along
    chunk.n0, chunk.n1 = row, min(row + job.chunk_rows, job.rows)
    chunk.i0 = part * job.chunk_length
    chunk.i1 = chunk.i0 + job.chunk_length if part < job.chunks_along - 1 else job.length
    return chunk


cdef inline bint fold_views(Job* job) noexcept nogil:
    """In the column layout, let the views count columns, and step over `fold` pixels at a time; False where these aren't contiguous."""
    cdef View* view
    cdef int i
    for i in range(3 if job.by_columns else 0):
        view = &job.x if i == 0 else &job.dy if i == 1 else &job.y
        if view.data == NULL:
            continue
        if job.channels > 1 and view.channel_stride != job.column_step or job.fold > 1 and view.outer_stride != job.channels:
            return False
        view.outer_stride *= job.fold
        view.channel_stride = 1
    return True
