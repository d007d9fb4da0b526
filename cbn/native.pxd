# What a call needs no Python for: see native.pyx.

from .kernels.job cimport Job, Vector

cdef bint worth_threads(const Job* job) noexcept nogil
cdef bint execute(Job* job, int budget) noexcept nogil
cdef void conclude_empty(Job* job, Py_ssize_t channels) noexcept nogil
cdef bint set_activation(Job* job, int activation, double alpha, double beta, bint backward) noexcept nogil
cdef bint any_negative(const Vector* vector, Py_ssize_t channels) noexcept nogil
