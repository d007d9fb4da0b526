"""What a call needs no Python for: completing a job and running it, with threads, plan, working memory and kernels."""

from libc.float cimport DBL_MAX
from libc.math cimport INFINITY, NAN, nextafter, nextafterf
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy

from . cimport dispatch
from .capi cimport CBN_CLIP, CBN_HARD_SWISH, CBN_LEAKY_RELU, CBN_NONE, CBN_RELU, CBN_RELU6, CBN_SIGMOID, CBN_SILU
from .kernels.job cimport (ARRAYS, CLIPPED, COEFFICIENTS, COPIED, FLOAT32, GRADIENTS, HARD_SWISH, LEAKY, MOMENTS, OF_DY, OF_RESIDUAL, OF_X, OF_Y, SIGMOID, SILU, Job,
                          Vector)
from .kernels.order cimport SMALL_PLANE, ceil_div, coefficient_stride, sums_of
from .kernels.tuning cimport share_work
from .memory cimport give_up_kept
from .threads cimport Loan, begin, borrow, give_back, worth_team

cdef extern from "working_memory.h" nogil:
    int LINE_BYTES
    char* take_memory(size_t bytes)
    void give_memory_back(char* memory)


ctypedef fused bits:
    int32_t
    int64_t


cdef double elements_of(const Job* job) noexcept nogil:
    return <double>job.outer * job.channels * job.inner


cdef double work_of(const Job* job) noexcept nogil:
    """The elements, or fewer where they are worth fewer threads: what is there for each channel travels between cores, in the column layout."""
    return elements_of(job) * (0.5 if job.inner == 1 and job.reduction else 1)


cdef bint worth_threads(const Job* job) noexcept nogil:
    """Whether the work is enough for more than one thread."""
    return worth_team(work_of(job))


cdef bint reads_where_it_writes(const Job* job) noexcept nogil:
    """Whether y is x, dy or the residual."""
    cdef const char* at[OF_Y + 1]
    cdef int which
    at[OF_X], at[OF_DY], at[OF_Y] = <char*>job.x.data, <char*>job.dy.data, <char*>job.y.data
    at[OF_RESIDUAL] = at[OF_X] + job.residual if job.with_residual else NULL
    for which in range(OF_Y + 1):
        if job.places != NULL and job.places.of[which].data != NULL:
            at[which] = <char*>job.places.of[which].data
    return at[OF_Y] == at[OF_X] or at[OF_Y] == at[OF_DY] or at[OF_Y] == at[OF_RESIDUAL]


cdef bint copies_boxes(const Job* job) noexcept nogil:
    """Whether there may be boxes of arrays that lanes can't take where they are."""
    return job.places != NULL or job.by_columns and (job.columns % SMALL_PLANE or job.tail)


cdef Job* apart(const Job* job, char* memory) noexcept nogil:
    """A copy of the job in working memory, from the next cache line on: what other threads read on the caller's stack, the caller waits for when it
    writes there again."""
    cdef size_t i
    memory += LINE_BYTES - <size_t>memory % LINE_BYTES
    for i in range(0, sizeof(Job), 8):      # word by word: what `rep movs` writes can't be loaded at once
        memcpy(memory + i, <const char*>job + i, 8)
    return <Job*>memory


cdef bint execute(Job* job, int budget) noexcept nogil:
    """Run a job that is complete but for its share_work and memory, on up to `budget` threads.

    False where the system refuses the memory; nothing has been written then.
    """
    cdef Py_ssize_t partials, coefficients, bytes_needed, copies = 0, itemsize = 4 if job.dtype == FLOAT32 else 8
    cdef double elements = elements_of(job)
    cdef char* memory
    cdef bint stream
    cdef Loan loan
    if job.count == 0:
        job.count = <double>job.outer * job.inner
    borrow(&loan, work_of(job), budget)
    # What has just been read is in the first cache, and is written there; kernels that write past the caches rely on it.
    stream = elements * (job.bytes_read + job.bytes_written) > dispatch.stream_bytes and not reads_where_it_writes(job)
    job.fetches = dispatch.fetches
    share_work(job, loan.threads, stream, elements * job.bytes_read, dispatch.core_cache)
    partials = ceil_div(sums_of(job) * job.chunks * job.columns * sizeof(double), 64) * 64 if job.reduction else 0
    coefficients = COEFFICIENTS * coefficient_stride(job.columns) * itemsize
    if not job.reduction or job.by_channel:
        coefficients *= job.threads         # a thread makes its own
    if copies_boxes(job):
        copies = job.threads * ARRAYS * COPIED * itemsize + 64
    begin(&loan)
    bytes_needed = partials + coefficients + copies + LINE_BYTES + sizeof(Job)
    memory = take_memory(bytes_needed)
    if memory == NULL:
        give_up_kept()
        memory = take_memory(bytes_needed)
    if memory != NULL:
        job.partials = <double*>memory
        job.copies_at = memory + partials + coefficients
        job.copies_at = <char*>job.copies_at + (64 - <size_t>job.copies_at % 64)     # to a cache line
        job.coefficients = memory + partials
        if loan.threads > 1:
            job.serial_seconds = &loan.serial_seconds
        dispatch.tables[job.stored].run(job if loan.threads == 1 else apart(job, memory + partials + coefficients + copies))
        give_memory_back(memory)
    give_back(&loan)
    return memory != NULL


cdef void conclude_empty(Job* job, Py_ssize_t channels) noexcept nogil:
    """Of no values, the statistics are NaN and the sums 0."""
    if job.reduction == MOMENTS:
        fill(&job.mean, channels, NAN)
        fill(&job.var, channels, NAN)
    elif job.reduction == GRADIENTS:
        fill(&job.weight_grad, channels, 0)
        fill(&job.bias_grad, channels, 0)


cdef void fill(Vector* vector, Py_ssize_t channels, double value) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels if vector.data != NULL else 0):
        if vector.dtype == FLOAT32:
            (<float*>vector.data)[c * vector.stride] = <float>value
        else:
            (<double*>vector.data)[c * vector.stride] = value


cdef inline bint any_sign(const bits* patterns, Py_ssize_t n) noexcept nogil:
    """Whether the sign of any float is set, 0 and NaN included: many at a time."""
    cdef bits together = 0
    cdef Py_ssize_t i
    for i in range(n):
        together |= patterns[i]
    return together < 0


cdef bint any_negative(const Vector* vector, Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    cdef bint found = False
    if vector.dtype == FLOAT32:
        if vector.stride == 1 and not any_sign(<const int32_t*>vector.data, channels):
            return False
        for c in range(channels):
            found |= (<const float*>vector.data)[c * vector.stride] < 0
    else:
        if vector.stride == 1 and not any_sign(<const int64_t*>vector.data, channels):
            return False
        for c in range(channels):
            found |= (<const double*>vector.data)[c * vector.stride] < 0
    return found


cdef bint set_activation(Job* job, int activation, double alpha, double beta, bint backward) noexcept nogil:
    """Let an activation follow, on elements of job.dtype; False where there is none of this kind and these numbers."""
    job.low = job.high = NAN
    if activation == CBN_NONE:
        return True
    job.activation = CLIPPED
    if activation == CBN_RELU:
        job.low = 0
    elif activation == CBN_RELU6:
        job.low, job.high = 0, 6
    elif activation == CBN_CLIP:
        job.low, job.high = alpha, beta
        if backward:                # the gradient passes at either end, as PyTorch's clamp has it
            job.low = nextafterf(alpha, -INFINITY) if job.dtype == FLOAT32 else nextafter(alpha, -INFINITY)
            job.high = nextafterf(beta, INFINITY) if job.dtype == FLOAT32 else nextafter(beta, INFINITY)
        return alpha <= beta
    elif activation == CBN_LEAKY_RELU:
        job.activation, job.low, job.slope = LEAKY, 0, alpha
        return -DBL_MAX <= alpha <= DBL_MAX
    elif activation == CBN_HARD_SWISH:
        job.activation = HARD_SWISH
    elif activation == CBN_SIGMOID:
        job.activation = SIGMOID
    elif activation == CBN_SILU:
        job.activation = SILU
    else:
        return False
    return True
