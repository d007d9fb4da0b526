"""The contenders, one a module, and the arrays they all start from.

A module offers `versions()`, a string, and `prepare(cell)`, which returns (calls, results): a list of functions without arguments that do
the cell's work in different ways, of which the fastest will be timed, and a function that turns what such a call returned into a dictionary
of the arrays it computed: y, mean and var, or dx, dweight and dbias. It raises Cannot, with the reason, for what the peer can't do.
"""

import numpy as np

# In the order of the tables. cbn is what the others are compared with; the last two are no peers, but marks to compare with.
CONTENDERS = ("cbn", "torch", "onednn", "onnxruntime", "numba", "jax", "numpy", "onednn_blocked", "wall")
PEERS = ("torch", "onednn", "onnxruntime", "numba", "jax", "numpy")


class Cannot(Exception):
    """The contender cannot do this cell; the message says why."""


def aligned(shape):
    """A new float32 array of zeros on a cache line's boundary, which is what peers choose for their own buffers."""
    size = int(np.prod(shape))
    memory = np.empty(size + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    memory.fill(0)
    return memory[start : start + size].reshape(shape)


def elements(cell, seed, into=None):
    """The cell's x (seed 0) or dy (seed 1): the same values in every process, normal with mean 0.5."""
    array = np.empty(cell.shape, np.float32) if into is None else into
    period = 999_983  # a prime: no two channels hold the same values
    values = np.random.default_rng(seed).standard_normal(min(period, array.size), np.float32) + np.float32(0.5)
    flat = array.reshape(-1)
    for start in range(0, flat.size, period):
        flat[start : start + period] = values[: flat.size - start]
    return array


def aligned_elements(cell, seed):
    return elements(cell, seed, aligned(cell.shape))


def parameters(cell):
    """weight, bias, and the mean and var that inference and backward are given."""
    draw = np.random.default_rng(2).uniform(0.5, 1.5, (4, cell.channels)).astype(np.float32)
    return tuple(draw * np.array([[1], [0.2], [0.5], [1]], np.float32))
