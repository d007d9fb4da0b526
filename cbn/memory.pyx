"""Memory of the output arrays that calls allocate: large blocks are kept when freed, as fresh pages cost several times what filling them does.

Through NumPy's data allocator interface (NEP 49): only arrays that cbn returns use it, and return their block to it when they die, anywhere.
"""

import operator
import os

import numpy as np

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uint8_t
from libc.string cimport memcpy, strcpy
cimport numpy as cnp

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
    void* map_pages(size_t size)
    void unmap_pages(void* block, size_t size)
    void lock()
    void unlock()
    void survive_forks()

cdef enum:
    LEAST = 1 << 20             # bytes of an array that is worth keeping; below, malloc keeps its pages itself
    HEADER = 64                 # keeps elements on cache lines

ctypedef struct Block:
    size_t size                 # of the mapping, this header included
    Block* next                 # of the free blocks, the last freed first

cdef Block* free_blocks = NULL
cdef size_t free_bytes = 0
cdef size_t limit = 0


cdef size_t block_size(size_t size) noexcept nogil:
    """The size of block for `size` bytes: one of eight to an octave, so that arrays of nearly one size share blocks."""
    cdef size_t step = 4096
    size += HEADER
    while step * 16 < size:
        step *= 2
    return (size + step - 1) // step * step


cdef void evict(size_t most) noexcept nogil:
    """Give the blocks freed longest ago back to the system, until at most `most` bytes are kept. The lock is held."""
    cdef Block** link
    cdef Block* block
    while free_bytes > most:
        link = &free_blocks
        while link[0].next != NULL:
            link = &link[0].next
        block = link[0]
        link[0] = NULL
        release(block)


cdef void release(Block* block) noexcept nogil:
    global free_bytes
    free_bytes -= block.size
    unmap_pages(block, block.size)


cdef void* allocate(void* context, size_t size) noexcept nogil:
    global free_bytes
    cdef Block** link = &free_blocks
    cdef Block* block = NULL
    size = block_size(size)
    lock()
    while link[0] != NULL and link[0].size != size:
        link = &link[0].next
    if link[0] != NULL:
        block = link[0]
        link[0] = block.next
        free_bytes -= size
    unlock()
    if block == NULL:
        block = <Block*>map_pages(size)
        if block == NULL:
            return NULL
        block.size = size
    return <char*>block + HEADER


cdef void* allocate_zeros(void* context, size_t count, size_t size) noexcept nogil:
    cdef Block* block
    if size and count > (<size_t>-1) // size - 2 * HEADER:
        return NULL
    size = block_size(count * size)
    block = <Block*>map_pages(size)
    if block == NULL:
        return NULL
    block.size = size
    return <char*>block + HEADER


cdef void* reallocate(void* context, void* data, size_t size) noexcept nogil:
    cdef void* moved = allocate(context, size)
    cdef size_t old
    if moved != NULL and data != NULL:
        old = (<Block*>(<char*>data - HEADER)).size - HEADER
        memcpy(moved, data, min(old, size))
        deallocate(context, data, old)
    return moved


cdef void deallocate(void* context, void* data, size_t size) noexcept nogil:
    global free_blocks, free_bytes
    cdef Block* block
    if data == NULL:
        return
    block = <Block*>(<char*>data - HEADER)
    lock()
    block.next = free_blocks
    free_blocks = block
    free_bytes += block.size
    if block.size > limit:
        free_blocks = block.next
        release(block)
    evict(limit)
    unlock()


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
    if cnp.PyArray_SIZE(x) * (cnp.PyArray_ITEMSIZE(x) if dtype is None else dtype.itemsize) >= LEAST and limit > 0:
        previous = PyDataMem_GetHandler()
        try:
            PyDataMem_SetHandler(handler_capsule)       # within: without memory for what it returns, it raises having set
            return new_array(x, dtype)
        finally:
            PyDataMem_SetHandler(previous)
    return new_array(x, dtype)


cdef cnp.ndarray new_array(cnp.ndarray x, object dtype):
    if dtype is None:
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    return np.empty_like(x, dtype=dtype, subok=False)


def get_cache_limit():
    """The most bytes of freed output arrays that are kept for reuse."""
    return limit


def set_cache_limit(size):
    """Keep at most `size` bytes of freed output arrays for reuse; what is kept beyond is given back to the system at once.

    size : int >= 0; 0 turns the cache off. At import it is the environment variable CBN_CACHE_BYTES or, without it, 1 GiB but at most an eighth
    of the machine's memory. Only output arrays of 1 MiB and more that cbn itself allocates are kept.
    """
    global limit
    try:
        number = operator.index(None if isinstance(size, (bool, np.bool_)) else size)
    except Exception:
        raise TypeError(f"size: expected a number of bytes, got {show(size)}") from None
    if not 0 <= number < 1 << 62:
        raise ValueError(f"size: expected a number of bytes >= 0, got {show(size)}")
    lock()
    limit = number
    evict(limit)
    unlock()


def empty_cache():
    """Give all memory kept for output arrays back to the system."""
    lock()
    evict(0)
    unlock()


def cached_bytes():
    """The bytes of freed output arrays that are kept now."""
    return free_bytes


def _default_limit():
    setting = os.environ.get("CBN_CACHE_BYTES")
    if setting:
        if not setting.isdecimal():
            raise ImportError(f"environment variable CBN_CACHE_BYTES: expected a number of bytes, got {setting!r}")
        return int(setting)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return min(1 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
    return 1 << 28


set_cache_limit(_default_limit())
survive_forks()
