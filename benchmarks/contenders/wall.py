"""The wall: z = a*x + b over two arrays, a*x + b*y over three; the fastest of ordinary or streaming stores, one thread or all."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from itertools import product
from pathlib import Path

from . import aligned, aligned_elements

FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]


class Job(ctypes.Structure):
    """struct job of wall.c."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("size", ctypes.c_ssize_t),
        ("threads", ctypes.c_int),
        ("streaming", ctypes.c_int),
    ]


def build():
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/wall.so"
        subprocess.run([compiler, *FLAGS, str(Path(__file__).with_suffix(".c")), "-o", library], check=True)
        return ctypes.PyDLL(library)


compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
library = build() if compiler else None


def versions():
    if library is None:
        return "a loop under numba"
    return " ".join([subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0], *FLAGS])


def prepare(cell):
    arrays = aligned_elements(cell, 0), aligned_elements(cell, 1), aligned(cell.shape)
    size = arrays[0].size
    if library is None:
        return [numba_loop(cell, *(array.reshape(size) for array in arrays))], lambda _: {}
    function = library.two_arrays if cell.arrays == 2 else library.three_arrays
    function.restype = None

    def variant(threads, streaming):
        job = Job(*(array.ctypes.data for array in arrays), size, threads, streaming)
        job.arrays = arrays  # which live as long as the pointers to them
        pointer = ctypes.pointer(job)
        return lambda: function(pointer)

    return [variant(*chosen) for chosen in product({1, cell.threads}, {0, library.can_stream()})], lambda _: {}


def numba_loop(cell, x, y, z):
    import numba

    numba.set_num_threads(cell.threads)

    @numba.njit(parallel=True, fastmath=True)
    def two_arrays(x, y, z):
        for i in numba.prange(x.size):
            z[i] = 1.5 * x[i] + 0.25

    @numba.njit(parallel=True, fastmath=True)
    def three_arrays(x, y, z):
        for i in numba.prange(x.size):
            z[i] = 1.5 * x[i] + 0.25 * y[i]

    function = two_arrays if cell.arrays == 2 else three_arrays
    return lambda: function(x, y, z)
