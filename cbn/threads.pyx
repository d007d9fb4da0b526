"""How many threads a call may use, and has."""

import contextlib
import contextvars
import math
import operator
import os

from cpython.contextvars cimport get_value

from .cgroup import cpu_quota
from .words import show

cdef extern from "parallel.h":
    int omp_get_max_threads() nogil
    int openmp_version() nogil
    int forked_without_threads
    double patience
    double serial_until
    void start_parallel()
    int borrow_threads(int n, int budget) nogil
    void return_threads(int n, double start, double alone) nogil
    double seconds() nogil

# Elements that one thread finishes sooner than a second one is woken.
cdef double grain = 12288

cdef object _context_limit = contextvars.ContextVar("cbn.num_threads", default=None)
cdef int _openmp_limit = omp_get_max_threads()      # at import; OpenMP itself has read OMP_NUM_THREADS
cdef int _limit = 1


def _default_limit():
    limit = _openmp_limit
    if hasattr(os, "sched_getaffinity"):
        limit = min(limit, len(os.sched_getaffinity(0)))
    limit = math.ceil(min(limit, cpu_quota()))
    setting = os.environ.get("CBN_NUM_THREADS")
    if setting:
        try:
            limit = min(limit, _checked(int(setting)))
        except ValueError:
            raise ImportError(f"environment variable CBN_NUM_THREADS: expected a positive integer, got {setting!r}") from None
    return limit


def _checked(n):
    try:
        number = operator.index(n)
    except Exception:
        number = None
    if number is None or isinstance(n, bool):
        raise TypeError(f"n: expected a positive integer, got {show(n)}")
    if not 1 <= number <= 4096:
        raise ValueError(f"n: expected a number of threads from 1 to 4096, got {show(n)}")
    return number


cdef int limit() except -1:
    cdef object local = get_value(_context_limit)
    return allowed(0 if local is None else local)


cdef int allowed(int n) noexcept nogil:
    """The most threads of a call that asks for n or, with n = 0, for the process's own limit: what `num_threads` says takes Python to know."""
    cdef int openmp = omp_get_max_threads()
    if n == 0:
        n = _limit
    if openmp_version() == 0 or forked_without_threads:
        return 1
    # A lower limit set since import (threadpoolctl, omp_set_num_threads) is respected; a higher one is no request.
    return min(n, openmp) if openmp < _openmp_limit else n


cdef bint worth_team(double work) noexcept nogil:
    """Whether work over so many elements is enough for more than one thread."""
    return work >= 2 * grain


cdef void borrow(Loan* loan, double work, int budget) noexcept nogil:
    """Up to `budget` threads for a call over `work` elements: at most one for each `grain` of them."""
    loan.threads = 1
    loan.counted = worth_team(work)
    loan.serial_seconds = 0
    if loan.counted:
        loan.threads = borrow_threads(<int>min(<double>budget, work / grain), budget)


cdef void begin(Loan* loan) noexcept nogil:
    if loan.threads > 1:
        loan.start = seconds()


cdef void give_back(Loan* loan) noexcept nogil:
    if loan.counted:
        return_threads(loan.threads, loan.start, loan.serial_seconds)


def get_num_threads():
    """The most threads that a call made here may use."""
    return limit()


def set_num_threads(n):
    """Let every call from now on, in any thread of the process, use up to n threads.

    n : int >= 1. It may exceed the number of cores. Results never depend on it. Small calls use fewer threads.
    Where it is never called, the limit is the least of: the cores this process may run on, the CPU quota of its control groups (a
    container's limit), OMP_NUM_THREADS and CBN_NUM_THREADS, all read at import. `num_threads` overrides it for a block of code; a lower limit that threadpoolctl sets holds in any case.
    """
    global _limit
    _limit = _checked(n)


@contextlib.contextmanager
def num_threads(n):
    """Let calls within the `with` block use up to n threads, in this thread (or asyncio task) only."""
    token = _context_limit.set(_checked(n))
    try:
        yield
    finally:
        _context_limit.reset(token)


def get_grain():
    """The least number of elements that a further thread is used for."""
    return grain


def set_grain(elements):
    """Set the number of elements that is worth a further thread; for tests and tuning."""
    global grain
    grain = max(1.0, float(elements))


def get_patience():
    """The seconds that calls may spend waiting for cores that others use, before the process does with one thread for a while."""
    return patience


def set_patience(limit):
    """Set that number of seconds; for tests and tuning."""
    global patience
    patience = limit


def teams_pause():
    """The seconds for which every call will still use one thread, as too much time was spent waiting for cores; 0.0 in general."""
    return max(0.0, serial_until - seconds())


def has_openmp():
    """Whether cbn was built with OpenMP."""
    return openmp_version() != 0


_limit = _default_limit()
start_parallel()
