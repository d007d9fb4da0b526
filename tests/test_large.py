"""Arrays of more than 2**31 elements. They take up to 10 GB and a minute or two each, so only with CBN_TEST_LARGE=1 in the environment."""

import os

import numpy as np
import pytest

import cbn

pytestmark = pytest.mark.skipif(os.environ.get("CBN_TEST_LARGE") != "1", reason="needs 10 GB of memory: CBN_TEST_LARGE=1")

PERIOD = 4096


def fill(a, pattern):
    """Repeat a pattern of PERIOD rows (or elements) along the first axis; returns a."""
    whole = len(a) // PERIOD * PERIOD
    a[:whole].reshape(-1, *pattern.shape)[...] = pattern
    a[whole:] = pattern[: len(a) - whole]
    return a


def check(a, pattern):
    for i in range(0, len(a), 1024 * PERIOD):
        block = a[i : i + 1024 * PERIOD]
        whole = len(block) // PERIOD * PERIOD
        assert (block[:whole].reshape(-1, *pattern.shape) == pattern).all()
        np.testing.assert_array_equal(block[whole:], pattern[: len(block) - whole])


def test_statistics_of_one_channel_of_bytes():
    x = np.full((1, 1, 2**31 + 12345), 3, np.uint8)
    x[..., -1000:] = 200
    stats = cbn.batch_stats(x)
    share = 1000 / x.size
    assert stats.count == x.size
    np.testing.assert_allclose(stats.mean, 3 + 197 * share, rtol=1e-12)
    np.testing.assert_allclose(stats.var, 197**2 * share * (1 - share), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_inference_in_place_channels_first(dtype):
    x = np.empty((2, 2, 2**29 + 12345), dtype)
    assert x.size > 2**31
    pattern = (np.arange(PERIOD) - 2000).astype(dtype)
    for plane in x.reshape(4, -1):
        fill(plane, pattern)
    cbn.batch_norm(x, np.array([1, 2.0]), np.array([1, 4.0]), eps=0.0, activation="relu", out=x)
    for n in range(2):
        check(x[n, 0], np.maximum(pattern - dtype(1), 0).astype(dtype))
        check(x[n, 1], np.maximum((pattern - dtype(2)) * dtype(0.5), 0).astype(dtype))


@pytest.mark.parametrize("channels", [1, 64])
def test_training_and_backward_in_place_channels_last(channels):
    pattern = np.random.default_rng(81).standard_normal((PERIOD, channels)).astype(np.float16)
    x = fill(np.empty(((2**31 // channels) + 12345, channels), np.float16), pattern)
    dy = fill(np.empty_like(x), pattern[::-1])
    stats = cbn.batch_stats(x)
    weights = np.bincount(np.arange(12345 % PERIOD), minlength=PERIOD)[:, None] + len(x) // PERIOD      # how often each row occurs
    mean = (pattern.astype(float) * weights).sum(0) / len(x)
    np.testing.assert_allclose(stats.mean, mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(stats.var, ((pattern.astype(float) - mean) ** 2 * weights).sum(0) / len(x), rtol=1e-6)
    g = cbn.batch_norm_backward(dy, x, stats, out=dy)
    xhat, gradient = (pattern.astype(float) - stats.mean) / np.sqrt(stats.var + 1e-5), pattern[::-1].astype(float)
    np.testing.assert_allclose(g.bias, (gradient * weights).sum(0), rtol=0, atol=1e-6 * len(x))
    np.testing.assert_allclose(g.weight, (gradient * xhat * weights).sum(0), rtol=0, atol=1e-6 * len(x))
    dx = (gradient - g.bias / len(x) - xhat * (g.weight / len(x))) / np.sqrt(stats.var + 1e-5)
    rows = [0, 5, len(x) // 2, 2**31 // channels + 77, len(x) - 1]
    np.testing.assert_allclose(dy[rows].astype(float), dx[[row % PERIOD for row in rows]], rtol=1e-3, atol=2e-3)
    y, _ = cbn.batch_norm_train(x, out=x)
    np.testing.assert_allclose(y[rows].astype(float), xhat[[row % PERIOD for row in rows]], rtol=1e-3, atol=2e-3)
