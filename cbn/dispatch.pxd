# What suits this machine: see dispatch.pyx.

from .kernels.table cimport Table

cdef Table* table
cdef double stream_bytes
cdef double core_cache
