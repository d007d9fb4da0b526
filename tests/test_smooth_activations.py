"""Sigmoid and silu: an exponential of our own, with the same bits at every CPU level, right everywhere up to infinity."""

import numpy as np
import pytest
import reference

import cbn
from cbn import dispatch

# Mean 0, variance 1 and eps 0 leave x as it is, but for the sign of 0.
AS_IT_IS = {"eps": 0.0}
FAR = {np.float32: 120, np.float64: 800}


def inputs(dtype):
    """Of all sizes and both signs, dense where the exponential becomes subnormal, and the ends of the type."""
    rng = np.random.default_rng(80)
    far = FAR[dtype]
    parts = [
        rng.uniform(-far, far, 20_000), rng.standard_normal(20_000), rng.uniform(-1, 1, 5000) * 2.0 ** rng.integers(-60, 7, 5000),
        np.linspace(-far, far, 5001), [0.0, -0.0, np.finfo(dtype).max, np.finfo(dtype).min, np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal],
    ]  # fmt: skip
    return np.concatenate(parts).astype(dtype).reshape(-1, 1)


def forward(v, activation):
    return cbn.batch_norm(v, [0], [1], activation=activation, **AS_IT_IS)


def backward(v, dy, activation):
    return cbn.batch_norm_backward(dy, v, ([0], [1]), training=False, affine_grad=False, activation=activation, **AS_IT_IS).x


def ulps(actual, expected, v, dtype):
    """Errors of elements in their own units; of silu, what the exponential lacks where it is subnormal counts |v| times."""
    with np.errstate(all="ignore"):
        nearest, least = expected.astype(dtype), np.finfo(dtype).smallest_subnormal
        unit = np.spacing(np.maximum(abs(nearest), least)) + abs(v) * (abs(nearest) < np.finfo(dtype).tiny * abs(v)) * least
        return np.where(actual == nearest, 0, abs(actual - expected) / unit)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_each_element(activation, dtype, isa):
    v = inputs(dtype)
    with np.errstate(all="ignore"):
        y = forward(v, activation)
        expected = reference.activate(v.astype(reference.wide), activation)
        errors = ulps(y, expected, v, dtype)
        assert errors.max() <= 4, (v[errors.argmax()], y[errors.argmax()], expected[errors.argmax()])
        dx = backward(v, np.ones_like(v), activation)
        slope = reference.slope(v.astype(reference.wide), activation)
        assert (abs(dx - slope) <= 6 * np.finfo(dtype).eps * np.maximum(abs(slope), 0.1 if activation == "silu" else 0) + np.finfo(dtype).tiny).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_infinities_and_nan(activation, dtype, isa):
    v = np.array([[np.inf], [-np.inf], [np.nan]], dtype)
    ends = {"sigmoid": [1, 0, np.nan], "silu": [np.inf, 0, np.nan]}[activation]
    slopes = {"sigmoid": [0, 0, np.nan], "silu": [1, 0, np.nan]}[activation]
    np.testing.assert_array_equal(forward(v, activation).ravel(), ends)
    np.testing.assert_array_equal(backward(v, np.ones_like(v), activation).ravel(), slopes)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
@pytest.mark.parametrize("shape, axis", [((3, 5, 7), 1), ((2, 6, 9, 9), 1), ((40, 70), 1), ((5, 4, 3), -1)])
def test_same_bits(activation, dtype, shape, axis, restored):
    """At every level, with a residual as added apart, and in training as at inference, but for float64, whose training has the mean to more digits."""
    rng = np.random.default_rng(81)
    x, dy, residual = (3 * rng.standard_normal((3, *shape))).astype(dtype)
    found = []
    for isa in dispatch.isa_available():
        dispatch.set_isa(isa)
        y, stats = cbn.batch_norm_train(x, axis=axis, activation=activation, residual=residual)
        at_inference = cbn.batch_norm(x, *stats[1:], axis=axis, activation=activation, residual=residual)
        if dtype == np.float32:
            np.testing.assert_array_equal(at_inference, y)
        g = cbn.batch_norm_backward(dy, x, stats, axis=axis, activation=activation, residual=residual)
        found.append([y, at_inference, *g, g.residual])
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(a, b)
