# How many threads a call may use: see threads.pyx.

cdef int threads_for(double work) noexcept
