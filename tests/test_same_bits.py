"""The same bits for any number of threads, CPU level, way of storing and batch around a sample; on every machine (same_bits.json).

Of every operation, on every type of elements, with every activation, with and without a residual, with statistics of the batch and frozen ones.

After a change that is meant to change results, write the hashes anew: python tests/test_same_bits.py --write
"""

import hashlib
import json
import pathlib
import sys

import numpy as np
import pytest

import cbn
from cbn import dispatch

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

HASHES = pathlib.Path(__file__).with_name("same_bits.json")

SHAPES = [
    ((2, 3, 4), 1), ((3, 5, 1, 31), 1), ((4, 67, 7, 7), 1), ((9, 67, 7, 7), 1), ((2, 130, 4, 4), 1), ((1, 1, 70_001), 1), ((1, 40, 14, 14), 1),
    ((2, 3, 20_005), 1), ((300, 2, 130), 1), ((15, 5, 140), 1), ((40, 1, 16_400), 1), ((7, 2), 1), ((40, 17), 1), ((9, 200), 1),
    ((5, 7, 9, 64), -1), ((257, 100), -1), ((1601, 3), -1), ((2, 577, 16), -1), ((66_001, 1), 1), ((2100, 130), 1), ((33_300, 64), 1),
    ((3, 4, 5, 6), 2), ((5, 4, 33), 0), ((600, 1100), 1), ((25, 2, 50_000), 1), ((700, 6, 28, 28), 1),
]  # fmt: skip


# For what is made of all combinations: the ways that the kernels cut their work, in small.
FEW_SHAPES = [((4, 67, 7, 7), 1), ((1, 40, 14, 14), 1), ((2, 3, 20_005), 1), ((300, 2, 130), 1), ((40, 17), 1), ((5, 7, 9, 64), -1), ((1601, 3), -1),
              ((2, 577, 16), -1)]  # fmt: skip


def whole_numbers(shape, seed):
    """Arithmetic on whole numbers alone, so that the same numbers come of it on every machine: 24 bits each."""
    n = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape) + np.uint64(seed * 1_000_003 + 1)
    n = n * np.uint64(0x9E3779B97F4A7C15)
    n = (n ^ (n >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (n >> np.uint64(40)).astype(np.int64)


def numbers(shape, seed):
    """Multiples of 2**-23 in [-1, 1): exact in float32."""
    return (whole_numbers(shape, seed) - 2**23) / 2**23


def arguments(shape, axis, dtype):
    """x, dy, mean, var, weight, bias; the channels have different offsets, from 0 to some thousands."""
    c = shape[axis]
    offset = np.expand_dims(numbers(c, 1) * np.arange(c) * 64, tuple(i for i in range(len(shape)) if i != axis % len(shape)))
    arrays = numbers(shape, 2) + offset, numbers(shape, 3), numbers(c, 4), abs(numbers(c, 5)) + 0.125, numbers(c, 6), numbers(c, 7)
    if dtype in (np.float32, np.float64):
        return [a.astype(dtype) for a in arrays]
    x, dy, *parameters = arrays
    if np.dtype(dtype).kind not in "iu":
        return [numbers(shape, 2).astype(dtype), dy.astype(dtype), *(a.astype(np.float32) for a in parameters)]
    lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
    x = lowest + whole_numbers(shape, 2) % (highest - lowest + 1)
    return [x.astype(dtype), *(a.astype(np.float32) for a in (dy, *parameters))]


def residual_of(x):
    return numbers(x.shape, 8).astype(x.dtype if x.dtype.kind not in "iu" else np.float32)


def inference(x, dy, mean, var, weight, bias, axis):
    return [cbn.batch_norm(x, mean, var, weight, bias, axis=axis)]


def training(x, dy, mean, var, weight, bias, axis):
    mean, var = mean.copy(), var.copy()
    y, st = cbn.batch_norm_train(x, weight, bias, axis=axis)
    cbn.batch_norm(x, mean, var, weight, bias, True, axis=axis)
    return [y, st.mean, st.var, mean, var]


def backward(x, dy, mean, var, weight, bias, axis):
    return list(cbn.batch_norm_backward(dy, x, cbn.batch_stats(x, axis=axis), weight, bias, axis=axis))


def backward_frozen(x, dy, mean, var, weight, bias, axis):
    return list(cbn.batch_norm_backward(dy, x, (mean, var), weight, bias, axis=axis, training=False))


def fused_inference(x, dy, mean, var, weight, bias, axis, **fusion):
    return [cbn.batch_norm(x, mean, var, weight, bias, axis=axis, **fusion)]


def fused_training(x, dy, mean, var, weight, bias, axis, **fusion):
    return [cbn.batch_norm_train(x, weight, bias, axis=axis, **fusion)[0]]


def fused_backward(x, dy, mean, var, weight, bias, axis, **fusion):
    g = cbn.batch_norm_backward(dy, x, cbn.batch_stats(x, axis=axis), weight, bias, axis=axis, **fusion)
    return [*g] + ([] if g.residual is None else [g.residual])


def fused_frozen(x, dy, mean, var, weight, bias, axis, **fusion):
    """Backward through constants, with and without gradients of weight and bias."""
    wanted, unwanted = (
        cbn.batch_norm_backward(dy, x, (mean, var), weight, bias, axis=axis, training=False, affine_grad=affine, **fusion) for affine in (True, False)
    )
    return [*wanted, unwanted.x] + [g.residual for g in (wanted, unwanted) if g.residual is not None]


class Fused:
    """An operation with an activation, a residual, or both."""

    def __init__(self, operation, activation, with_residual):
        self.operation, self.activation, self.with_residual = operation, activation, with_residual
        activation = "-".join(map(str, activation)) if isinstance(activation, tuple) else activation
        self.__name__ = f"{operation.__name__} {activation}{' residual' * with_residual}"

    def __call__(self, x, *others):
        return self.operation(x, *others, activation=self.activation, residual=residual_of(x) if self.with_residual else None)


OPERATIONS = [inference, training, backward, backward_frozen]
ACTIVATIONS = [None, "relu", "relu6", ("clip", -0.5, 0.75), ("leaky_relu", 0.125), "hard_swish"]
FUSED = [
    Fused(operation, activation, with_residual)
    for operation in (fused_inference, fused_training, fused_backward, fused_frozen)
    for activation in ACTIVATIONS
    for with_residual in (False, True)
]
NARROW = [np.float16, np.int8, np.uint8, np.int16, np.uint16] + [bfloat16] * (bfloat16 is not None)
CASES = [
    pytest.param(operation, shape, axis, dtype, id=f"{operation.__name__} {dtype.__name__} {shape} {axis}")
    for operations, shapes, dtypes in (
        (OPERATIONS, SHAPES, (np.float32, np.float64)),
        (OPERATIONS, FEW_SHAPES, NARROW),
        (FUSED, FEW_SHAPES, (np.float32, np.float64, np.float16, np.uint8, *[bfloat16] * (bfloat16 is not None))),
    )
    for operation in operations
    for shape, axis in shapes
    for dtype in dtypes
]


def hashed(arrays):
    return hashlib.sha256(b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in arrays)).hexdigest()[:16]


def all_hashes():
    return {case.id: hashed(case.values[0](*arguments(*case.values[1:]), case.values[2])) for case in CASES}


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("operation, shape, axis, dtype", CASES)
def test_any_way_of_running(operation, shape, axis, dtype, restored):
    """As one thread of the baseline does it."""
    given = *arguments(shape, axis, dtype), axis
    dispatch.set_isa("baseline")
    cbn.set_num_threads(1)
    expected = operation(*given)
    cbn.threads.set_grain(1)
    for isa in dispatch.isa_available():
        for threads in (1, 2, 3, 5, 8) if operation in OPERATIONS and dtype in (np.float32, np.float64) else (1, 3):
            for stream_bytes in (0, np.inf):
                dispatch.set_isa(isa)
                dispatch.set_stream_bytes(stream_bytes)
                cbn.set_num_threads(threads)
                for a, b in zip(operation(*given), expected, strict=True):
                    assert same(a, b), f"{isa}, {threads} threads, stores past the caches from {stream_bytes} bytes"


def at_offset(a, elements):
    """A copy that begins so many elements after the boundary of a cache line."""
    memory = np.empty(a.size + elements + 64, a.dtype)
    start = -memory.ctypes.data % 64 // a.itemsize + elements
    memory[start : start + a.size] = a.ravel()
    return memory[start : start + a.size].reshape(a.shape)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape, axis", [((70, 512), 1), ((9, 1056), 1), ((300, 1040), 1), ((3, 40, 7, 9), 1), ((8, 40, 7, 7), 1), ((130, 100), 1)])
def test_any_address(operation, shape, axis, dtype, isa, restored):
    x, dy, *parameters = arguments(shape, axis, dtype)
    x[:, ::5] *= x[:, ::5] > 0.9    # mostly zeros: their mean is guessed badly
    expected = operation(x, dy, *parameters, axis)
    cbn.threads.set_grain(1)
    for offset in range(16):
        for threads in (1, 2, 3):
            cbn.set_num_threads(threads)
            results = operation(at_offset(x, offset), at_offset(dy, offset * 7 % 16), *parameters, axis)
            for a, b in zip(results, expected, strict=True):
                assert same(a, b), f"{offset} elements after a cache line, {threads} threads"


@pytest.mark.parametrize("operation, shape, axis, dtype", CASES)
def test_any_machine(operation, shape, axis, dtype, request):
    assert hashed(operation(*arguments(shape, axis, dtype), axis)) == json.loads(HASHES.read_text())[request.node.callspec.id]


def alone(x, *parameters):
    return np.concatenate([cbn.batch_norm(x[i : i + 1], *parameters) for i in range(len(x))])


def among_others(x, *parameters):
    return cbn.batch_norm(np.concatenate([x[:1] * 7, x, x + 1, x[::-1]]), *parameters)[1 : 1 + len(x)]


def channels_last(x, *parameters):
    return np.moveaxis(cbn.batch_norm(np.ascontiguousarray(np.moveaxis(x, 1, -1)), *parameters, axis=-1), -1, 1)


def channels_last_in_memory(x, *parameters):
    return cbn.batch_norm(np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1), *parameters)


def strided(x, *parameters):
    return cbn.batch_norm(np.repeat(x, 3, axis=-1)[..., ::3], *parameters)


def given_out(x, *parameters):
    return cbn.batch_norm(x, *parameters, out=np.full_like(x, np.nan))


def in_place(x, *parameters):
    y = x.copy()
    return cbn.batch_norm(y, *parameters, out=y)


def float64_parameters(x, *parameters):
    return cbn.batch_norm(x, *(a.astype(np.float64) for a in parameters))


FORMS = [alone, among_others, channels_last, channels_last_in_memory, strided, given_out, in_place, float64_parameters]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 3, 4, 5), (3, 65, 7, 7), (4, 17), (13, 100), (2, 5, 700), (2, 64, 3, 3, 3)], ids=str)
def test_a_sample_at_inference(shape, dtype, form, isa, threads):
    x, _, *parameters = arguments(shape, 1, dtype)
    assert same(np.ascontiguousarray(form(x, *parameters)), cbn.batch_norm(x, *parameters))


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    HASHES.write_text(json.dumps(all_hashes(), indent=1) + "\n")
