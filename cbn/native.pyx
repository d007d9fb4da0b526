"""What runs a job, and needs no Python for it: threads, plan, working memory, kernels."""

from libc.stdlib cimport free, malloc

from . cimport dispatch
from .kernels.plan cimport coefficient_stride, share_work
from .kernels.table cimport ARRAYS, COEFFICIENTS, COPIED, FLOAT32, GATES, Job
from .threads cimport Loan, begin, borrow, give_back, worth_team


cdef double elements_of(const Job* job) noexcept nogil:
    return <double>job.outer * job.channels * job.inner


cdef bint worth_threads(const Job* job) noexcept nogil:
    """Whether the work is enough for more than one thread."""
    return worth_team(elements_of(job))


cdef bint execute(Job* job, int budget) noexcept nogil:
    """Run a job that is complete but for its share_work and memory, on up to `budget` threads.

    False where the system refuses the memory; nothing has been written then.
    """
    cdef Py_ssize_t partials, coefficients, copies = 0, itemsize = 4 if job.dtype == FLOAT32 else 8
    cdef double elements = elements_of(job)
    cdef char* memory
    cdef Loan loan
    borrow(&loan, elements, budget)
    share_work(job, loan.threads, elements * (job.bytes_read + job.bytes_written) > dispatch.stream_bytes, elements * job.bytes_read,
               dispatch.core_cache)
    partials = 2 * job.chunks * job.columns * sizeof(double) if job.reduction else 0
    coefficients = (COEFFICIENTS + GATES) * coefficient_stride(job.columns) * itemsize
    if not job.reduction:
        coefficients *= job.threads         # a thread makes its own
    if job.places != NULL:
        copies = job.threads * ARRAYS * COPIED * itemsize + 64
    memory = <char*>malloc(partials + coefficients + copies + 1)
    if memory != NULL:
        job.partials = <double*>memory
        job.copies = memory + partials + coefficients
        job.copies = <char*>job.copies + (64 - <size_t>job.copies % 64)     # to a cache line
        job.coefficients = memory + partials
        if loan.threads > 1:
            job.serial_seconds = &loan.serial_seconds
        begin(&loan)
        dispatch.table.run(job)
    give_back(&loan)
    free(memory)
    return memory != NULL
