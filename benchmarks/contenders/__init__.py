"""The contenders, one a module, and the arrays they all start from.

A module offers `versions()`, a string, and `prepare(cell)`, which returns (calls, results): a list of functions without arguments that do
the cell's work in different ways, of which the fastest will be timed, and a function that turns what such a call returned into a dictionary
of the arrays it computed: y, mean and var, or dx, dweight, dbias and dresidual. It raises Cannot, with the reason, for what the peer can't do.
A module that takes part in normalize_images has `prepare_images(cell)`, too.
"""

import numpy as np
from workloads import EPS, IMAGES

# In the order of the tables. cbn is what the others are compared with; the last two are no peers, but marks to compare with.
CONTENDERS = ("cbn", "torch", "onednn", "onnxruntime", "numba", "jax", "opencv", "numpy", "onednn_blocked", "wall")
PEERS = ("torch", "onednn", "onnxruntime", "numba", "jax", "opencv", "numpy")
IMAGE_CONTENDERS = ("cbn", "torch", "opencv", "numpy", "wall")
IMAGE_MEAN, IMAGE_STD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)  # of ImageNet, for values in [0, 1]


def contestants(op):
    """Who takes part in an operation; OpenCV in no other than normalize_images."""
    return [name for name in CONTENDERS if (name in IMAGE_CONTENDERS if op == IMAGES else name != "opencv")]


class Cannot(Exception):
    """The contender cannot do this cell; the message says why."""


def aligned(shape):
    """A new float32 array of zeros on a cache line's boundary, which is what peers choose for their own buffers."""
    size = int(np.prod(shape))
    memory = np.empty(size + 31, np.float32)  # with all of the last line
    start = -memory.ctypes.data % 64 // 4
    memory.fill(0)
    return memory[start : start + size].reshape(shape)


def elements(cell, seed, into=None):
    """The cell's x (seed 0), dy (seed 1) or residual (seed 3): the same values in every process, normal with mean 0.5."""
    array = np.empty(cell.shape, np.float32) if into is None else into
    period = 999_983  # a prime: no two channels hold the same values
    values = np.random.default_rng(seed).standard_normal(min(period, array.size), np.float32) + np.float32(0.5)
    flat = array.reshape(-1)
    for start in range(0, flat.size, period):
        flat[start : start + period] = values[: flat.size - start]
    if seed == 1 and cell.relu:
        array[np.abs(relu_input(cell)) < 1e-4] = 0  # so near the corner, each contender's rounding would decide whether dy passes
    return array


def relu_input(cell):
    """What the ReLU of the forward call is given."""
    channel = [-1 if i == cell.axis % len(cell.shape) else 1 for i in range(len(cell.shape))]
    weight, bias, mean, var = (a.reshape(channel) for a in parameters(cell))
    v = elements(cell, 0)
    v -= mean
    v *= weight / np.sqrt(var + EPS)
    v += bias
    if cell.add:
        v += elements(cell, 3)
    return v


def aligned_elements(cell, seed):
    return elements(cell, seed, aligned(cell.shape))


def pixels(cell):
    """The cell's images, uint8 (N, H, W, C)."""
    return np.random.default_rng(0).integers(0, 256, (cell.batch, *cell.layer[1:], cell.channels), np.uint8)


def parameters(cell):
    """weight, bias, and the mean and var that inference and backward are given."""
    draw = np.random.default_rng(2).uniform(0.5, 1.5, (4, cell.channels)).astype(np.float32)
    return tuple(draw * np.array([[1], [0.2], [0.5], [1]], np.float32))
