# How a job is cut: the chunks of a channel's reduction (from the shape alone, so results never depend on threads), and who does what.

from .table cimport Job

cdef enum:
    LANES = 16          # partial sums of a channel side by side in the row layout: one AVX-512 register of float32
    TILE = 64           # channels handled side by side, at most
    CHUNK = 16384       # elements of a channel worth a chunk of their own, row layout
    CHUNK_PIXELS = 1024 # the same, column layout, where a chunk is shared by channels
    MAX_CHUNKS = 64     # bounds the memory of partial results and the parallelism of a single channel


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline void cut_channels(Job* job) noexcept nogil:
    """Choose the chunks: at most about MAX_CHUNKS pieces of about CHUNK elements (CHUNK_PIXELS in the column layout), equal but for the last."""
    cdef Py_ssize_t outer_chunks, inner_chunks = 1
    if job.inner == 1:
        outer_chunks = job.outer // CHUNK_PIXELS
    else:
        outer_chunks = ceil_div(job.outer, max(1, CHUNK // job.inner)) if job.inner > 0 else 1
        if job.inner > CHUNK and job.outer < MAX_CHUNKS:
            inner_chunks = min(ceil_div(job.inner, CHUNK), MAX_CHUNKS // max(1, job.outer))
    job.chunk_outer = max(1, ceil_div(job.outer, max(1, min(outer_chunks, MAX_CHUNKS))))
    job.chunk_inner = max(1, ceil_div(ceil_div(job.inner, inner_chunks), LANES) * LANES)
    job.inner_chunks = ceil_div(job.inner, job.chunk_inner)
    job.chunks = ceil_div(job.outer, job.chunk_outer) * job.inner_chunks


cdef inline void share_work(Job* job, int threads, bint stream) noexcept nogil:
    """Choose how `threads` threads share the work, and whether they write past the caches."""
    cdef Py_ssize_t planes = job.outer * job.channels, groups, rounds
    job.threads = threads
    job.shares = threads
    job.stream = stream
    # Channels side by side: in the row layout, enough for 4096 contiguous elements.
    job.group = TILE if job.inner == 1 else max(1, min(TILE, 4096 // max(1, job.inner)))
    # By channel unless that would leave threads idle for more than an eighth of the time.
    groups = ceil_div(job.channels, job.group)
    rounds = ceil_div(groups, threads)
    job.by_channel = threads == 1 or rounds * threads * 8 <= groups * 9
    job.pieces = 1 if threads == 1 or planes == 0 else min(ceil_div(4 * threads, planes), ceil_div(job.inner, LANES))
    job.piece = max(1, ceil_div(ceil_div(job.inner, max(1, job.pieces)), LANES) * LANES)
    job.pieces = ceil_div(job.inner, job.piece)
