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


def test_is_a_named_tuple():
    count, mean, var = st = cbn.batch_stats(np.random.default_rng(28).standard_normal((4, 3, 5)))
    assert (count, mean is st.mean, var is st.var) == (20, True, True)
    other = pickle.loads(pickle.dumps(st))
    assert type(other) is cbn.BatchStats
    np.testing.assert_array_equal(other.var, var)
