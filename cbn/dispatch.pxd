# The kernels in use: see dispatch.pyx.

from .kernels.table cimport Table

cdef Table* table
