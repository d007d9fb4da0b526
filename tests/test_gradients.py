"""Gradients are those of the forward functions: by finite differences, at large offsets, in place, and in the dtype of what they belong to."""

import numpy as np
import pytest
import reference
from reference import check, largest

import cbn

LAYOUTS = [((4, 3, 5), 1), ((6, 5), 1), ((3, 4, 3), -1), ((2, 2, 3, 2, 2), 2), ((2, 1, 1), 1), ((520, 1), 1)]


def normalized(training, x, stats, weight, bias, axis):
    if training:
        return cbn.batch_norm_train(x, weight, bias, 0.1, axis=axis)[0]
    return cbn.batch_norm(x, *stats, weight, bias, eps=0.1, axis=axis)


def differences(function, a, step=1e-5):
    """The gradient of a number that depends on array a, by central differences."""
    gradient = np.empty_like(a)
    for i in np.ndindex(a.shape):
        high, low = a.copy(), a.copy()
        high[i] += step
        low[i] -= step
        gradient[i] = (function(high) - function(low)) / (2 * step)
    return gradient


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape, axis", LAYOUTS, ids=str)
def test_finite_differences(shape, axis, training):
    rng = np.random.default_rng(6)
    x, dy = rng.standard_normal((2, *shape))
    weight, bias, mean = rng.standard_normal((3, shape[axis]))
    stats = cbn.batch_stats(x, axis=axis) if training else (mean, rng.random(shape[axis]) + 0.5)
    g = cbn.batch_norm_backward(dy, x, stats, weight, bias, 0.1, axis=axis, training=training)
    loss = lambda x=x, weight=weight, bias=bias: (dy * normalized(training, x, stats, weight, bias, axis)).sum()
    np.testing.assert_allclose(g.x, differences(loss, x), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(g.weight, differences(lambda a: loss(weight=a), weight), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(g.bias, differences(lambda a: loss(bias=a), bias), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offset", [0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape, axis", [((16, 4, 8, 8), 1), ((16, 8, 8, 4), -1), ((3, 2, 7001), 1), ((1100, 70), 1)], ids=str)
def test_offsets(shape, axis, offset, isa):
    rng = np.random.default_rng(7)
    x = (rng.standard_normal(shape) + offset).astype(np.float32)
    dy = rng.standard_normal(shape).astype(np.float32)
    weight = rng.standard_normal(shape[axis]).astype(np.float32)
    _, st = cbn.batch_norm_train(x, axis=axis)
    mean, var = reference.batch_stats(x, axis)
    for training in (True, False):
        g = cbn.batch_norm_backward(dy, x, st, weight, axis=axis, training=training)
        dx, dgamma, dbeta = reference.batch_norm_backward(dy, x, mean, var, weight, axis=axis, training=training)
        check(g.x, dx, largest(dx, axis), 8)
        check(g.weight, dgamma, np.sqrt(x.size // x.shape[axis]), 8)
        check(g.bias, dbeta, np.sqrt(x.size // x.shape[axis]), 8)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape, axis", [((3, 5, 17), 1), ((2, 64, 5, 5), 1), ((530, 3), 1), ((5, 7, 100), -1), ((1, 2, 9001), 1)], ids=str)
def test_in_place(shape, axis, dtype, training, isa, threads):
    rng = np.random.default_rng(8)
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    stats = cbn.batch_stats(x, axis=axis)
    expected = cbn.batch_norm_backward(dy, x, stats, axis=axis, training=training)
    for place in (0, 1, 2):
        given = [dy.copy(), x.copy(), np.full_like(x, np.nan)]
        g = cbn.batch_norm_backward(*given[:2], stats, axis=axis, training=training, out=given[place])
        assert g.x is given[place]
        for a, b in zip(g, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        for i, array in enumerate((dy, x)):
            assert i == place or (given[i] == array).all()


@pytest.mark.parametrize("weight_dtype", [None, np.float32, np.float64, ">f4", int])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f8"])
def test_dtypes(dtype, weight_dtype):
    """The gradient of a weight has its dtype, if that can hold one; without a weight, and that of the input, x's. All in native byte order."""
    x = np.random.default_rng(9).standard_normal((4, 3, 5)).astype(dtype)
    weight = None if weight_dtype is None else np.ones(3, weight_dtype)
    g = cbn.batch_norm_backward(x, x, cbn.batch_stats(x), weight)
    native = np.dtype(dtype).newbyteorder("=")
    of_weight = native if weight_dtype in (None, int) else np.dtype(weight_dtype).newbyteorder("=")
    assert [a.dtype for a in g] == [native, of_weight, of_weight]
    assert all(a.dtype.isnative for a in g)
    assert g.weight.shape == g.bias.shape == (3,)


def test_statistics_as_a_pair():
    x, dy = np.random.default_rng(10).standard_normal((2, 4, 3, 5))
    st = cbn.batch_stats(x)
    for pair in [(st.mean, st.var), (list(st.mean), list(st.var))]:
        for a, b in zip(cbn.batch_norm_backward(dy, x, pair), cbn.batch_norm_backward(dy, x, st), strict=True):
            np.testing.assert_array_equal(a, b)
