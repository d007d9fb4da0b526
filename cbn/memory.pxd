# New output arrays: see memory.pyx.

cimport numpy as cnp

cdef cnp.ndarray new_like(cnp.ndarray x, object dtype)
cdef cnp.ndarray copy_of(cnp.ndarray x)
cdef void give_up_kept() noexcept nogil
