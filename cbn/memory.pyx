"""Memory of the output arrays that calls allocate: large blocks are kept when freed, as fresh pages cost several times what filling them does.

Through NumPy's data allocator interface (NEP 49): only arrays that cbn returns use it, and return their block to it when they die, anywhere.
"""

import operator
import os

import numpy as np

try:
    import resource
except ImportError:
    resource = None     # on Windows

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uint8_t
from libc.string cimport memcpy, strcpy
cimport numpy as cnp

from .cgroup import memory_limit
from .words import show

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, void* descr, int subok)
    bint PyArray_ISNOTSWAPPED(cnp.ndarray)
    object PyDataMem_GetHandler()
    object PyDataMem_SetHandler(object handler)
    ctypedef struct PyDataMemAllocator:
        void* ctx
        void* (*malloc)(void*, size_t) noexcept nogil
        void* (*calloc)(void*, size_t, size_t) noexcept nogil
        void* (*realloc)(void*, void*, size_t) noexcept nogil
        void (*free)(void*, void*, size_t) noexcept nogil
    ctypedef struct PyDataMem_Handler:
        char name[127]
        uint8_t version
        PyDataMemAllocator allocator

cdef extern from "pages.h" nogil:
    void* take_block(size_t bytes, bint zeros)
    void give_block(void* data)
    size_t room(void* data)
    void set_most_kept(size_t most, size_t last)
    void get_most_kept(size_t* most, size_t* last)
    bint keeps()
    void give_all_back()
    size_t bytes_kept_now()
    void start_pages()

cdef enum:
    LEAST = 1 << 20             # bytes of an array that is worth keeping; below, malloc keeps its pages itself


cdef void* allocate(void* context, size_t size) noexcept nogil:
    return take_block(size, False)


cdef void* allocate_zeros(void* context, size_t count, size_t size) noexcept nogil:
    if size and count > <size_t>-1 // size:
        return NULL
    return take_block(count * size, True)


cdef void* reallocate(void* context, void* data, size_t size) noexcept nogil:
    cdef void* moved = take_block(size, False)
    if moved != NULL and data != NULL:
        memcpy(moved, data, min(room(data), size))
        give_block(data)
    return moved


cdef void deallocate(void* context, void* data, size_t size) noexcept nogil:
    if data != NULL:
        give_block(data)


cdef PyDataMem_Handler handler
strcpy(handler.name, b"cbn_output_cache")
handler.version = 1
handler.allocator = PyDataMemAllocator(ctx=NULL, malloc=allocate, calloc=allocate_zeros, realloc=reallocate, free=deallocate)
cdef object handler_capsule = PyCapsule_New(&handler, "mem_handler", NULL)


cdef cnp.ndarray new_like(cnp.ndarray x, object dtype):
    """A new array of x's shape, in the order of x's memory, of a type of elements (None: x's, in native byte order)."""
    cdef object previous
    if dtype is None and not PyArray_ISNOTSWAPPED(x):
        dtype = x.dtype.newbyteorder("=")
    if cnp.PyArray_SIZE(x) * (cnp.PyArray_ITEMSIZE(x) if dtype is None else dtype.itemsize) >= LEAST and keeps():
        previous = PyDataMem_GetHandler()
        try:
            PyDataMem_SetHandler(handler_capsule)       # within: without memory for what it returns, it raises having set
            return new_array(x, dtype)
        finally:
            PyDataMem_SetHandler(previous)
    try:
        return new_array(x, dtype)
    except MemoryError:
        give_all_back()
    return new_array(x, dtype)


cdef cnp.ndarray new_array(cnp.ndarray x, object dtype):
    if dtype is None:
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    return np.empty_like(x, dtype=dtype, subok=False)


cdef cnp.ndarray copy_of(cnp.ndarray x):
    """A copy that is allocated as a new output."""
    cdef cnp.ndarray y = new_like(x, None)
    cnp.PyArray_CopyInto(y, x)
    return y


cdef void give_up_kept() noexcept nogil:
    """Give what is kept back to the system, for what it has just refused memory."""
    give_all_back()


def get_cache_limit():
    """The most bytes of freed output arrays that may be kept for reuse."""
    most, last = _limits()
    return most + last


def set_cache_limit(size):
    """Keep at most `size` bytes of freed output arrays for reuse; what is kept beyond is given back to the system at once.

    size : int >= 0; 0 turns the cache off, and NumPy allocates. At import it is the environment variable CBN_CACHE_BYTES. Without that, kept are at
    most 64 MiB and, beyond these, the array freed last, which is what `y = f(x)` in a loop takes; but no more than a sixteenth and an eighth of the memory
    that the process may use: of the machine's, its control groups' or its own limits (RLIMIT_AS, RLIMIT_DATA), as they are at import.

    What isn't reused within a second is given back, and so is everything when the process forks or the system refuses cbn memory. Only output arrays of
    1 MiB and more that cbn itself allocates are kept.
    """
    try:
        number = operator.index(None if isinstance(size, (bool, np.bool_)) else size)
    except Exception:
        raise TypeError(f"size: expected a number of bytes, got {show(size)}") from None
    if not 0 <= number < 1 << 62:
        raise ValueError(f"size: expected a number of bytes >= 0, got {show(size)}")
    set_most_kept(number, 0)


def empty_cache():
    """Give all memory kept for output arrays back to the system."""
    give_all_back()


def cached_bytes():
    """The bytes of freed output arrays that are kept now."""
    return bytes_kept_now()


def _limits():
    """The most bytes that may be kept; and those of the block freed last, if it is kept beyond them."""
    cdef size_t most, last
    get_most_kept(&most, &last)
    return most, last


def _available():
    """The bytes that the process may use at most; of a machine that doesn't say, 2 GiB."""
    most = 2 << 30
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = min(most, memory_limit())
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA) if resource else ():
        own = resource.getrlimit(limit)[0]
        if own != resource.RLIM_INFINITY:
            most = min(most, own)
    return most


def _set_default_limits():
    setting = os.environ.get("CBN_CACHE_BYTES")
    if setting:
        try:
            set_cache_limit(int(setting) if setting.isdecimal() else -1)
        except ValueError:
            raise ImportError(f"environment variable CBN_CACHE_BYTES: expected a number of bytes, got {setting!r}") from None
        return
    most = _available()
    set_most_kept(min(64 << 20, most // 16), most // 8)


start_pages()
_set_default_limits()
