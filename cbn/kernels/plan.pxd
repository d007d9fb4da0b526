# How a job is cut: the chunks of a channel's reduction (from the shape alone, so results never depend on threads), and who does what.

from .table cimport Job

cdef enum:
    CHUNK = 16384       # elements of a channel worth a chunk of their own
    MAX_CHUNKS = 64     # bounds the memory of partial results and the parallelism of a single channel
    LANES = 16          # of a row reduction: one AVX-512 register of float32


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline void cut_channels(Job* job) noexcept nogil:
    """Choose chunk_outer, chunk_inner and chunks: at most MAX_CHUNKS (+ a remainder an axis) pieces of about CHUNK elements."""
    cdef Py_ssize_t pieces
    job.chunk_inner = job.inner
    job.chunk_outer = max(1, CHUNK // max(1, job.inner), ceil_div(job.outer, MAX_CHUNKS))
    if job.inner > CHUNK and job.outer < MAX_CHUNKS:
        pieces = min(ceil_div(job.inner, CHUNK), MAX_CHUNKS // max(1, job.outer))
        job.chunk_inner = ceil_div(ceil_div(job.inner, pieces), LANES) * LANES
    job.chunks = ceil_div(job.outer, job.chunk_outer) * ceil_div(job.inner, job.chunk_inner)


cdef inline void share_work(Job* job, int threads) noexcept nogil:
    """Choose how `threads` threads share the work."""
    cdef Py_ssize_t planes = job.outer * job.channels, rounds = ceil_div(job.channels, threads)
    job.threads = threads
    job.shares = threads
    job.stream = False
    # By channel unless that would leave threads idle for more than an eighth of the time.
    job.by_channel = threads == 1 or rounds * threads * 8 <= job.channels * 9
    job.pieces = 1 if threads == 1 or planes == 0 else min(ceil_div(4 * threads, planes), ceil_div(job.inner, LANES))
    job.piece = ceil_div(ceil_div(job.inner, max(1, job.pieces)), LANES) * LANES
    job.pieces = ceil_div(job.inner, max(1, job.piece))
