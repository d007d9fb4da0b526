"""BatchStats: statistics of several batches merge into those of all values, and give the unbiased variance."""

import pickle

import numpy as np
import pytest

import cbn


@pytest.mark.parametrize("sizes", [(3, 4), (1, 1), (0, 5), (5, 0), (2, 3, 1, 0, 9)], ids=str)
@pytest.mark.parametrize("offset", [0, 1e6])
def test_merge(sizes, offset):
    batches = [np.random.default_rng(n).normal(n + offset, 1 + n, (n, 3, 5)) for n in sizes]
    stats = [cbn.batch_stats(x) for x in batches]
    merged = stats[0]
    for other in stats[1:]:
        merged = merged.merge(other)
    expected = cbn.batch_stats(np.concatenate(batches))
    assert merged.count == expected.count == 5 * sum(sizes)
    np.testing.assert_allclose(merged.mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(merged.var, expected.var, rtol=1e-9)


def test_merging_nothing():
    empty = cbn.batch_stats(np.ones((0, 3)))
    merged = empty.merge(empty)
    assert merged.count == 0 and np.isnan(merged.mean).all() and np.isnan(merged.var).all()


def test_wrong_merge():
    with pytest.raises(ValueError, match="^other: expected statistics of 3 channels, got 4"):
        cbn.batch_stats(np.ones((2, 3))).merge(cbn.batch_stats(np.ones((2, 4))))


def test_unbiased_variance():
    x = np.random.default_rng(27).standard_normal((4, 3, 5))
    st = cbn.batch_stats(x)
    np.testing.assert_allclose(st.unbiased_var, x.var((0, 2), ddof=1), rtol=1e-12)
    assert np.isnan(cbn.batch_stats(x[:1, :, :1]).unbiased_var).all()


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("stored", [np.float32, np.float64])
@pytest.mark.parametrize("shape, axis", [((6, 17, 5), 1), ((40, 17), 1), ((2, 3, 4, 17), -1), ((1, 3, 20_005), 1), ((2, 3), 1)], ids=str)
def test_the_variance_that_is_tracked(shape, axis, stored, unbiased, isa):
    """To the bit what float64 makes of the batch's, in functions and layers."""
    rng = np.random.default_rng(29)
    layer = cbn.BatchNorm(shape[axis], momentum=0.3, axis=axis, unbiased=unbiased, stats_dtype=stored)
    var = layer.running_var.copy()
    for x in rng.normal(2, 3, (3, *shape)).astype(np.float32):
        st = cbn.batch_stats(x, axis=axis)
        tracked = st.var * (st.count / (st.count - 1)) if unbiased else st.var
        expected = ((1 - 0.3) * var.astype(np.float64) + 0.3 * tracked).astype(stored)
        cbn.batch_norm(x, layer.running_mean.copy(), var, training=True, momentum=0.3, axis=axis, unbiased=unbiased)
        layer(x)
        np.testing.assert_array_equal(var, expected)
        np.testing.assert_array_equal(layer.running_var, expected)


def test_is_a_named_tuple():
    count, mean, var = st = cbn.batch_stats(np.random.default_rng(28).standard_normal((4, 3, 5)))
    assert (count, mean is st.mean, var is st.var) == (20, True, True)
    other = pickle.loads(pickle.dumps(st))
    assert type(other) is cbn.BatchStats
    np.testing.assert_array_equal(other.var, var)
