"""Results stay within a few units in the last place where peers lose digits: large offsets, outliers, extreme sizes, constant channels."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import reference
from reference import check, largest

import cbn

LAYOUTS = [((64, 4, 8, 8), 1), ((64, 8, 8, 4), -1), ((3, 4, 7001), 1), ((20_003, 4), 1)]


def check_forward(x, axis, weight=None, bias=None, training_ulps=4):
    """Training and inference agree with the oracle: mean and var to 1e-6, y to a few ulp of its largest value."""
    expected, mean, var = reference.batch_norm_train(x, weight, bias, axis=axis)
    y, st = cbn.batch_norm_train(x, weight, bias, axis=axis)
    check(y, expected, largest(expected, axis), training_ulps)
    assert (abs(st.mean - mean) <= 1e-6 * np.maximum(abs(mean), np.sqrt(var))).all()
    assert (abs(st.var - var) <= 1e-6 * var).all()
    for dtype in (np.float32, np.float64):
        with np.errstate(over="ignore"):
            mean, var = st.mean.astype(dtype), st.var.astype(dtype)
        expected = reference.batch_norm(x, mean, var, weight, bias, axis=axis)
        check(cbn.batch_norm(x, mean, var, weight, bias, axis=axis), expected, largest(expected, axis), 4)


@pytest.mark.parametrize("offset", [0, 1e2, 1e4, 1e6, -1e6])
@pytest.mark.parametrize("shape, axis", LAYOUTS, ids=str)
def test_offsets(shape, axis, offset, isa):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) + offset).astype(np.float32)
    check_forward(x, axis)
    check_forward(x, axis, *rng.standard_normal((2, shape[axis])).astype(np.float32))


ORDINARY = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "after a ReLU": lambda rng, shape: np.maximum(rng.standard_normal(shape), 0),
    "uniform": lambda rng, shape: rng.random(shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape),
    "8-bit pixels": lambda rng, shape: rng.integers(0, 256, shape) / 255,
    "mostly zeros": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.1),
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("shape, axis", [((8, 500, 14, 14), 1), ((16, 500, 7, 7), 1), ((1, 500, 28, 28), 1), ((300, 1000), 1)], ids=str)
def test_ordinary_data(shape, axis, name):
    """In many channels, as one in hundreds may have an unlucky beginning."""
    check_forward(ORDINARY[name](np.random.default_rng(29), shape).astype(np.float32), axis)


def normal(n):
    return np.random.default_rng(1).standard_normal(n)


def with_outliers(where, value):
    def values(n):
        a = normal(n)
        a[where(n)] = value
        return a

    return values


def eighths(n):
    """Elements spread over the array, as a guess of the mean may be made of."""
    return np.arange(8) * (n // 8)


ADVERSARIAL = {
    "first is an outlier": with_outliers(lambda n: 0, 1e6),
    "first 8 are outliers": with_outliers(lambda n: np.arange(8), 1e6),
    "spread outliers": with_outliers(eighths, 1e6),
    "spread mild outliers": with_outliers(eighths, 3.9),
    "last is an outlier": with_outliers(lambda n: -1, -1e6),
    "sorted": lambda n: np.sort(normal(n)) + 100,
    "sorted downwards": lambda n: -np.sort(normal(n)) * 1e5,
    "a ramp": lambda n: np.arange(n) / 7,
    "zeros, then large": lambda n: np.where(np.arange(n) < n // 2, 0, 1e4 + normal(n)),
    "large, then zeros": lambda n: np.where(np.arange(n) < n // 2, 3e7, 0),
    "two values": lambda n: np.where(np.arange(n) % 2, 1.1237154, -1.1237154),
    "alternating": lambda n: np.where(np.arange(n) % 2, 1e4, -1e4) + normal(n),
    "nearly constant": lambda n: 1e6 + (np.arange(n) == n // 2),
    "all zeros but one": lambda n: 1.0 * (np.arange(n) == n - 1),
    "tiny": lambda n: 1e-30 * normal(n),
    "subnormal": lambda n: 1e-39 * normal(n),
    "huge": lambda n: 1e30 * normal(n),
    "near the largest": lambda n: 1e38 * np.sin(np.arange(n)),
    "exponents from -30 to 30": lambda n: normal(n) * 10.0 ** (np.arange(n) % 61 - 30),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("shape, axis", LAYOUTS, ids=str)
def test_adversarial_data(shape, axis, name, isa):
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    channel = np.moveaxis(x, axis, 0)[1]
    channel[...] = ADVERSARIAL[name](channel.size).astype(np.float32).reshape(channel.shape)
    check_forward(x, axis, training_ulps=12)  # 1e-6 of var is 8.4 ulp of y, where y is just below a power of 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0, 0.1, -3.7, 1e6, 1 / 3, 1e-40, 1e-30, 3e38])
@pytest.mark.parametrize("shape, axis", LAYOUTS + [((2, 5), 1), ((1, 3, 7), 1)], ids=str)
def test_a_constant_channel_becomes_its_bias(shape, axis, value, dtype, isa):
    rng = np.random.default_rng(3)
    x = rng.standard_normal(shape).astype(dtype)
    np.moveaxis(x, axis, 0)[1] = value
    weight, bias = rng.standard_normal((2, shape[axis])).astype(dtype)
    y, st = cbn.batch_norm_train(x, weight, bias, axis=axis)
    assert st.mean[1] == dtype(value) and st.var[1] == 0
    assert (np.moveaxis(y, axis, 0)[1] == bias[1]).all()
    if dtype == np.float32 and x.size > 100:
        check_forward(x, axis, weight, bias)


@pytest.mark.parametrize("scale", [1e-150, 1e-100, 1.0, 1e100, 1e150])
@pytest.mark.parametrize("shape, axis", LAYOUTS, ids=str)
def test_float64_range(shape, axis, scale):
    x = np.random.default_rng(4).standard_normal(shape) * scale
    mean, var = reference.batch_stats(x, axis)
    st = cbn.batch_stats(x, axis=axis)
    assert (abs(st.mean - mean) <= 1e-14 * np.sqrt(var)).all()
    assert (abs(st.var - var) <= 1e-14 * var).all()


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8, 9, 15])
def test_few_elements(count):
    """The shift is spread over all of them: where it was the first one, up to 13 units in the last place were lost."""
    rng = np.random.default_rng(count)
    x = (rng.standard_normal((count, 40000)) * rng.uniform(0.1, 3, 40000) + rng.uniform(-3, 3, 40000)).astype(np.float32)
    var = x.astype(np.float64).var(0)
    assert (abs(cbn.batch_stats(x).var - var) <= 6 * np.spacing(var.astype(np.float32))).all()


@pytest.mark.parametrize("rows", [8, 17, 34, 100])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_small_images_that_repeat(rows, size):
    """The shift is spread over the pixels, too: where it was made of first pixels alone, 10 units in the last place were lost."""
    rng = np.random.default_rng(rows)
    image = (rng.standard_normal((1, 4000, size)) * rng.uniform(0.1, 3, (1, 4000, 1)) + rng.uniform(-3, 3, (1, 4000, 1))).astype(np.float32)
    x = np.broadcast_to(image, (rows, 4000, size)).copy()
    var = x.astype(np.float64).var((0, 2))
    assert (abs(cbn.batch_stats(x).var - var) <= 6 * np.spacing(var.astype(np.float32))).all()


@pytest.mark.parametrize("shape, axis", [((20011, 100), 1), ((1501, 3, 44), 1), ((1, 5, 300001), 1), ((129, 7, 9, 64), -1)], ids=str)
def test_sums_of_equal_terms(shape, axis):
    """They round the same way each time: float64 totals keep what they lose."""
    rng = np.random.default_rng(0)
    dy = np.broadcast_to(rng.standard_normal([n if a == axis % len(shape) else 1 for a, n in enumerate(shape)]), shape).copy()
    x = np.broadcast_to(rng.standard_normal(dy.shape[axis]).reshape([-1 if a == axis % len(shape) else 1 for a in range(len(shape))]), shape)
    g = cbn.batch_norm_backward(dy, x, (np.zeros(shape[axis]), np.ones(shape[axis])), axis=axis, training=False, eps=0)
    others = tuple(a for a in range(len(shape)) if a != axis % len(shape))
    for actual, terms in ((g.bias, dy), (g.weight, dy * x)):
        expected = terms.astype(np.longdouble).sum(others)
        assert (abs(actual - expected) <= 4 * np.spacing(abs(expected).astype(np.float64))).all()


@pytest.mark.parametrize("shape, axis", [((6, 5), 1), ((6, 5, 40), 1), ((3, 5, 2000), 1), ((600, 70), 1), ((2, 3, 4), 2)])
@pytest.mark.parametrize("scale", [1e37, 1e38, 3.4e38])
def test_elements_further_apart_than_the_largest_float(shape, axis, scale, isa):
    """Their differences leave float32's range, the results don't."""
    rng = np.random.default_rng(int(scale / 1e36))
    x = (scale * rng.choice([-1, -0.5, 0.25, 1], shape)).astype(np.float32)
    y, stats = cbn.batch_norm_train(x, axis=axis)
    exact = x.astype(np.longdouble)
    others = tuple(i for i in range(x.ndim) if i != axis)
    exact = (exact - exact.mean(others, keepdims=True)) / np.sqrt(exact.var(others, keepdims=True) + 1e-5)
    assert abs(y - exact).max() <= 4 * np.spacing(np.float32(abs(exact).max()))
    np.testing.assert_array_equal(cbn.batch_norm(x, stats.mean, stats.var, axis=axis), y)


@pytest.mark.parametrize("shape, axis", [((6, 5, 8, 8), 1), ((600, 70), 1), ((700, 3), 1), ((9, 4, 3, 3), 1), ((2, 3, 4, 5), 2)])
@pytest.mark.parametrize("value", [0, 1e-30, 1e-44, 0.1, -3.7, 3e38])
def test_nearly_constant_channels(shape, axis, value, isa):
    """Of equal elements the variance is 0; of differences whose squares, or sums, float32 has no room for, it isn't."""
    x = np.full(shape, value, np.float32)
    stats = cbn.batch_stats(x, axis=axis)
    np.testing.assert_array_equal(stats.mean, np.full(shape[axis], np.float32(value), np.float64))
    np.testing.assert_array_equal(stats.var, 0)
    signs = np.resize([1, -1], shape)
    if shape[1] % 2:
        signs = np.resize([1, -1], shape[0]).reshape(-1, *[1] * (len(shape) - 1)) * np.ones(shape)
    for tiny in (1e-30, 1e-40):
        x = (tiny * signs).astype(np.float32)
        exact = x.astype(np.longdouble)
        others = tuple(i for i in range(x.ndim) if i != axis)
        stats = cbn.batch_stats(x, axis=axis)
        np.testing.assert_allclose(stats.var, exact.var(others).astype(np.float64), rtol=1e-6)
        np.testing.assert_allclose(stats.mean, exact.mean(others).astype(np.float64), atol=1e-6 * tiny)


def exactly(x, mean, var, weight, bias):
    with localcontext() as context:
        context.prec = 50
        x, mean, var, weight, bias = (Decimal(float(a)) for a in (x, mean, var, weight, bias))
        return (x - mean) * weight / (var + Decimal(1e-5)).sqrt() + bias


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_each_element_at_inference(dtype, layout, isa):
    """Within 3 units in its own last place, however small: the elements nearest to where the map is 0, and the largest, with bias that cancels, too."""
    rng = np.random.default_rng(41)
    c, n = 300, 48
    offset, scale = rng.choice([0, 1, 1e2, 1e4, 1e6], c) * rng.standard_normal(c), 10 ** rng.uniform(-3, 3, c)
    x = (rng.standard_normal((n, c)) * scale + offset).astype(dtype)
    mean, var = (offset + scale * rng.standard_normal(c) / 10).astype(dtype), (scale**2 * rng.uniform(0.5, 2, c)).astype(dtype)
    weight, bias = rng.standard_normal(c).astype(dtype), (rng.choice([0, 1, 1e3], c) * rng.standard_normal(c)).astype(dtype)
    within_bias = rng.random(c) < 0.3
    mean[within_bias], bias[within_bias] = 0, (-offset * weight / np.sqrt(var + 1e-5)).astype(dtype)[within_bias]
    if layout == "last":
        y = cbn.batch_norm(x, mean, var, weight, bias)
    else:
        y = cbn.batch_norm(x.T.copy()[None], mean, var, weight, bias)[0].T
    for j in range(c):
        for i in np.argsort(abs(y[:, j]))[[0, 1, -1]]:
            exact = exactly(x[i, j], mean[j], var[j], weight[j], bias[j])
            assert abs(Decimal(float(y[i, j])) - exact) <= 3 * Decimal(float(np.spacing(abs(dtype(exact))))), (i, j)
