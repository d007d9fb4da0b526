"""cbn.sklearn.Standardizer: scikit-learn's own checks, StandardScaler's results, and exactness where that loses it."""

import pickle

import numpy as np
import pytest

import cbn

sklearn = pytest.importorskip("sklearn", reason="the transformer is one of scikit-learn's")
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from cbn.sklearn import Standardizer


@parametrize_with_checks([Standardizer(), Standardizer(with_mean=False), Standardizer(with_std=False)])
def test_estimator(estimator, check):
    check(estimator)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8"])
@pytest.mark.parametrize("with_mean, with_std", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("seed", range(4))
def test_as_standard_scaler(seed, with_mean, with_std, dtype):
    """In one call or several, with constant features, with missing values."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(20, 6, (rng.integers(2, 50), rng.integers(1, 9))) * (rng.random() + 1)).astype(dtype)
    x[:, 0] = 3
    if x.dtype.kind == "f":
        x[rng.random(x.shape) < 0.1 * (seed % 3)] = np.nan
    parts = np.array_split(x, rng.integers(1, min(len(x), 5)))
    options = {"with_mean": with_mean, "with_std": with_std}
    theirs, ours, streamed = StandardScaler(**options).fit(x), Standardizer(**options).fit(x), Standardizer(**options)
    for part in parts:
        streamed.partial_fit(part)
    tolerance = {"float16": 5e-3, "float32": 1e-5}.get(dtype, 1e-12)
    for scaler in (ours, streamed):
        np.testing.assert_array_equal(scaler.n_samples_seen_, theirs.n_samples_seen_)
        if with_std:
            np.testing.assert_allclose(scaler.mean_, theirs.mean_, rtol=1e-6)
            np.testing.assert_allclose(scaler.var_, theirs.var_, rtol=1e-5, atol=1e-12)
            np.testing.assert_allclose(scaler.scale_, theirs.scale_, rtol=1e-5)
        else:
            assert scaler.scale_ is None
        z = scaler.transform(x)
        assert z.dtype == (dtype if x.dtype.kind == "f" else "float64")
        np.testing.assert_allclose(z, theirs.transform(x), rtol=tolerance, atol=5 * tolerance)
        np.testing.assert_allclose(scaler.inverse_transform(z), x, rtol=tolerance, atol=tolerance)


def test_far_from_zero():
    """Where a float32 mean, or a sum of squares, has no digits left (scikit-learn#12333)."""
    x = (np.random.default_rng(0).standard_normal((200_000, 2)) + [0.5, 1e6]).astype(np.float32)
    exact = x.astype(float)
    exact = (exact - exact.mean(0)) / exact.std(0)
    scaler = Standardizer()
    for part in np.array_split(x, 7):
        scaler.partial_fit(part)
    np.testing.assert_allclose(scaler.mean_, x.mean(0, dtype=float), rtol=1e-9)
    np.testing.assert_allclose(scaler.transform(x), exact, rtol=1e-5, atol=1e-6)


def test_long_streams_do_not_overflow():
    """Of values near float64's largest, no sum is kept (scikit-learn#5602)."""
    x = np.full((1000, 1), np.finfo(np.float64).max / 1e5)
    scaler = Standardizer()
    for _ in range(1000):
        scaler.partial_fit(x)
    assert scaler.mean_ == x[0] and scaler.var_ == 0 and scaler.n_samples_seen_ == 1_000_000
    assert not scaler.transform(x).any()


def test_batches_of_other_sizes_keep_the_variance():
    """A second batch much larger than the first (scikit-learn#16448), and samples one by one."""
    x = np.random.default_rng(0).normal(5, 2, (500, 3))
    for cuts in ([1], [3, 4], range(1, 500)):
        scaler = Standardizer()
        for part in np.split(x, cuts):
            scaler.partial_fit(part)
        np.testing.assert_allclose(scaler.var_, x.var(0), rtol=1e-12)


def test_constant_and_nearly_constant_features():
    """A constant is one exactly, whatever its value; a spread of some units in the last place is none (scikit-learn#17794)."""
    x = np.full((1000, 3), 14.62)
    x[:, 1] = 1e10 / 3
    x[::2, 2] = 14.62 * (1 + 2e-14)
    scaler = Standardizer().fit(x)
    assert (scaler.var_[:2] == 0).all() and (scaler.scale_[:2] == 1).all()
    z = scaler.transform(x)
    assert not z[:, :2].any()
    np.testing.assert_allclose(abs(z[:, 2]), 1, rtol=0.5)


def test_missing_values():
    """Are left out of the statistics and stay; a feature without any value stays without."""
    x = np.array([[1.0, np.nan, np.nan], [3.0, 4.0, np.nan], [5.0, 8.0, np.nan]])
    scaler = Standardizer().fit(x[:1]).partial_fit(x[1:])
    np.testing.assert_array_equal(scaler.n_samples_seen_, [3, 2, 0])
    np.testing.assert_array_equal(scaler.mean_, [3, 6, np.nan])
    np.testing.assert_allclose(scaler.var_, [8 / 3, 4, np.nan])
    np.testing.assert_array_equal(np.isnan(scaler.transform(x)), np.isnan(x))
    np.testing.assert_array_equal(scaler.transform(x)[1:, 1], [-1, 1])


def test_in_place():
    x = np.random.default_rng(0).normal(5, 2, (50, 3)).astype(np.float32)
    expected, before = Standardizer().fit_transform(x), x.copy()
    np.testing.assert_array_equal(x, before)
    scaler = Standardizer(copy=False).fit(x)
    assert scaler.transform(x) is x
    np.testing.assert_array_equal(x, expected)
    assert scaler.inverse_transform(x) is x
    np.testing.assert_allclose(x, before, rtol=1e-5, atol=1e-5)


def test_errors():
    x = np.random.default_rng(0).normal(5, 2, (50, 3))
    with pytest.raises(NotFittedError):
        Standardizer().transform(x)
    scaler = Standardizer().fit(x)
    mean = scaler.mean_
    for wrong, message in ((x[:, :2], "X has 2 features, but Standardizer is expecting 3"), (x + np.inf, "infinity"), (x[0], "Expected 2D")):
        for call in (scaler.transform, scaler.partial_fit, scaler.inverse_transform):
            with pytest.raises(ValueError, match=message):
                call(wrong)
    with pytest.raises(ValueError, match="X: expected features whose variance float64 has room for, got one beyond for feature 1"):
        scaler.partial_fit([[0, 1e200, 0]])
    assert scaler.mean_ is mean
    with pytest.raises(TypeError, match="[Ss]parse"):
        Standardizer().fit(pytest.importorskip("scipy.sparse").csr_array(x))


def test_copies_and_pickles():
    x = np.random.default_rng(0).normal(5, 2, (50, 3))
    scaler = Standardizer(with_mean=False).fit(x)
    for other in (pickle.loads(pickle.dumps(scaler)), clone(scaler).fit(x)):
        np.testing.assert_array_equal(other.transform(x), scaler.transform(x))


FRAME = {"length": [1.0, 2.0, 4.0], "width": [3.0, 3.0, 5.0], "count": [1, 2, 3]}


def test_pandas():
    """What goes in comes out, where that was asked for: columns, index, in a pipeline, too. cbn's functions return arrays."""
    pandas = pytest.importorskip("pandas", reason="the frames are pandas'")
    frame = pandas.DataFrame(FRAME, index=["a", "b", "c"])
    scaler = Standardizer().set_output(transform="pandas")
    z = scaler.fit_transform(frame)
    assert type(z) is pandas.DataFrame and list(z.columns) == list(frame.columns) and list(z.index) == list(frame.index)
    np.testing.assert_allclose(z, StandardScaler().fit_transform(frame), rtol=1e-12)
    assert list(scaler.feature_names_in_) == list(scaler.get_feature_names_out()) == list(frame.columns)
    pandas.testing.assert_frame_equal(make_pipeline(Standardizer()).set_output(transform="pandas").fit_transform(frame), z)
    with pytest.raises(ValueError, match="feature names should match"):
        scaler.transform(frame[["width", "length", "count"]])
    assert type(Standardizer().fit_transform(frame)) is np.ndarray
    y, stats = cbn.batch_norm_train(frame, eps=1e-12)
    assert type(y) is np.ndarray
    np.testing.assert_allclose(y, z, rtol=1e-9)
    np.testing.assert_allclose(cbn.batch_norm(frame, frame.mean(), frame.var(ddof=0), eps=1e-12), z, rtol=1e-9)


def test_polars():
    polars = pytest.importorskip("polars", reason="the frames are polars'")
    frame = polars.DataFrame(FRAME)
    z = Standardizer().set_output(transform="polars").fit_transform(frame)
    assert type(z) is polars.DataFrame and z.columns == frame.columns
    np.testing.assert_allclose(z.to_numpy(), StandardScaler().fit_transform(frame.to_numpy()), rtol=1e-12)
