"""NaN and infinity go where IEEE arithmetic takes them in the formula, and never from one channel to another."""

import numpy as np
import pytest
import reference

import cbn

LAYOUTS = [((3, 4, 5, 7), 1), ((5, 4), 1), ((3, 67, 29), 1), ((1, 3, 17_000), 1), ((1601, 3), -1), ((4, 40, 65), -1), ((2, 2100, 16), -1)]
POISON = {  # values by their index in the channel
    "nan first": {0: np.nan},
    "nan last": {-1: np.nan},
    "inf first": {0: np.inf},
    "-inf last": {-1: -np.inf},
    "inf and inf": {1: np.inf, -1: np.inf},
    "inf and -inf side by side": {0: np.inf, 1: -np.inf},
    "inf and -inf far apart": {0: np.inf, -1: -np.inf},
}

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the oracle


def same_special(actual, expected):
    """NaN where NaN is expected, and each infinity; finite numbers where finite ones are."""
    with np.errstate(over="ignore"):
        expected = expected.astype(actual.dtype)
    for of in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(of(actual), of(expected))


def others(a, axis, channel):
    """Everything but one channel."""
    return np.delete(a, channel, axis)


def data(shape, axis, dtype):
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    return x, dy, *rng.random((4, shape[axis])).astype(dtype)


def poisoned(a, axis, channel, poison):
    a = a.copy()
    values = np.moveaxis(a, axis, 0)[channel]
    for i, value in POISON[poison].items():
        values[np.unravel_index(i % values.size, values.shape)] = value
    return a


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("shape, axis", LAYOUTS, ids=str)
def test_in_the_input(shape, axis, poison, dtype, isa):
    clean, dy, mean, var, weight, bias = data(shape, axis, dtype)
    channel = shape[axis] - 2
    x = poisoned(clean, axis, channel, poison)

    y, st = cbn.batch_norm_train(x, weight, bias, axis=axis)
    y_clean, st_clean = cbn.batch_norm_train(clean, weight, bias, axis=axis)
    expected, *expected_st = reference.batch_norm_train(x, weight, bias, axis=axis)
    g = cbn.batch_norm_backward(dy, x, st, weight, bias, axis=axis)
    g_clean = cbn.batch_norm_backward(dy, clean, st_clean, weight, bias, axis=axis)
    expected_g = reference.batch_norm_backward(dy, x, st.mean, st.var, weight, axis=axis)
    z = cbn.batch_norm(x, mean, var, weight, bias, axis=axis)
    z_clean = cbn.batch_norm(clean, mean, var, weight, bias, axis=axis)
    frozen = cbn.batch_norm_backward(dy, x, (mean, var), weight, bias, axis=axis, training=False)
    frozen_clean = cbn.batch_norm_backward(dy, clean, (mean, var), weight, bias, axis=axis, training=False)

    for a, b in [(y, expected), (g.x, expected_g[0]), (z, reference.batch_norm(x, mean, var, weight, bias, axis=axis))]:
        same_special(a, b)
    for a, b in [(st.mean, expected_st[0]), (st.var, expected_st[1]), (g.weight, expected_g[1]), (g.bias, expected_g[2])]:
        same_special(a, b)
    same_special(frozen.weight, reference.batch_norm_backward(dy, x, mean, var, weight, axis=axis)[1])
    np.testing.assert_array_equal(frozen.x, frozen_clean.x)
    for a, b in [(y, y_clean), (g.x, g_clean.x), (z, z_clean)]:
        np.testing.assert_array_equal(others(a, axis, channel), others(b, axis, channel))
    for a, b in zip([*st[1:], *g[1:], *frozen[1:]], [*st_clean[1:], *g_clean[1:], *frozen_clean[1:]], strict=True):
        np.testing.assert_array_equal(others(a, 0, channel), others(b, 0, channel))
    assert (z != z_clean).sum() == len(POISON[poison])


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("shape, axis", LAYOUTS, ids=str)
def test_in_the_gradient(shape, axis, poison, isa):
    x, clean, mean, var, weight, _ = data(shape, axis, np.float32)
    channel = shape[axis] - 2
    dy = poisoned(clean, axis, channel, poison)
    for training in (True, False):
        g = cbn.batch_norm_backward(dy, x, (mean, var), weight, axis=axis, training=training)
        g_clean = cbn.batch_norm_backward(clean, x, (mean, var), weight, axis=axis, training=training)
        for a, b in zip(g, reference.batch_norm_backward(dy, x, mean, var, weight, axis=axis, training=training), strict=True):
            same_special(a, b)
        np.testing.assert_array_equal(others(g.x, axis, channel), others(g_clean.x, axis, channel))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["mean", "var", "weight", "bias"])
@pytest.mark.parametrize("shape, axis", LAYOUTS, ids=str)
def test_in_a_parameter_at_inference(shape, axis, name, value, isa):
    if name == "var" and value < 0:
        pytest.skip("a negative variance is an error")
    x, _, *parameters = data(shape, axis, np.float32)
    clean = cbn.batch_norm(x, *parameters, axis=axis)
    parameters[["mean", "var", "weight", "bias"].index(name)][1] = value
    y = cbn.batch_norm(x, *parameters, axis=axis)
    same_special(y, reference.batch_norm(x, *parameters, axis=axis))
    np.testing.assert_array_equal(others(y, axis, 1), others(clean, axis, 1))


@pytest.mark.parametrize("poison", POISON)
def test_running_statistics(poison):
    x, _, mean, var, _, _ = data((3, 4, 5, 7), 1, np.float32)
    x = poisoned(x, 1, 2, poison)
    expected = [reference.updated(a, b, 0.1) for a, b in zip((mean, var), reference.batch_stats(x))]
    before = mean.copy(), var.copy()
    cbn.batch_norm(x, mean, var, training=True)
    same_special(mean, expected[0])
    same_special(var, expected[1])
    assert (mean != before[0]).all() and (var != before[1]).all()
