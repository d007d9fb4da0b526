"""The caller's floating-point mode (rounding, denormals as zeros) changes no result, and is the caller's own again after a call."""

import ctypes
import os
import platform
import shutil
import subprocess

import numpy as np
import pytest

import cbn

MODES = {
    # MXCSR: flush to zero and denormals are zero, round up, round to zero; FPCR: flush to zero, round up, round to zero.
    "x86_64": {"ftz-daz": 0x9FC0, "up": 0x5F80, "truncate": 0x7F80, "all": 0xFFC0},
    "aarch64": {"ftz-daz": 1 << 24, "up": 1 << 22, "truncate": 3 << 22, "all": 1 << 24 | 3 << 22},
}.get(platform.machine(), {})

SOURCE = """
#ifdef __x86_64__
#include <immintrin.h>
unsigned get(void) { return _mm_getcsr() & ~0x3fu; }    /* without the exceptions that happened */
void set(unsigned mode) { _mm_setcsr(mode); }
#else
unsigned get(void) { unsigned long mode; __asm__ volatile("mrs %0, fpcr" : "=r"(mode)); return (unsigned)mode; }
void set(unsigned mode) { __asm__ volatile("msr fpcr, %0" : : "r"((unsigned long)mode)); }
#endif
"""


@pytest.fixture(scope="module")
def mode(tmp_path_factory):
    """Functions get() and set(mode) for the mode of this thread."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not MODES or compiler is None:
        pytest.skip("no known floating-point mode, or no C compiler")
    folder = tmp_path_factory.mktemp("mode")
    (folder / "mode.c").write_text(SOURCE)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", folder / "mode.so", folder / "mode.c"], check=True)
    library = ctypes.CDLL(str(folder / "mode.so"))
    library.get.restype = ctypes.c_uint
    library.set.argtypes = [ctypes.c_uint]
    return library


def results(x, weight, misaligned_weight, mean, var, zeros, axis):
    running = mean.copy(), var.copy()
    y, stats = cbn.batch_norm_train(x, weight, axis=axis)
    cbn.batch_norm(x, *running, training=True, axis=axis)
    return [
        *(y, *stats[1:], *running),
        *cbn.batch_norm_backward(y, x, stats, weight, axis=axis),
        *cbn.batch_norm_backward(y, x, stats, weight, axis=axis, training=False),
        cbn.batch_norm(x, mean, var, weight, mean, axis=axis, eps=0.0),
        cbn.batch_norm(x, zeros, zeros, axis=axis, eps=1.0),
        cbn.batch_norm(x, mean, var, misaligned_weight, axis=axis),
    ]


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("shape, axis", [((40, 19, 13, 11), 1), ((900, 37), -1), ((2, 3, 300, 70), 1)])
@pytest.mark.parametrize("dtype", ["f", "d"])
def test_results_do_not_depend_on_it(mode, isa, name, n, shape, axis, dtype):
    cbn.set_num_threads(n)
    cbn.threads.set_grain(1)
    smallest = float(np.finfo(dtype).smallest_normal)
    x = (np.random.default_rng(31).standard_normal(shape)).astype(dtype)
    x[::2] *= smallest  # half of these are denormal
    weight = np.linspace(smallest, 0, shape[axis]).astype(dtype)
    misaligned_weight = np.frombuffer(b"\1" + weight.tobytes(), dtype, offset=1)
    mean, var, zeros = np.linspace(0, 9, shape[axis]).astype(dtype), np.full(shape[axis], smallest / 1024, dtype), np.zeros(shape[axis], dtype)
    arguments = x, weight, misaligned_weight, mean, var, zeros, axis
    expected = results(*arguments)
    assert sum(((a != 0) & (np.abs(a) < smallest)).any() for a in expected) > 3
    before = mode.get()
    mode.set(MODES[name])
    try:
        actual = results(*arguments)
        after = mode.get()
    finally:
        mode.set(before)
    assert after == MODES[name]
    for a, b in zip(actual, expected, strict=True):
        assert a.tobytes() == b.tobytes()
