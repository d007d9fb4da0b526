"""activate and its gradients: the bits of batch normalization with mean 0 and variance 1, and those of NumPy where the activation is exact."""

import numpy as np
import pytest
from ml_dtypes import bfloat16
from test_fusion import ACTIVATIONS, LAYOUTS, draw

import cbn

SMOOTH = ("sigmoid", "silu")


def as_it_is(x, bias, axis, **fused):
    channels = x.shape[axis]
    return cbn.batch_norm(x, np.zeros(channels), np.ones(channels), None, bias, eps=0.0, axis=axis, **fused)


def gradients_as_it_is(dy, x, bias, axis, **fused):
    stats = np.zeros(x.shape[axis]), np.ones(x.shape[axis])
    weight = None if bias is None else np.ones_like(bias)
    return cbn.batch_norm_backward(dy, x, stats, weight, bias, 0.0, axis=axis, training=False, **fused)


@pytest.mark.parametrize("with_bias, with_residual", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape, axis", LAYOUTS, ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *SMOOTH], ids=str)
def test_same_bits(activation, shape, axis, dtype, with_bias, with_residual, threads):
    x, dy, residual, _, bias = draw(shape, axis, dtype)
    residual, bias = residual if with_residual else None, bias if with_bias else None
    fused = {"activation": activation, "residual": residual}
    y = cbn.activate(x, axis=axis, bias=bias, **fused)
    np.testing.assert_array_equal(y, as_it_is(x, bias, axis, **fused))
    g = cbn.activate_backward(dy, x, axis=axis, bias=bias, **fused)
    expected = gradients_as_it_is(dy, x, bias, axis, **fused)
    np.testing.assert_array_equal(g.x, expected.x)
    assert g.weight is None and g.residual is (g.x if with_residual else None) and (g.bias is None) == (bias is None)
    if with_bias:
        np.testing.assert_array_equal(g.bias, expected.bias)
        assert g.bias.dtype == dtype
    if activation in ACTIVATIONS:
        function, gradient = ACTIVATIONS[activation]
        v = x if bias is None else x + np.expand_dims(bias, [i for i in range(x.ndim) if i != axis % x.ndim])
        v = v if residual is None else v + residual
        np.testing.assert_array_equal(y, function(v))
        np.testing.assert_array_equal(g.x, gradient(v, dy).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.int8, np.uint16])
def test_types(dtype, isa):
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((3, 5, 40)) * 3).astype(dtype)
    kind = np.dtype(np.float32) if x.dtype.kind in "iu" else x.dtype
    dy, bias = rng.standard_normal(x.shape).astype(kind), rng.standard_normal(5)
    y = cbn.activate(x, "hard_swish", bias=bias)
    np.testing.assert_array_equal(y, as_it_is(x, bias, 1, activation="hard_swish"))
    assert y.dtype == kind
    g = cbn.activate_backward(dy, x, "hard_swish", bias=bias)
    np.testing.assert_array_equal(g.x, gradients_as_it_is(dy, x, bias, 1, activation="hard_swish").x)
    assert g.x.dtype == kind and g.bias.dtype == np.float64
    assert cbn.activate_backward(dy, x, "relu", bias=bias.astype(np.float16)).bias.dtype == np.float16
    assert cbn.activate_backward(dy, x, "relu", bias=list(bias)).bias.dtype == np.float32


def test_in_place():
    x, dy, residual, _, bias = draw((4, 6, 50), 1, np.float32)
    arguments = {"activation": "silu", "bias": bias, "residual": residual}
    y, g = cbn.activate(x, **arguments), cbn.activate_backward(dy, x, **arguments)
    for changed in ("x", "residual"):
        given = {**arguments, "x": x.copy(), "residual": residual.copy()}
        assert cbn.activate(out=given[changed], **given) is given[changed]
        np.testing.assert_array_equal(given[changed], y)
    for changed in ("dy", "x", "residual"):
        given = {**arguments, "dy": dy.copy(), "x": x.copy(), "residual": residual.copy()}
        back = cbn.activate_backward(out=given[changed], **given)
        assert back.x is given[changed]
        np.testing.assert_array_equal(back.x, g.x)
        np.testing.assert_array_equal(back.bias, g.bias)


def test_empty():
    x = np.empty((0, 3, 4), np.float32)
    assert cbn.activate(x, "relu", bias=np.ones(3)).shape == x.shape
    np.testing.assert_array_equal(cbn.activate_backward(x, x, "relu", bias=np.ones(3)).bias, np.zeros(3))


def test_finite_differences():
    x, dy, residual, _, bias = draw((4, 3, 5), 1, np.float64)
    for activation in (*ACTIVATIONS, *SMOOTH):
        g = cbn.activate_backward(dy, x, activation, bias=bias, residual=residual)
        for c in range(3):
            step = np.eye(3)[c] * 1e-6
            loss = [(dy * cbn.activate(x, activation, bias=b, residual=residual)).sum() for b in (bias + step, bias - step)]
            np.testing.assert_allclose(g.bias[c], (loss[0] - loss[1]) / 2e-6, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"x": np.zeros(3, np.float32)}, ValueError, r"^x: expected at least 2 dimensions, one of them the channels, got shape \(3,\)"),
        ({"activation": "gelu"}, ValueError, "^activation: expected None, 'relu', .* got 'gelu'"),
        ({"bias": np.zeros(4)}, ValueError, r"^bias should contain 3 elements not 4: expected shape \(3,\), got \(4,\) \[x has shape \(2, 3\), axis=1\]"),
        ({"residual": np.zeros((3, 2), np.float32)}, ValueError, r"^residual: expected shape \(2, 3\), that of x, got \(3, 2\)"),
        ({"out": np.zeros((2, 3))}, TypeError, "^out: expected dtype float32, that of x, got float64"),
        ({"dy": np.zeros((2, 4), np.float32)}, ValueError, r"^dy: expected shape \(2, 3\), that of x, got \(2, 4\)"),
        ({"dy": np.zeros((2, 3))}, TypeError, "^dy: expected dtype float32, that of x, got float64"),
    ],
)
def test_wrong_arguments(wrong, error, message):
    arguments = {"x": np.zeros((2, 3), np.float32), "activation": "relu", "bias": None, "residual": None, "out": np.full((2, 3), 5, np.float32)} | wrong
    if "dy" not in wrong:
        with pytest.raises(error, match=message):
            cbn.activate(**arguments)
    with pytest.raises(error, match=message):
        cbn.activate_backward(**{"dy": np.zeros((2, 3), np.float32), **arguments})
    assert "out" in wrong or (arguments["out"] == 5).all()


def test_out_may_not_be_the_bias():
    a = np.zeros((2, 3), np.float32)
    for call in (lambda: cbn.activate(a.copy(), "relu", bias=a[0], out=a), lambda: cbn.activate_backward(a.copy(), a.copy(), "relu", bias=a[0], out=a)):
        with pytest.raises(ValueError, match="^out: expected memory of its own, got an array that overlaps bias"):
            call()
