"""Checks an installation without the test suite, in some seconds: python -m cbn.selftest

Results against NumPy's in float64; the same bits on every CPU level, with every number of threads, in a forked child, and as on other machines.
Ends with status 1 where something is wrong; the lines that it prints then belong in a report.
"""

import hashlib
import os
import sys
import time

import numpy as np

from . import config, dispatch, threads
from .functional import batch_norm, batch_norm_backward, batch_norm_train

CASES = [(shape, axis, dtype) for dtype in (np.float32, np.float64, np.float16) for shape, axis in
         (((8, 16, 14, 14), 1), ((5, 3, 7001), 1), ((30, 7, 7, 33), -1), ((300, 130), 1), ((4, 64, 56, 56), 1))]  # fmt: skip
EPS = 1e-5
HASH = "967d6c51ce9c7a0e"  # of all results: of version 0.2.0


def numbers(shape, seed):
    """Multiples of 1/64 in [-8, 8), the same on every machine."""
    return ((np.arange(np.prod(shape), dtype=np.int64) * 7919 + 104729 * seed) % 16411 % 1024 - 512).reshape(shape) / 64


def arguments(shape, axis, dtype):
    """x, whose channels have offsets up to 1000 where its type has room for them; dy, whose sums don't cancel; weight and bias."""
    channels = shape[axis]
    offsets = np.linspace(0, 1000, channels).round() if dtype != np.float16 else np.zeros(channels)
    others = [i for i in range(len(shape)) if i != axis % len(shape)]
    x = numbers(shape, 1) + np.expand_dims(offsets, others)
    dy = numbers(shape, 1) / 2 + numbers(shape, 2) / 2 + 4
    return x.astype(dtype), dy.astype(dtype), numbers(channels, 3).astype(np.float32), numbers(channels, 4).astype(np.float32)


def results(shape, axis, dtype):
    """Of training, backward and inference."""
    x, dy, weight, bias = arguments(shape, axis, dtype)
    y, stats = batch_norm_train(x, weight, bias, EPS, axis=axis)
    dx, dweight, dbias = batch_norm_backward(dy, x, stats, weight, bias, EPS, axis=axis)
    fused = batch_norm(x, stats.mean, stats.var, weight, bias, False, 0.0, EPS, axis=axis, activation="silu", residual=dy)
    return {"y": y, "mean": stats.mean, "var": stats.var, "dx": dx, "weight'": dweight, "bias'": dbias, "fused": fused}


def formulas(shape, axis, dtype):
    """The same by NumPy, in float64."""
    x, dy, weight, bias = (a.astype(np.float64) for a in arguments(shape, axis, dtype))
    others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    weight_, bias_ = (np.expand_dims(a, others) for a in (weight, bias))
    mean, var = x.mean(others, keepdims=True), x.var(others, keepdims=True)
    xhat = (x - mean) / np.sqrt(var + EPS)
    y = weight_ * xhat + bias_
    products, sums = (dy * xhat).mean(others, keepdims=True), dy.mean(others, keepdims=True)
    m = x.size // mean.size
    return {
        "y": y, "mean": mean.ravel(), "var": var.ravel(), "dx": weight_ / np.sqrt(var + EPS) * (dy - sums - xhat * products),
        "weight'": m * products.ravel(), "bias'": m * sums.ravel(), "fused": (y + dy) / (1 + np.exp(-y - dy)),
    }  # fmt: skip


def worst_error(actual, expected):
    """Over all results, in units in the last place of the largest: of their type or, of statistics, of the type that x is computed with."""
    errors = []
    for name, a in actual.items():
        counted = np.float32 if a.dtype == np.float64 != actual["y"].dtype else a.dtype
        errors.append(abs(a - expected[name]).max() / (abs(expected[name]).max() * np.finfo(counted).eps))
    return max(errors)


def bits(case):
    return b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in results(*case).values())


def same_in_a_forked_child(expected):
    child = os.fork()
    if child == 0:
        os._exit(bits(CASES[0]) != expected)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def main():
    failed = []

    def report(what, fine, found=""):
        print(f"{'ok    ' if fine else 'WRONG '} {what}{found and ': '}{found}", flush=True)
        if not fine:
            failed.append(what)

    config.show_config()
    threads.set_grain(1)        # also small work is shared
    for dtype in (np.float32, np.float64, np.float16):
        error = max(worst_error(results(*case), formulas(*case)) for case in CASES if case[2] == dtype)
        most = 4 if dtype != np.float64 else 100        # which is what the formulas themselves lose in float64
        report(f"{np.dtype(dtype)}, against NumPy's formulas in float64", error <= most, f"{error:.1f} units in the last place")
    dispatch.set_isa("baseline")
    threads.set_num_threads(1)
    expected = [bits(case) for case in CASES]
    for isa in dispatch.isa_available():
        dispatch.set_isa(isa)
        for n in (1, 2, 3):
            threads.set_num_threads(n)
            report(f"the same bits: {isa}, {n} threads", [bits(case) for case in CASES] == expected)
    found = hashlib.sha256(b"".join(expected)).hexdigest()[:16]
    report("the same bits as on other machines", found == HASH, found)
    if hasattr(os, "fork"):
        report("a forked child", same_in_a_forked_child(expected[0]))
    print(f"{len(failed)} of the checks failed" if failed else "all is well")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
