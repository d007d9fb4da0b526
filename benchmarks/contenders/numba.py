"""Straightforward parallel loops under numba, with the fast mathematics it needs to vectorize a sum.

Loops over channels are written out: numba would start its threads for each array expression. Channels last, chunks of rows are summed in
float32, each by one thread, and the chunks in float64.
"""

import numba
import numpy as np
from numba import njit, prange
from workloads import EPS

from . import elements, parameters

loops = njit(parallel=True, fastmath=True, cache=True, error_model="numpy")


def versions():
    return f"{numba.__version__}"


@loops
def inference_first(x, mean, var, weight, bias, eps, y):
    n, c, s = x.shape
    for i in prange(n * c):
        scale = weight[i % c] / np.sqrt(var[i % c] + eps)
        shift = bias[i % c] - mean[i % c] * scale
        for j in range(s):
            y[i // c, i % c, j] = x[i // c, i % c, j] * scale + shift


@loops
def training_first(x, weight, bias, eps, mean, var, y):
    n, c, s = x.shape
    for k in prange(c):
        total = 0.0
        squares = 0.0
        for i in range(n):
            a = np.float32(0)
            b = np.float32(0)
            for j in range(s):
                a += x[i, k, j]
                b += x[i, k, j] * x[i, k, j]
            total += a
            squares += b
        m = total / (n * s)
        v = squares / (n * s) - m * m
        mean[k] = m
        var[k] = v
        scale = np.float32(weight[k] / np.sqrt(v + eps))
        shift = np.float32(bias[k] - m * scale)
        for i in range(n):
            for j in range(s):
                y[i, k, j] = x[i, k, j] * scale + shift


@loops
def backward_first(dy, x, mean, var, weight, eps, dweight, dbias, dx):
    n, c, s = x.shape
    for k in prange(c):
        invstd = np.float32(1 / np.sqrt(var[k] + eps))
        total = 0.0
        products = 0.0
        for i in range(n):
            a = np.float32(0)
            b = np.float32(0)
            for j in range(s):
                a += dy[i, k, j]
                b += dy[i, k, j] * (x[i, k, j] - mean[k])
            total += a
            products += b
        dbias[k] = total
        dweight[k] = products * invstd
        p = weight[k] * invstd
        q = -p * invstd * np.float32(dweight[k] / (n * s))
        r = -p * np.float32(total / (n * s)) - q * mean[k]
        for i in range(n):
            for j in range(s):
                dx[i, k, j] = p * dy[i, k, j] + q * x[i, k, j] + r


@njit
def chunks_of(m):
    """How many chunks m rows are cut into: of 64 rows or more, so that small arrays are not all merging."""
    return min(64, max(1, m // 64))


@njit(fastmath=True)
def merged(sums):
    """The sums of all chunks, in float64."""
    chunks, both, c = sums.shape
    total = np.zeros((both, c))
    for t in range(chunks):
        for i in range(both):
            for k in range(c):
                total[i, k] += sums[t, i, k]
    return total


@loops
def inference_last(x, mean, var, weight, bias, eps, y):
    m, c = x.shape
    scale = np.empty(c, np.float32)
    shift = np.empty(c, np.float32)
    for k in range(c):
        scale[k] = weight[k] / np.sqrt(var[k] + eps)
        shift[k] = bias[k] - mean[k] * scale[k]
    for i in prange(m):
        for k in range(c):
            y[i, k] = x[i, k] * scale[k] + shift[k]


@loops
def training_last(x, weight, bias, eps, mean, var, y):
    m, c = x.shape
    chunks = chunks_of(m)
    sums = np.empty((chunks, 2, c), np.float32)
    for t in prange(chunks):
        for k in range(c):
            sums[t, 0, k] = 0
            sums[t, 1, k] = 0
        for i in range(t * m // chunks, (t + 1) * m // chunks):
            for k in range(c):
                sums[t, 0, k] += x[i, k]
                sums[t, 1, k] += x[i, k] * x[i, k]
    total = merged(sums)
    scale = np.empty(c, np.float32)
    shift = np.empty(c, np.float32)
    for k in range(c):
        mean[k] = total[0, k] / m
        var[k] = total[1, k] / m - (total[0, k] / m) ** 2
        scale[k] = weight[k] / np.sqrt(var[k] + eps)
        shift[k] = bias[k] - mean[k] * scale[k]
    for i in prange(m):
        for k in range(c):
            y[i, k] = x[i, k] * scale[k] + shift[k]


@loops
def backward_last(dy, x, mean, var, weight, eps, dweight, dbias, dx):
    m, c = x.shape
    chunks = chunks_of(m)
    sums = np.empty((chunks, 2, c), np.float32)
    for t in prange(chunks):
        for k in range(c):
            sums[t, 0, k] = 0
            sums[t, 1, k] = 0
        for i in range(t * m // chunks, (t + 1) * m // chunks):
            for k in range(c):
                sums[t, 0, k] += dy[i, k]
                sums[t, 1, k] += dy[i, k] * (x[i, k] - mean[k])
    total = merged(sums)
    p = np.empty(c, np.float32)
    q = np.empty(c, np.float32)
    r = np.empty(c, np.float32)
    for k in range(c):
        invstd = 1 / np.sqrt(var[k] + eps)
        dbias[k] = total[0, k]
        dweight[k] = total[1, k] * invstd
        p[k] = weight[k] * invstd
        q[k] = -p[k] * invstd * dweight[k] / m
        r[k] = -p[k] * total[0, k] / m - q[k] * mean[k]
    for i in prange(m):
        for k in range(c):
            dx[i, k] = p[k] * dy[i, k] + q[k] * x[i, k] + r[k]


def prepare(cell):
    numba.set_num_threads(cell.threads)
    shape = (cell.batch * cell.spatial, cell.channels) if cell.rows else (cell.batch, cell.channels, cell.spatial)
    weight, bias, mean, var = parameters(cell)
    x = elements(cell, 0).reshape(shape)
    given = np.zeros_like(x)
    output = (lambda: given) if cell.output == "given" else (lambda: np.empty(shape, np.float32))
    eps = np.float32(EPS)
    function = globals()[f"{cell.op}_{'last' if cell.rows else 'first'}"]
    a, b = np.empty_like(mean), np.empty_like(mean)
    dy = elements(cell, 1).reshape(shape) if cell.op == "backward" else None

    def inference():
        y = output()
        function(x, mean, var, weight, bias, eps, y)
        return y

    def training():
        y = output()
        function(x, weight, bias, eps, a, b, y)
        return y

    def backward():
        dx = output()
        function(dy, x, mean, var, weight, eps, a, b, dx)
        return dx

    call = {"inference": inference, "training": training, "backward": backward}[cell.op]
    names = {"inference": ("y",), "training": ("y", "mean", "var"), "backward": ("dx", "dweight", "dbias")}[cell.op]
    return [call], lambda y: dict(zip(names, (y.reshape(cell.shape), a, b), strict=False))
