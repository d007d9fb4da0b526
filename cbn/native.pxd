# What runs a job without Python: see native.pyx.

from .kernels.table cimport Job

cdef bint worth_threads(const Job* job) noexcept nogil
cdef bint execute(Job* job, int budget) noexcept nogil
