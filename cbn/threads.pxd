# The threads of a call: see threads.pyx.

ctypedef struct Loan:
    int threads
    bint counted            # among those that all calls together may have
    double start
    double serial_seconds   # to be set by the caller: about what the work would have taken one thread

cdef void borrow(Loan* loan, double work) noexcept
cdef void begin(Loan* loan) noexcept nogil
cdef void give_back(Loan* loan) noexcept nogil
