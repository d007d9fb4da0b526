# What fixes only speed: how threads share the work, in which pieces, and past which caches. Never changes a result.
#
# window: the columns that all threads take together from statistics to the apply pass. group: those that one thread reduces side by side.
# piece: the part of a run that one thread applies at a time.

from .job cimport Job
from .order cimport TILE, ceil_div

cdef enum:
    WIDE = 512          # columns of the column layout that a reduction takes at a time
    MOST_GROUP = 32     # channels of the row layout that it takes side by side
    FURTHER = 2048      # elements from what a reduction of the row layout reads to what it fetches: into the runs of the next channels
    RECENT = 65536      # elements of rows, the last ones first, that the apply pass takes at a time after a reduction
    APPLIED_UNITS = 4   # of LANES columns that it takes side by side
    BLOCK = 512         # elements of the rows that it takes tile by tile before the next ones;
    FAR_BEYOND = 8      # from so many times a core's cache on (narrow rows: half as much again), they are taken one after the other: in the order of memory
    ALIGNED_RUN = 256   # elements of a run that are worth beginning on a cache line
    STREAM_AHEAD = 1024 # elements from what it reads to what it fetches, where results are written past the caches,
    OUTPUT_AHEAD = 512  # and from what it writes to what it fetches to be written


cdef inline Py_ssize_t groups_of(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """How many groups the columns c0 to c1 make."""
    return ceil_div(c1 - c0, job.group)


cdef inline bint balanced(Py_ssize_t items, Py_ssize_t threads) noexcept nogil:
    """Whether threads that share items are idle for at most an eighth of the time."""
    return ceil_div(items, threads) * threads * 8 <= items * 9


cdef inline void share_work(Job* job, int threads, bint stream, double bytes, double core_cache) noexcept nogil:
    """Choose how `threads` threads, each with a cache of its own, share the work on `bytes` of input, and whether they write past the caches."""
    cdef Py_ssize_t planes
    job.threads = threads
    job.stream = stream
    job.far = bytes > threads * core_cache
    job.beyond = stream or bytes > (FAR_BEYOND if job.columns >= 512 else FAR_BEYOND * 3 // 2) * core_cache
    job.window = job.columns
    job.by_channel = False
    if job.by_columns:
        share_columns(job, bytes, core_cache)
    else:
        share_runs(job, bytes, core_cache)
    planes = job.rows * job.window
    job.pieces = 1 if threads == 1 or planes == 0 else ceil_div(4 * threads, planes)
    job.piece = max(TILE, ceil_div(ceil_div(job.length, max(1, job.pieces)), TILE) * TILE)
    job.pieces = max(1, job.length // job.piece)        # the last one takes what is left over


cdef inline void share_columns(Job* job, double bytes, double core_cache) noexcept nogil:
    # Memory in its own order: threads that write neighbouring columns of one row would fetch each other's lines ahead. Only where each thread's
    # part of a row is long, and there are few rows, does it cost more to hand so many coefficients from core to core.
    job.group = WIDE if job.chunks >= job.threads else min(WIDE, ceil_div(ceil_div(job.columns, job.threads), TILE) * TILE)
    job.by_channel = job.threads > 1 and job.reduction and job.copies == 1 and job.columns >= 1024 * job.threads and bytes <= core_cache \
        and balanced(groups_of(job, 0, job.columns), job.threads)


cdef inline void share_runs(Job* job, double bytes, double core_cache) noexcept nogil:
    # As many channels side by side as stay in a core's own cache from their sums to the apply pass, if threads share them evenly.
    cdef Py_ssize_t groups
    job.group = MOST_GROUP
    while job.group > 1 and (job.group * bytes > job.columns * core_cache or not balanced(ceil_div(job.columns, job.group), job.threads)):
        job.group //= 2
    groups = ceil_div(job.columns, job.group)
    if job.threads > 1 and job.reduction and bytes > groups * core_cache:
        job.window = job.group
    else:
        job.by_channel = job.reduction and balanced(groups, job.threads)
