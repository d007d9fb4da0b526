"""A batch in parts: the statistics and the sums of each, merged, give every part what one call on all of it gives."""

import ctypes
import functools

import numpy as np
import pytest
from test_native import address, function_type

import cbn

ACTIVATIONS = [None, "relu", "relu6", ("clip", -0.5, 0.75), ("leaky_relu", 0.1), "hard_swish", "sigmoid", "silu"]
LAYOUTS = [((24, 5, 6, 7), 1), ((30, 70), 1), ((40, 3), 1), ((18, 4, 3, 9), -1), ((20, 6, 2, 2), 1)]


def cuts(rng, n, parts):
    """Any cut of n samples, empty parts included."""
    return [0, *sorted(rng.integers(0, n + 1, parts - 1)), n]


def tolerance(dtype):
    return {"rtol": 0, "atol": 1e-12 if dtype == np.float64 else 4e-6}


def in_parts(parts, weight, bias, axis, activation):
    """(y, dx, residual gradients) of each part, and the weight and bias gradients of all."""
    stats = functools.reduce(cbn.BatchStats.merge, [cbn.batch_stats(x, axis=axis) for x, _, _ in parts])
    fused = {"axis": axis, "activation": activation}
    ys = [cbn.batch_norm_train(x, weight, bias, stats=stats, residual=r, **fused)[0] for x, _, r in parts]
    sums = [cbn.gradient_sums(dy, x, stats, weight, bias, residual=r, **fused) for x, dy, r in parts]
    sums = functools.reduce(cbn.GradientSums.merge, sums)
    return ys, [cbn.batch_norm_backward(dy, x, stats, weight, bias, residual=r, sums=sums, **fused) for x, dy, r in parts], sums


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape, axis", LAYOUTS, ids=str)
def test_parts_equal_the_whole(shape, axis, activation, dtype, with_residual, isa):
    rng = np.random.default_rng(91)
    x, dy, residual = rng.standard_normal((3, *shape)).astype(dtype)
    residual = residual if with_residual else None
    weight, bias = (1 + rng.standard_normal((2, shape[axis])) / 4).astype(dtype)
    fused = {"axis": axis, "activation": activation, "residual": residual}
    y, stats = cbn.batch_norm_train(x, weight, bias, **fused)
    whole = cbn.batch_norm_backward(dy, x, stats, weight, bias, **fused)
    for parts in (1, 2, 5):
        at = cuts(rng, shape[0], parts)
        pieces = [(x[i:j], dy[i:j], residual[i:j] if with_residual else None) for i, j in zip(at, at[1:], strict=False)]
        ys, gradients, sums = in_parts(pieces, weight, bias, axis, activation)
        np.testing.assert_allclose(np.concatenate(ys), y, **tolerance(dtype))
        np.testing.assert_allclose(np.concatenate([g.x for g in gradients]), whole.x, **tolerance(dtype))
        if with_residual:
            np.testing.assert_allclose(np.concatenate([g.residual for g in gradients]), whole.residual, **tolerance(dtype))
        for g in gradients:
            np.testing.assert_array_equal(g.weight, sums.dy_xhat.astype(dtype))
            np.testing.assert_array_equal(g.bias, sums.dy.astype(dtype))
        scale = np.sqrt(x.size / shape[axis]) * (1 if dtype == np.float64 else 2)
        np.testing.assert_allclose(gradients[0].weight, whole.weight, rtol=0, atol=scale * tolerance(dtype)["atol"])
        np.testing.assert_allclose(gradients[0].bias, whole.bias, rtol=0, atol=scale * tolerance(dtype)["atol"])


@pytest.mark.parametrize("dtype", [np.float16, np.uint8])
def test_other_types(dtype):
    rng = np.random.default_rng(92)
    x = rng.integers(0, 200, (12, 4, 5, 5)).astype(dtype)
    dy = rng.standard_normal(x.shape).astype(np.float16 if dtype == np.float16 else np.float32)
    y, stats = cbn.batch_norm_train(x)
    whole = cbn.batch_norm_backward(dy, x, stats)
    ys, gradients, _ = in_parts([(x[:3], dy[:3], None), (x[3:], dy[3:], None)], None, None, 1, None)
    np.testing.assert_allclose(np.concatenate(ys), y, atol=2e-3)
    np.testing.assert_allclose(np.concatenate([g.x for g in gradients]), whole.x, atol=1e-2 if dtype == np.float16 else 1e-6)


def test_one_part_is_the_whole_to_the_bit():
    """In float32: the sums are float64 both times."""
    rng = np.random.default_rng(93)
    x, dy = rng.standard_normal((2, 9, 33, 8, 8)).astype("f")
    weight = rng.standard_normal(33)
    y, stats = cbn.batch_norm_train(x, weight)
    whole = cbn.batch_norm_backward(dy, x, stats, weight)
    sums = cbn.gradient_sums(dy, x, stats, weight)
    part = cbn.batch_norm_backward(dy, x, stats, weight, sums=sums)
    for one, other in zip((cbn.batch_norm_train(x, weight, stats=stats)[0], *part), (y, *whole), strict=True):
        np.testing.assert_array_equal(one, other)
    out = dy.copy()
    assert cbn.batch_norm_backward(out, x, stats, weight, sums=sums, out=out).x is out
    np.testing.assert_array_equal(out, whole.x)


def test_a_part_of_one_value():
    x = np.float32([[1], [5]])
    stats = cbn.batch_stats(x[:1]).merge(cbn.batch_stats(x[1:]))
    np.testing.assert_allclose(cbn.batch_norm_train(x[:1], stats=stats)[0], [[-1]], atol=1e-5)


X, DY = np.ones((4, 3, 2), "f"), np.ones((4, 3, 2), "f")
STATS = cbn.BatchStats(16, np.zeros(3), np.ones(3))


@pytest.mark.parametrize("call, error, message", [
    (lambda: cbn.batch_norm_train(X, stats=(np.zeros(3), np.ones(3))), TypeError, "stats: expected the BatchStats of all parts of the batch, got tuple"),
    (lambda: cbn.batch_norm_train(X, stats=STATS._replace(count=7)), ValueError, "stats.count: expected at least 8, the values per channel of x"),
    (lambda: cbn.batch_norm_train(X, stats=STATS._replace(mean=None)), TypeError, "stats.mean: expected an array of shape"),
    (lambda: cbn.batch_norm_train(X, stats=STATS, eps=0), ValueError, "eps"),
    (lambda: cbn.batch_norm_train(X, stats=STATS._replace(var=np.ones(4))), ValueError, "3"),
    (lambda: cbn.gradient_sums(DY[:2], X, STATS), ValueError, "dy: expected shape"),
    (lambda: cbn.gradient_sums(DY, X, STATS._replace(count=7)), ValueError, "stats.count: expected at least 8"),
    (lambda: cbn.gradient_sums(DY, X, STATS._replace(count=8.5)), TypeError, "stats.count"),
    (lambda: cbn.gradient_sums(DY, X, STATS._replace(var=-np.ones(3))), ValueError, "stats.var"),
    (lambda: cbn.batch_norm_backward(DY, X, STATS), ValueError, "need the sums of all parts"),
    (lambda: cbn.batch_norm_backward(DY, X, STATS, sums=(np.zeros(3), np.zeros(3))), TypeError, "sums: expected GradientSums, got tuple"),
    (lambda: cbn.batch_norm_backward(DY, X, STATS, sums=cbn.GradientSums(np.zeros(3), np.zeros(2))), ValueError, "sums.dy_xhat"),
    (lambda: cbn.batch_norm_backward(DY, X, STATS, training=False, sums=cbn.GradientSums(np.zeros(3), np.zeros(3))), ValueError, "sums: expected None"),
    (lambda: cbn.GradientSums(np.zeros(3), np.zeros(3)).merge((np.zeros(3), np.zeros(3))), TypeError, "other: expected GradientSums, got tuple"),
    (lambda: cbn.GradientSums(np.zeros(3), np.zeros(3)).merge(cbn.GradientSums(np.zeros(4), np.zeros(4))), ValueError, "of 3 channels, got 4"),
    (lambda: cbn.GradientSums(np.zeros(3), np.zeros(3)).merge(cbn.GradientSums(np.zeros(3), None)), TypeError, "other.dy_xhat: expected an array"),
])  # fmt: skip
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_from_c():
    """The halves give the bits of those for Python, and answer wrong arguments."""
    rng = np.random.default_rng(94)
    x, dy, residual = rng.standard_normal((3, 6, 5, 40)).astype("f")
    weight, bias = rng.standard_normal((2, 5)).astype("f")
    stats = cbn.batch_stats(x).merge(cbn.batch_stats(dy))
    fused = {"activation": "relu", "residual": residual}
    expected = cbn.gradient_sums(dy, x, stats, weight, bias, **fused)
    functions = {name: function_type(name, ctypes.c_void_p)(address(name)) for name in ("gradient_sums", "backward_by_sums")}

    def at(a):
        return a.ctypes.data

    sums, products, dx, back = np.empty(5), np.empty(5), np.empty_like(x), np.empty_like(x)
    arrays = [at(dy), at(x), at(residual), 4, at(weight), at(bias), at(stats.mean), at(stats.var), at(sums), at(products)]
    assert functions["gradient_sums"](4, 6, 5, 40, *arrays, 1e-5, 1, 0, 0, 0) == 0
    np.testing.assert_array_equal(sums, expected.dy)
    np.testing.assert_array_equal(products, expected.dy_xhat)
    assert functions["gradient_sums"](4, 6, 5, 40, *arrays, 0, 1, 0, 0, 0) == 15
    assert functions["gradient_sums"](4, 6, 5, 40, *arrays[:8], None, at(products), 1e-5, 1, 0, 0, 0) == 13
    g = cbn.batch_norm_backward(dy, x, stats, weight, bias, sums=expected, **fused)
    arrays = [at(dy), at(x), at(residual), at(dx), at(back), 4, at(weight), at(bias), at(stats.mean), at(stats.var)]
    assert functions["backward_by_sums"](4, 6, 5, 40, *arrays, stats.count, at(sums), at(products), 1e-5, 1, 0, 0, 0) == 0
    np.testing.assert_array_equal(dx, g.x)
    np.testing.assert_array_equal(back, g.residual)
    assert functions["backward_by_sums"](4, 6, 5, 40, *arrays, 239, at(sums), at(products), 1e-5, 1, 0, 0, 0) == 15
    assert functions["backward_by_sums"](4, 6, 5, 40, *arrays, 240, None, at(products), 1e-5, 1, 0, 0, 0) == 16
