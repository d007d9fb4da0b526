# What suits this machine: see dispatch.pyx.

from .kernels.job cimport Table

cdef Table* tables[4]        # of each type that elements are stored as
cdef double stream_bytes
cdef double core_cache
cdef bint fetches
