# The threads of a call: see threads.pyx.

ctypedef struct Loan:
    int threads
    bint counted            # among those that all calls together may have
    double start
    double serial_seconds   # to be set by the caller: about what the work would have taken one thread

cdef int limit() except -1
cdef int allowed(int n) noexcept nogil
cdef bint worth_team(double work) noexcept nogil
cdef void borrow(Loan* loan, double work, int budget) noexcept nogil
cdef void begin(Loan* loan) noexcept nogil
cdef void give_back(Loan* loan) noexcept nogil
