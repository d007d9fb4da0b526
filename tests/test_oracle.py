"""Every operation agrees with the oracle on every layout, rank, element type, CPU level and number of threads."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from reference import check, largest

import cbn

# Sizes around those that the kernels are cut by (kernels/order.pxd, tuning.pxd): lanes of 16 (float64: 8), trees of 4 of them, 8 trees to a sum, planes
# under 16 elements as columns, tiles of 64 columns, few channels folded into whole tiles, groups of 16 channels, 512 columns at a time, 32 rows
# a sum, chunks of 16384 elements or 256 rows, copies of 4096 elements.
ROWS = [
    ((2, 1, 2), 1), ((1, 2, 7), 1), ((7, 3, 15), 1), ((3, 16, 17), 1), ((2, 15, 4, 4), 1), ((5, 33, 3, 11), 1), ((1, 17, 31), 1),
    ((2, 63, 63), 1), ((2, 64, 8, 8), 1), ((1, 65, 5, 13), 1), ((2, 100, 7, 7), 1), ((3, 2, 2, 5, 13), 1), ((1, 130, 127), 1), ((3, 3, 129), 1),
    ((2, 2, 255), 1), ((3, 1, 257), 1), ((2, 3, 4095), 1), ((1, 2, 4097), 1), ((130, 1, 17), 1), ((2, 1, 3, 7, 795), 1), ((1, 1, 16383), 1),
    ((7, 2, 16), 1), ((8, 2, 16), 1), ((8, 3, 15), 1), ((15, 2, 140), 1), ((9, 2, 1024), 1), ((8, 2, 1025), 1), ((226, 1, 1000), 1),
    ((3, 2, 63), 1), ((3, 2, 64), 1), ((2, 17, 65), 1), ((1, 33, 511), 1), ((9, 2, 512), 1), ((8, 3, 513), 1), ((7, 2, 520), 1), ((2, 2, 1023), 1),
    ((3, 2, 1030), 1), ((9, 5, 48), 1), ((17, 2, 33), 1), ((1, 16, 16), 1), ((5, 15, 2, 2), 1), ((64, 7, 3, 3), 1), ((1, 40, 15), 1), ((33, 9, 3, 5), 1),
]  # fmt: skip
COLUMNS = [
    ((2, 1), 1), ((3, 1, 4), -1), ((7, 2), 1), ((15, 3), 1), ((2, 65, 1, 1), 1), ((16, 15, 1, 1), 1), ((2, 16), -1), ((33, 16), 1),
    ((31, 17), 1), ((35, 48, 1), 1), ((3, 3, 7, 63), -1), ((2, 2, 2, 8, 64), -1), ((5, 13, 65), -1), ((3, 43, 100), -1), ((127, 130), 1),
    ((255, 2), 1), ((257, 2), 1), ((257, 64), 1), ((2, 256, 1), -1), ((577, 1), 1), ((3, 191, 3), -1), ((70, 24), 1), ((515, 63), 1),
    ((2, 65), -1), ((9, 700), 1),
    ((31, 80), 1), ((32, 96), 1), ((33, 72), 1), ((65, 513), 1), ((3, 1040), 1), ((4, 8), 1), ((5, 9), 1), ((1024, 12), 1), ((513, 3), 1),
]  # fmt: skip
MIDDLE = [
    ((2, 3, 5, 7), 2), ((2, 3, 4, 5, 6), 2), ((2, 3, 4, 33, 5), -2), ((5, 12), 0), ((3, 4, 5), 0), ((4, 3, 64, 1), 2), ((1, 2, 3, 4, 5), 3),
]  # fmt: skip
MANY_CHUNKS = [
    ((1, 1, 16_385), 1), ((2, 1, 33_000), 1), ((70, 2, 500), 1), ((2000, 3, 17), 1), ((40, 1, 16_400), 1), ((66_000, 1), -1), ((32_900, 2), 1),
    ((4111, 16), 1), ((1030, 64), 1), ((2, 800, 130), -1),
]  # fmt: skip
ONE_VALUE = [((1, 65, 1, 1), 1), ((1, 3), -1)]  # too few to train with

AFFINE = [(True, True), (True, False), (False, True), (False, False)]  # with a weight, with a bias


@functools.cache
def problem(shape, axis, dtype):
    """Arguments for every operation, all of them read-only; the channels have different means and sizes."""
    rng = np.random.default_rng(abs(hash((shape, axis))))
    channels = shape[axis]
    normal = lambda scale=1.0, offset=0.0: (rng.standard_normal(channels) * scale + offset).astype(dtype)
    spread = reference.per_channel(normal(1, 3), np.empty(shape), axis), reference.per_channel(normal(5), np.empty(shape), axis)
    p = SimpleNamespace(
        x=(rng.standard_normal(shape) * spread[0] + spread[1]).astype(dtype),
        dy=(rng.standard_normal(shape) + spread[1] / 20).astype(dtype),
        mean=normal(5).astype(np.float32),
        var=normal(1).astype(np.float32) ** 2,
        weight=normal(),
        bias=normal(),
        axis=axis,
        eps=1e-3,
    )
    for array in (p.x, p.dy, p.mean, p.var, p.weight, p.bias):
        array.flags.writeable = False
    return p


@functools.cache
def expected(operation, shape, axis, dtype, affine):
    """The oracle's results, and the scales to measure the errors of gradients by."""
    p = problem(shape, axis, dtype)
    weight, bias = (p.weight if affine[0] else None), (p.bias if affine[1] else None)
    if operation is inference:
        return reference.batch_norm(p.x, p.mean, p.var, weight, bias, p.eps, axis)
    if operation in (training, stats):
        return reference.batch_norm_train(p.x, weight, bias, p.eps, axis)
    mean, var = given(p, operation is backward)
    gradients = reference.batch_norm_backward(p.dy, p.x, mean, var, weight, p.eps, axis, operation is backward)
    xhat = reference.batch_norm(p.x, mean, var, eps=p.eps, axis=axis)
    sums = abs(p.dy * xhat).sum(reference.other_axes(p.x, axis)), abs(p.dy).sum(reference.other_axes(p.x, axis))
    scale = reference.per_channel(1 if weight is None else weight, p.x, axis) / np.sqrt(reference.per_channel(var, p.x, axis) + p.eps)
    return *gradients, abs(scale) * largest(p.dy, axis), *sums


def outs(x, *in_place):
    """The forms of out=, as (out, index of the array whose place it takes or None)."""
    yield None, None
    if x.size > 100_000:
        return
    yield np.full_like(x, np.nan), None
    for i, array in enumerate(in_place):
        yield array.copy(), i


def given(p, train):
    """The statistics that backward is given."""
    return tuple(a.astype(np.float64) for a in reference.batch_stats(p.x, p.axis)) if train else (p.mean, p.var)


def check_moments(st, mean, var, tolerance):
    assert (abs(st.mean - mean) <= tolerance * np.maximum(abs(mean), np.sqrt(var))).all()
    assert (abs(st.var - var) <= tolerance * var).all()


def tolerance(dtype):
    """Of means and variances: 1e-6 for float32."""
    return 8 * np.finfo(dtype).eps


def scale(y, p, weight, bias, mean=0, var=1):
    """What errors of y are measured by: the largest |y| of a channel, or its bias where that is larger, as it may be for a few values."""
    size = largest(y, p.axis)
    if bias is not None:
        size = np.maximum(size, abs(reference.per_channel(bias, y, p.axis)))
    if p.x.dtype == np.float64:  # the statistics are float64, and so rounded
        size = size + abs(reference.per_channel(mean * (1 if weight is None else weight) / np.sqrt(var + p.eps), y, p.axis))
    return size


def inference(p, expected, weight, bias):
    for out, in_place in outs(p.x, p.x):
        x = p.x if in_place is None else out
        y = cbn.batch_norm(x, p.mean, p.var, weight, bias, eps=p.eps, axis=p.axis, out=out)
        assert y.dtype == p.x.dtype and (out is None or y is out)
        check(y, expected, scale(expected, p, weight, bias), 4)


def training(p, expected, weight, bias):
    y_expected, mean, var = expected
    m = p.x.size // mean.size
    for out, in_place in outs(p.x, p.x):
        x = p.x if in_place is None else out
        running_mean, running_var = p.mean.copy(), p.var.copy()
        unbiased, tracked = (True, var * m / (m - 1)) if in_place is None else (False, var)
        y = cbn.batch_norm(x, running_mean, running_var, weight, bias, True, 0.3, p.eps, axis=p.axis, unbiased=unbiased, out=out)
        assert y.dtype == p.x.dtype and (out is None or y is out)
        check(y, y_expected, scale(y_expected, p, weight, bias, mean, var), 4)
        check(running_mean, reference.updated(p.mean, mean, 0.3), abs(p.mean) + abs(mean) + np.sqrt(var), 4)
        check(running_var, reference.updated(p.var, tracked, 0.3), p.var + tracked, 4)
    y2, st = cbn.batch_norm_train(p.x, weight, bias, p.eps, axis=p.axis)
    np.testing.assert_array_equal(y2, y, strict=True)
    assert st.count == m
    check_moments(st, mean, var, tolerance(p.x.dtype))


def stats(p, expected, weight, bias):
    st = cbn.batch_stats(p.x, axis=p.axis)
    assert st.count == p.x.size // p.x.shape[p.axis] and st.mean.dtype == st.var.dtype == np.float64
    check_moments(st, *expected[1:], tolerance(p.x.dtype))


def backward(p, expected, weight, bias, train=True):
    dx, dgamma, dbeta, dx_scale, dgamma_scale, dbeta_scale = expected
    stats = given(p, train)
    for out, in_place in outs(p.x, p.dy, p.x):
        dy, x = (out if in_place == 0 else p.dy), (out if in_place == 1 else p.x)
        g = cbn.batch_norm_backward(dy, x, stats, weight, bias, p.eps, axis=p.axis, training=train, out=out)
        assert out is None or g.x is out
        assert [a.dtype for a in g] == 3 * [p.x.dtype]
        check(g.x, dx, dx_scale, 8)
        check(g.weight, dgamma, dgamma_scale, 4)
        check(g.bias, dbeta, dbeta_scale, 4)


def backward_frozen(p, expected, weight, bias):
    backward(p, expected, weight, bias, False)


CASES = [
    (operation, shape, axis)
    for operation in (inference, training, stats, backward, backward_frozen)
    for shape, axis in ROWS + COLUMNS + MIDDLE + MANY_CHUNKS + ONE_VALUE
    if (shape, axis) not in ONE_VALUE or operation in (inference, stats, backward_frozen)
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("operation, shape, axis", CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_agrees_with_the_oracle(operation, shape, axis, dtype, isa, threads):
    p = problem(shape, axis, dtype)
    for affine in AFFINE if p.x.size < 5000 else AFFINE[:1]:
        weight, bias = (p.weight if affine[0] else None), (p.bias if affine[1] else None)
        operation(p, expected(operation, shape, axis, dtype, affine), weight, bias)
