"""Data in which rounding errors line up, or in which there are none: searches for the worst case, and sums that are exact."""

import numpy as np
import pytest
import reference
from reference import largest

import cbn

SHAPES = [((256, 512), 1), ((1024, 96), 1), ((49, 256), 1), ((3000, 48), 1), ((1000, 24), 1), ((64, 96, 9), 1), ((32, 48, 49), 1), ((8, 48, 196), 1),
          ((1, 48, 784), 1), ((2, 48, 3136), 1), ((1, 24, 20000), 1), ((9, 11, 7, 32), -1)]  # fmt: skip


def periods(rng, n):
    return rng.standard_normal(rng.choice([2, 3, 4, 5, 7, 8, 12, 16, 24, 32, 48, 49, 64, 100, 128, 196, 256, 512]))[:, None].repeat(n, 1).T.ravel()[:n]


def stripes(rng, n):
    return np.arange(n) // rng.integers(1, 200) % 2


def levels(rng, n):
    return np.repeat(rng.standard_normal(n), rng.integers(1, 200))[:n]


def ramp(rng, n):
    return np.arange(n) / n


def saw(rng, n):
    p = rng.integers(2, 300)
    return np.arange(n) % p / p


def ordered(rng, n):
    return np.sort(rng.standard_normal(n) if rng.random() < 0.5 else rng.exponential(size=n)) * rng.choice([-1, 1])


def constant_plus_one(rng, n):
    a = rng.random(n) < rng.choice([0.5, 0.3, 0.1])
    a[rng.integers(n)] = True
    return a


def two_values(rng, n):
    return np.where(rng.random(n) < rng.random(), 1, rng.standard_normal())


KINDS = [periods, stripes, levels, ramp, saw, ordered, constant_plus_one, two_values]


def regular(rng, shape, axis, dtype, kind):
    """Channels of a kind, of other sizes and offsets."""
    x = np.empty(shape, dtype)
    for channel in np.moveaxis(x, axis, 0):
        scale = 10 ** rng.uniform(-2, 2)
        offset = rng.choice([0, 1, 30, 1e3]) * rng.standard_normal()
        channel[...] = (scale * (kind(rng, channel.size) + offset)).astype(dtype).reshape(channel.shape)
    return x


def exact_train(x, axis):
    """The oracle's results and variances, about elements of x, so that offsets cost it no digits."""
    first = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)[:, 0]
    expected, _, var = reference.batch_norm_train(x.astype(np.longdouble) - reference.per_channel(first, x, axis), axis=axis)
    return expected, var


def check_training(x, axis, least_var):
    """To 4 units in the last place of a channel's largest result, and of the variance."""
    expected, var = exact_train(x, axis)
    y, stats = cbn.batch_norm_train(x, axis=axis)
    assert (abs(y - expected) <= 4 * np.spacing(largest(expected, axis).astype(x.dtype))).all()
    assert (abs(stats.var - var) <= least_var * var).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype, least_var", [(np.float32, 5e-7), (np.float64, 9e-16)], ids=["float32", "float64"])
def test_search(dtype, least_var, kind):
    rng = np.random.default_rng(11)
    for shape, axis in SHAPES:
        check_training(regular(rng, shape, axis, dtype, kind), axis, least_var)


def test_tiled_image():
    b = np.random.default_rng(37).standard_normal((8, 512)).astype("f")
    check_training(np.tile(b, (32, 1)), 1, 5e-7)


@pytest.mark.parametrize("offset", [0, 1e6, 1.7e7, 1e9, -1e12])
@pytest.mark.parametrize("shape, axis", SHAPES, ids=str)
def test_float64_at_any_offset(shape, axis, offset):
    check_training(np.random.default_rng(5).standard_normal(shape) + offset, axis, 9e-16)


def filled(shape, axis, dtype, bits):
    """As oneDNN's tests fill arrays: pairs of values of few bits around a mean that is a power of 2, and the mean itself where one is left over."""
    x = np.empty(shape, dtype)
    means = 0.25 * 2.0 ** (np.arange(shape[axis]) % 7)
    for mean, channel in zip(means, np.moveaxis(x, axis, 0), strict=True):
        i = np.arange(channel.size)
        f = np.where(i % 2, -1, 1) * (i // 2 * 1637 % 2**bits) / 2**bits
        f[-1 if channel.size % 2 else channel.size :] = 0
        channel[...] = (mean * (1 + f)).reshape(channel.shape)
    return x, means


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, "bfloat16"], ids=str)
@pytest.mark.parametrize("shape, axis", SHAPES + [((2, 17), 1), ((33, 5, 3), 1), ((700, 3), 1), ((5, 40, 1, 31), 1), ((65, 4, 4, 20), -1)], ids=str)
def test_exact_sums_give_exact_statistics(shape, axis, dtype, isa):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x, means = filled(shape, axis, dtype, 7 if dtype in (np.float32, np.float64) else 3)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    stats = cbn.batch_stats(x, axis=axis)
    np.testing.assert_array_equal(stats.mean, means)
    np.testing.assert_array_equal(stats.var, x.astype(np.longdouble).var(others).astype(np.float64))
    y, _ = cbn.batch_norm_train(x, axis=axis)
    at_mean = x.astype(np.float64) == np.expand_dims(means, others)
    assert (y[at_mean] == 0).all()
