# How a job is cut: the chunks of a channel's reduction (from the shape alone, so results never depend on threads), and who does what.

from .table cimport Job, View

cdef enum:
    LANES = 16          # partial sums of a channel side by side in the row layout: one AVX-512 register of float32
    TILE = 64           # channels handled side by side, at most
    CHUNK = 16384       # elements of a channel worth a chunk of their own, row layout
    CHUNK_ROWS = 512    # rows worth a chunk of their own, column layout
    MAX_CHUNKS = 64     # bounds the memory of partial results and the parallelism of a single channel
    IN_CACHE = 1 << 20  # bytes that lie in the caches of the cores that share them


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline void cut_channels(Job* job) noexcept nogil:
    """Choose fold, and the chunks: at most about MAX_CHUNKS pieces of about CHUNK elements (CHUNK_ROWS in the column layout), all of one size
    but for the last."""
    cdef Py_ssize_t outer_chunks, inner_chunks = 1
    job.fold = 1
    if job.inner == 1 and 0 < job.channels < TILE:
        job.fold = TILE // (job.channels & -job.channels)       # the least that makes rows of whole tiles
        if job.outer < 8 * job.fold:
            job.fold = 1
    job.rows = job.outer // job.fold
    job.columns = job.channels * job.fold
    job.tail = job.outer % job.fold * job.channels
    if job.inner == 1:
        outer_chunks = job.rows // CHUNK_ROWS
    else:
        outer_chunks = ceil_div(job.rows, max(1, CHUNK // job.inner)) if job.inner > 0 else 1
        if job.inner > CHUNK and job.rows < MAX_CHUNKS:
            inner_chunks = min(ceil_div(job.inner, CHUNK), MAX_CHUNKS // max(1, job.rows))
    job.chunk_outer = max(1, ceil_div(job.rows, max(1, min(outer_chunks, MAX_CHUNKS))))
    job.chunk_inner = max(1, ceil_div(ceil_div(job.inner, inner_chunks), LANES) * LANES)
    job.inner_chunks = ceil_div(job.inner, job.chunk_inner)
    job.chunks = ceil_div(job.rows, job.chunk_outer) * job.inner_chunks


cdef inline bint fold_views(Job* job) noexcept nogil:
    """Let the views step over `fold` pixels at a time; False where their pixels aren't contiguous."""
    cdef View* view
    cdef int i
    if job.fold > 1:
        for i in range(3):
            view = &job.x if i == 0 else &job.dy if i == 1 else &job.y
            if view.data != NULL and (view.outer_stride != job.channels or view.channel_stride != 1 and job.channels > 1):
                return False
            view.outer_stride *= job.fold
            view.channel_stride = 1
    return True


cdef inline void share_work(Job* job, int threads, bint stream, double bytes) noexcept nogil:
    """Choose how `threads` threads share the work on `bytes` of arrays, and whether they write past the caches."""
    cdef Py_ssize_t planes = job.rows * job.columns, groups, rounds
    job.threads = threads
    job.shares = threads
    job.stream = stream
    # Columns side by side: in the row layout, enough channels for 4096 contiguous elements.
    job.group = TILE if job.inner == 1 else max(1, min(TILE, 4096 // max(1, job.inner)))
    # Channel by channel unless that would leave threads idle for more than an eighth of the time. In the column layout memory is walked best in
    # its own order, unless it is all in cache.
    groups = ceil_div(job.columns, job.group)
    rounds = ceil_div(groups, threads)
    job.by_channel = rounds * threads * 8 <= groups * 9 and (job.inner > 1 or job.fold == 1 and threads > 1 and bytes <= IN_CACHE)
    job.pieces = 1 if threads == 1 or planes == 0 else min(ceil_div(4 * threads, planes), ceil_div(job.inner, LANES))
    job.piece = max(1, ceil_div(ceil_div(job.inner, max(1, job.pieces)), LANES) * LANES)
    job.pieces = ceil_div(job.inner, job.piece)
