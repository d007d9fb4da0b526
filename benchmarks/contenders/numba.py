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


@njit(fastmath=True)
def followed(v, add, at, low):
    """v, and what follows the normalization: `add` is the residual, `low` the ReLU's 0; of either that is None, nothing is compiled."""
    if add is not None:
        v += add[at]
    if low is not None:
        v = max(v, low)
    return v


@njit(fastmath=True)
def gated(dy, v, add, at, low):
    """dy taken back through what follows v."""
    if low is None:
        return dy
    if add is not None:
        v += add[at]
    return dy if v > low else low


@loops
def inference_first(x, mean, var, weight, bias, eps, add, low, y):
    n, c, s = x.shape
    for i in prange(n * c):
        scale = weight[i % c] / np.sqrt(var[i % c] + eps)
        shift = bias[i % c] - mean[i % c] * scale
        for j in range(s):
            y[i // c, i % c, j] = followed(x[i // c, i % c, j] * scale + shift, add, (i // c, i % c, j), low)


@loops
def training_first(x, weight, bias, eps, add, low, mean, var, y):
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
                y[i, k, j] = followed(x[i, k, j] * scale + shift, add, (i, k, j), low)


@loops
def backward_first(dy, x, mean, var, weight, bias, eps, add, low, dweight, dbias, dx, dadd):
    n, c, s = x.shape
    for k in prange(c):
        invstd = np.float32(1 / np.sqrt(var[k] + eps))
        p = weight[k] * invstd
        shift = bias[k] - mean[k] * p
        total = 0.0
        products = 0.0
        for i in range(n):
            a = np.float32(0)
            b = np.float32(0)
            for j in range(s):
                g = gated(dy[i, k, j], x[i, k, j] * p + shift, add, (i, k, j), low)
                a += g
                b += g * (x[i, k, j] - mean[k])
            total += a
            products += b
        dbias[k] = total
        dweight[k] = products * invstd
        q = -p * invstd * np.float32(dweight[k] / (n * s))
        r = -p * np.float32(total / (n * s)) - q * mean[k]
        for i in range(n):
            for j in range(s):
                g = gated(dy[i, k, j], x[i, k, j] * p + shift, add, (i, k, j), low)
                dx[i, k, j] = p * g + q * x[i, k, j] + r
                if dadd is not None:
                    dadd[i, k, j] = g


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
def inference_last(x, mean, var, weight, bias, eps, add, low, y):
    m, c = x.shape
    scale = np.empty(c, np.float32)
    shift = np.empty(c, np.float32)
    for k in range(c):
        scale[k] = weight[k] / np.sqrt(var[k] + eps)
        shift[k] = bias[k] - mean[k] * scale[k]
    for i in prange(m):
        for k in range(c):
            y[i, k] = followed(x[i, k] * scale[k] + shift[k], add, (i, k), low)


@loops
def training_last(x, weight, bias, eps, add, low, mean, var, y):
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
            y[i, k] = followed(x[i, k] * scale[k] + shift[k], add, (i, k), low)


@loops
def backward_last(dy, x, mean, var, weight, bias, eps, add, low, dweight, dbias, dx, dadd):
    m, c = x.shape
    p = np.empty(c, np.float32)
    q = np.empty(c, np.float32)
    r = np.empty(c, np.float32)
    shift = np.empty(c, np.float32)
    for k in range(c):
        p[k] = weight[k] / np.sqrt(var[k] + eps)
        shift[k] = bias[k] - mean[k] * p[k]
    chunks = chunks_of(m)
    sums = np.empty((chunks, 2, c), np.float32)
    for t in prange(chunks):
        for k in range(c):
            sums[t, 0, k] = 0
            sums[t, 1, k] = 0
        for i in range(t * m // chunks, (t + 1) * m // chunks):
            for k in range(c):
                g = gated(dy[i, k], x[i, k] * p[k] + shift[k], add, (i, k), low)
                sums[t, 0, k] += g
                sums[t, 1, k] += g * (x[i, k] - mean[k])
    total = merged(sums)
    for k in range(c):
        invstd = 1 / np.sqrt(var[k] + eps)
        dbias[k] = total[0, k]
        dweight[k] = total[1, k] * invstd
        q[k] = -p[k] * invstd * dweight[k] / m
        r[k] = -p[k] * total[0, k] / m - q[k] * mean[k]
    for i in prange(m):
        for k in range(c):
            g = gated(dy[i, k], x[i, k] * p[k] + shift[k], add, (i, k), low)
            dx[i, k] = p[k] * g + q[k] * x[i, k] + r[k]
            if dadd is not None:
                dadd[i, k] = g


def prepare(cell):
    numba.set_num_threads(cell.threads)
    shape = (cell.batch * cell.spatial, cell.channels) if cell.rows else (cell.batch, cell.channels, cell.spatial)
    weight, bias, mean, var = parameters(cell)
    x = elements(cell, 0).reshape(shape)
    given = np.zeros_like(x)
    output = (lambda: given) if cell.output == "given" else (lambda: np.empty(shape, np.float32))
    eps = np.float32(EPS)
    function = globals()[f"{cell.kind}_{'last' if cell.rows else 'first'}"]
    a, b = np.empty_like(mean), np.empty_like(mean)
    dy = elements(cell, 1).reshape(shape) if cell.kind == "backward" else None
    add, low = elements(cell, 3).reshape(shape) if cell.add else None, np.float32(0) if cell.relu else None
    given_dadd = np.zeros_like(x) if cell.add and cell.kind == "backward" else None

    def inference():
        y = output()
        function(x, mean, var, weight, bias, eps, add, low, y)
        return (y,)

    def training():
        y = output()
        function(x, weight, bias, eps, add, low, a, b, y)
        return y, a, b

    def backward():
        dx = output()
        dadd = None if given_dadd is None else given_dadd if cell.output == "given" else np.empty_like(dx)
        function(dy, x, mean, var, weight, bias, eps, add, low, a, b, dx, dadd)
        return dx, a, b, dadd

    call = {"inference": inference, "training": training, "backward": backward}[cell.kind]
    names = {"inference": ("y",), "training": ("y", "mean", "var"), "backward": ("dx", "dweight", "dbias", "dresidual")[: 3 + cell.add]}
    named = lambda arrays: zip(names[cell.kind], arrays, strict=False)
    return [call], lambda arrays: {n: array.reshape(cell.shape) if array.size == x.size else array for n, array in named(arrays)}
