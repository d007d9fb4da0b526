"""The wall: a loop over as many arrays as the operation needs (wall.c); the fastest of ordinary or streaming stores, one thread or all."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from itertools import product
from pathlib import Path

from . import Cannot, aligned, aligned_elements

FORMS = {1.25: 0, 2: 1, 3: 2, 5: 3}  # enum form of wall.c, by the cell's arrays
FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]


class Job(ctypes.Structure):
    """struct job of wall.c."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("size", ctypes.c_ssize_t),
        ("form", ctypes.c_int),
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
    form = FORMS[cell.arrays]
    x, y, w = (aligned_elements(cell, seed) if seed <= max(0, form - 1) else None for seed in range(3))
    z, v = aligned(cell.shape), aligned(cell.shape) if cell.arrays == 5 else None
    if library is None:
        return [numba_loop(cell, x, x if y is None else y, z)], lambda _: {}
    library.wall.restype = None

    def variant(threads, streaming):
        arrays = x, y, w, z, v
        job = Job(*(None if a is None else a.ctypes.data for a in arrays), z.size, form, threads, streaming)
        job.arrays = arrays  # which live as long as the pointers to them
        pointer = ctypes.pointer(job)
        return lambda: library.wall(pointer)

    return [variant(*chosen) for chosen in product({1, cell.threads}, {0, library.can_stream()})], lambda _: {}


prepare_images = prepare  # the bytes are the beginning of x


def numba_loop(cell, x, y, z):
    if cell.arrays not in (2, 3):
        raise Cannot("without a C compiler has loops over two and three arrays only")
    import numba

    numba.set_num_threads(cell.threads)
    x, y, z = (array.reshape(-1) for array in (x, y, z))

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
