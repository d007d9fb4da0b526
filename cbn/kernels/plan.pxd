# How a job is cut: the chunks of a channel's reduction (from the shape alone, so results never depend on threads), and who does what.

from .table cimport FLOAT32, GRADIENTS, Job, View

cdef enum:
    LANES = 16          # partial sums of a channel side by side in the row layout: one AVX-512 register of float32
    AROUND = 32         # columns of a cache line, of the smallest elements
    TILE = 64           # channels handled side by side: in registers in the column layout, at most in the row layout
    WIDE = 512          # columns of the column layout that a reduction takes at a time,
    WIDEST = WIDE + LANES       # and at the beginning of a row those before the first boundary of a cache line, too
    CHUNK = 16384       # elements of a channel worth a chunk of their own, row layout
    CHUNK_ROWS = 256    # rows worth a chunk of their own, column layout
    MAX_CHUNKS = 64     # bounds the memory of partial results and the parallelism of a single channel


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t coefficient_stride(Py_ssize_t columns) noexcept nogil:
    """From one array of coefficients to the next: in the column layout, the first AROUND columns' stand there once more, for rows that begin later."""
    return columns + AROUND


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
        if outer_chunks > 2:        # so that threads reduce about the rows to which they apply the results
            outer_chunks = ceil_div(outer_chunks, 4) * 4
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


cdef inline Py_ssize_t groups_of(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """How many groups the columns c0 to c1 make."""
    return ceil_div(c1 - c0 - job.head, job.group)


cdef inline Py_ssize_t group_begin(const Job* job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t i) noexcept nogil:
    """Where group i of these begins: but for the first one, in the column layout, on a cache line."""
    return min(c0 + i * job.group + job.head, c1) if i > 0 else c0


cdef inline void share_work(Job* job, int threads, bint stream, double bytes, double core_cache) noexcept nogil:
    """Choose how `threads` threads, each with a cache of its own, share the work on `bytes` of input, and whether they write past the caches.

    Each thread takes groups of channels from reduction to apply (by_channel), or all threads together take a window of channels at a time: one
    group where that is more than the cache of one core holds, otherwise all of them.
    """
    cdef Py_ssize_t planes, groups, room, bytes_of
    job.head = 0
    job.threads = threads
    job.stream = stream
    job.far = bytes > threads * core_cache
    job.window = job.columns
    if job.inner == 1:
        # Memory in its own order: threads that write neighbouring columns of one row would fetch each other's lines ahead. Only where each thread's
        # part of a row is long, and there are few rows, does it cost more to hand so many coefficients from core to core.
        job.group = WIDE if job.chunks >= threads else min(WIDE, ceil_div(ceil_div(job.columns, threads), TILE) * TILE)
        if job.columns >= WIDE and job.places == NULL:      # enough for one tile more
            bytes_of = 4 if job.dtype == FLOAT32 else 8
            if job.x.outer_stride * bytes_of % 64 == 0:
                job.head = (64 - <size_t>job.x.data % 64) % 64 // bytes_of
        job.by_channel = threads > 1 and job.reduction and job.fold == 1 and job.columns >= 1024 * threads and bytes <= core_cache and balanced(
            groups_of(job, 0, job.columns), threads)
    else:
        # As many channels side by side as leave room in the first-level cache for what is written: that makes vectors of what there is one of for each.
        job.group = TILE // 2
        room = 2048 if job.reduction == GRADIENTS else 4096
        while job.group > 1 and job.group * job.inner > room:
            job.group //= 2
        # Of few images twice as many, if that is not much more and threads share them evenly; of many, they would take too much of the second-level cache.
        if job.rows <= 8 and job.group < TILE // 2 and job.group * job.inner <= room * 4 // 5 and balanced(ceil_div(job.columns, 2 * job.group), threads):
            job.group *= 2
        if not job.reduction:
            job.group = max(job.group, ceil_div(ceil_div(job.columns, threads), LANES) * LANES)
        groups = ceil_div(job.columns, job.group)
        if threads > 1 and job.reduction and bytes > groups * core_cache:
            job.window = job.group
            job.by_channel = False
        else:
            job.by_channel = balanced(groups, threads) and (job.reduction or job.rows == 1)
    planes = job.rows * job.window
    job.pieces = 1 if threads == 1 or planes == 0 else min(ceil_div(4 * threads, planes), ceil_div(job.inner, LANES))
    job.piece = max(1, ceil_div(ceil_div(job.inner, max(1, job.pieces)), LANES) * LANES)
    job.pieces = ceil_div(job.inner, job.piece)


cdef inline bint balanced(Py_ssize_t items, Py_ssize_t threads) noexcept nogil:
    """Whether threads that share items are idle for at most an eighth of the time."""
    return ceil_div(items, threads) * threads * 8 <= items * 9
