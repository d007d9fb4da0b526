"""Dask arrays: any cut into chunks gives what cbn gives of the whole, with every scheduler, lazily, and without keeping what was read."""

import pathlib
import subprocess
import sys
import weakref

import numpy as np
import pytest
import reference
from calls import ACTIVATIONS, bfloat16
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import FOLDER

import cbn

dask = pytest.importorskip("dask", reason="needs Dask: pip install '.[dask]'")
da = pytest.importorskip("dask.array", reason="needs Dask: pip install '.[dask]'")
distributed = pytest.importorskip("distributed", reason="needs Dask: pip install 'dask[distributed]'")
import cbn.dask

DTYPES = np.float32, np.float64, np.float16, bfloat16, np.int8, np.uint8, np.int16, np.uint16, np.dtype(">f4")


@pytest.fixture(autouse=True)
def in_this_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module")
def client():
    with distributed.LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0") as cluster, distributed.Client(cluster) as client:
        yield client


def same(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def values(rng, shape, dtype):
    return (rng.normal(30, 8, shape)).astype(dtype)


def parameters(rng, channels):
    mean, weight, bias = rng.normal(30, 8, (3, channels))
    return mean, rng.uniform(0.5, 90, channels), weight, bias


@st.composite
def cut_arrays(draw):
    """(shape, chunks, axis): the lengths of the chunks of each axis, which may be 0, add up to its length."""
    chunks = tuple(tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))) for _ in range(draw(st.integers(2, 4))))
    return tuple(map(sum, chunks)), chunks, draw(st.integers(-len(chunks), len(chunks) - 1))


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(cut_arrays(), st.sampled_from(DTYPES), st.sampled_from([None, *ACTIVATIONS]), st.booleans(), st.tuples(*[st.booleans()] * 4))
def test_any_cut(cut, dtype, activation, with_residual, lazy):
    shape, chunks, axis = cut
    rng = np.random.default_rng(101)
    x = values(rng, shape, dtype)
    residual = values(rng, shape, np.float32 if x.dtype.kind in "iu" else dtype) if with_residual else None
    given = parameters(rng, shape[axis])
    mixed = [da.from_array(p, 2) if one else p for p, one in zip(given, lazy, strict=True)]
    fused = {"axis": axis, "activation": activation}
    cut_residual = da.from_array(residual, chunks) if with_residual else None
    y = cbn.dask.batch_norm(da.from_array(x, chunks), *mixed, residual=cut_residual, **fused)
    assert y.chunks == chunks
    same(y.compute(), cbn.batch_norm(x, *given, residual=residual, **fused))
    assert y.dtype == y.compute().dtype


def check_stats(stats, x, axis):
    """To rounding: of float64, or of what a chunk is summed in."""
    wide = x.dtype == np.float64
    assert type(stats) is cbn.BatchStats and stats.count == np.delete(x.shape, axis).prod()
    assert stats.mean.dtype == stats.var.dtype == np.float64
    if stats.count:
        mean, var = reference.batch_stats(x, axis)
        np.testing.assert_allclose(stats.mean, mean.astype(float), rtol=1e-14 if wide else 1e-6)
        np.testing.assert_allclose(stats.var, var.astype(float), rtol=1e-9 if wide else 1e-5, atol=1e-9 if wide else 1e-5)
    else:
        assert np.isnan(stats.mean).all() and np.isnan(stats.var).all()


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(cut_arrays(), st.sampled_from(DTYPES), st.sampled_from([0, 1e6]))
def test_statistics_of_any_cut(cut, dtype, offset):
    shape, chunks, axis = cut
    x = values(np.random.default_rng(102), shape, dtype)
    if dtype == np.float64:
        x += offset
    check_stats(cbn.dask.batch_stats(da.from_array(x, chunks), axis=axis).compute(), x, axis)


def test_statistics_of_no_channels():
    assert cbn.dask.batch_stats(da.zeros((5, 0, 2), dtype="f")).compute().mean.shape == (0,)


def test_same_bits_everywhere(client):
    """Whatever computes them, in whatever order, and wherever its chunks lie: here in x, there in copies."""
    rng = np.random.default_rng(104)
    x = da.from_array(values(rng, (40, 6, 9, 5), np.float32), (3, 4, 9, 2))
    lazy = cbn.dask.batch_stats(x)
    lazy = cbn.dask.batch_norm(x, lazy.mean, lazy.var), lazy
    y, stats = dask.compute(*lazy)
    schedulers = [{"scheduler": "threads", "num_workers": n} for n in (1, 2, 7)]
    for how in [*schedulers, {"scheduler": "processes", "num_workers": 2}, {"scheduler": client}, {"scheduler": client}]:
        again, others = dask.compute(*lazy, **how)
        same(again, y)
        same(others.mean, stats.mean)
        same(others.var, stats.var)
    with dask.config.set(split_every=1000):
        same(cbn.dask.batch_stats(x).compute().var, stats.var)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_types_on_a_cluster(client, dtype):
    rng = np.random.default_rng(105)
    x = values(rng, (8, 5, 3), dtype)
    given = parameters(rng, 5)
    lazy = da.from_array(x, (3, 2, 3))
    y, stats = client.compute(cbn.dask.batch_norm(lazy, *given)), client.compute(cbn.dask.batch_stats(lazy))
    same(y.result(), cbn.batch_norm(x, *given))
    check_stats(stats.result(), x, 1)


class Watched(np.ndarray):
    """An array that weak references can be made to, as to find out how long it lives."""


@pytest.mark.parametrize("source", ["blocks", "delayed"])
def test_nothing_is_kept(source):
    """Of 64 chunks no more than a few are there at once, and each pass reads each once."""
    alive, most, reads = set(), 0, 0

    def read():
        nonlocal most, reads
        chunk = np.ones((2, 3, 4), "f").view(Watched)
        reads += 1
        alive.add(reads)
        weakref.finalize(chunk, alive.discard, reads)
        most = max(most, len(alive))
        return chunk

    if source == "blocks":
        x = da.map_blocks(read, chunks=((2,) * 64, 3, 4), dtype="f", meta=np.empty((0, 0, 0), "f"))
    else:
        x = da.concatenate([da.from_delayed(dask.delayed(read, pure=False)(), (2, 3, 4), "f") for _ in range(64)])
    stats = cbn.dask.batch_stats(x).compute()
    assert reads == 64
    assert cbn.dask.batch_norm(x, stats.mean, stats.var, activation="relu").sum().compute() == 0
    assert reads == 128
    assert 1 <= most <= 8


def test_chunks_of_unknown_sizes():
    x = values(np.random.default_rng(106), (40, 3, 5), np.float32)
    chosen = x[:, 0, 0] > 30
    unknown = da.from_array(x, (7, 2, 5))[da.from_array(chosen, 7)]
    assert np.isnan(unknown.shape[0])
    stats = cbn.dask.batch_stats(unknown).compute()
    check_stats(stats, x[chosen], 1)
    same(cbn.dask.batch_norm(unknown, *stats[1:], residual=unknown).compute(), cbn.batch_norm(x[chosen], *stats[1:], residual=x[chosen]))
    turned = unknown.T
    check_stats(cbn.dask.batch_stats(turned[:, 1:]).compute(), x[chosen].T[:, 1:], 1)
    with pytest.raises(ValueError, match=r"^x: expected a known number of channels, got shape \(5, 3, nan\) \[axis=2\]"):
        cbn.dask.batch_norm(turned, np.zeros(3), np.ones(3), axis=2)
    with pytest.raises(ValueError, match=r"^weight: expected shape \(3,\), got \(nan,\): see weight\.compute_chunk_sizes"):
        cbn.dask.batch_norm(unknown, np.zeros(3), np.ones(3), unknown[:, 0, 0])
    with pytest.raises(ValueError, match=r"^residual: expected a dask array, as x has chunks of unknown size, got shape \(40, 3, 5\)"):
        cbn.dask.batch_norm(unknown, np.zeros(3), np.ones(3), residual=x)
    with pytest.raises(ValueError, match=r"residual: expected shape"):
        cbn.dask.batch_norm(unknown, np.zeros(3), np.ones(3), residual=da.from_array(x, (7, 2, 5))[da.from_array(~chosen, 7)]).compute()


def test_statistics_are_lazy_in_all_that_they_do():
    x = values(np.random.default_rng(107), (30, 4, 5), np.float64)
    first, second = (cbn.dask.batch_stats(da.from_array(part, 3)) for part in (x[:11], x[11:]))
    check_stats(first.merge(second).compute(), x, 1)
    np.testing.assert_allclose(first.unbiased_var.compute(), x[:11].var((0, 2), ddof=1))
    count, mean, var = first
    same(cbn.dask.batch_norm(da.from_array(x, 7), mean, var).compute(), cbn.batch_norm(x, *dask.compute(mean, var)))
    assert count.compute() == 55
    assert cbn.dask.batch_stats(da.from_array(x, 3)).key == cbn.dask.batch_stats(da.from_array(x, 3)).key


def test_other_forms_of_arguments():
    """Lists, rows of shape (1, C), whole residuals."""
    x = values(np.random.default_rng(108), (6, 3, 5), np.float32)
    mean, var = [30.0, 31.0, 32.0], np.full((1, 3), 9, np.float16)
    y = cbn.dask.batch_norm(da.from_array(x, (2, 2, 5)), mean, da.from_array(var, (1, 2)), residual=x)
    same(y.compute(), cbn.batch_norm(x, mean, var, residual=x))


def must_not_run():
    raise AssertionError("computed before it was asked for")


X = da.map_blocks(must_not_run, chunks=((4, 4), (2, 1), (5,)), dtype="f", meta=np.empty((0, 0, 0), "f"))
ZEROS, ONES = np.zeros(3), np.ones(3)
norm, stats_of = cbn.dask.batch_norm, cbn.dask.batch_stats


@pytest.mark.parametrize("call, error, message", [
    (lambda: stats_of(np.ones((2, 3))), TypeError, "x: expected a dask array, got ndarray"),
    (lambda: stats_of(X, axis=3), ValueError, r"axis: expected -3 to 2 for x of shape \(8, 3, 5\), got 3"),
    (lambda: stats_of(X, axis=1.0), TypeError, "axis: expected an integer"),
    (lambda: stats_of(X[:, 0, 0]), ValueError, r"x: expected at least 2 dimensions, .*\(8,\)"),
    (lambda: stats_of(X.astype(complex)), TypeError, "x: expected an array of float16, .* got complex128"),
    (lambda: stats_of(X.astype(np.int64)), TypeError, "x: expected an array of float16, .* got int64"),
    (lambda: stats_of(da.ma.masked_greater(X, 1)), TypeError, "x: expected a plain NumPy array, got MaskedArray"),
    (lambda: norm(X, ZEROS, np.ones(4)), ValueError, r"running_var should contain 3 .*\(4,\) \[x has shape \(8, 3, 5\), axis=1\]"),
    (lambda: norm(X, da.zeros(4), ONES), ValueError, r"running_mean should contain 3 elements not 4.*\[x has shape \(8, 3, 5\), axis=1\]"),
    (lambda: norm(X, ZEROS, ONES, da.zeros(3, dtype=complex)), TypeError, "weight: expected an array of real numbers, got complex128"),
    (lambda: norm(X, ZEROS, -ONES), ValueError, "running_var: expected non-negative values, got -1.0 for channel 0"),
    (lambda: norm(X, ZEROS, None), ValueError, "running_mean and running_var must either both be None or neither"),
    (lambda: norm(X, None, None), ValueError, "running_mean must be defined"),
    (lambda: norm(X, ZEROS, ONES, eps=-1), ValueError, "batch_norm eps must be non-negative"),
    (lambda: norm(X, ZEROS, ONES, activation="tanh"), ValueError, "activation: expected None, 'relu', .* got 'tanh'"),
    (lambda: norm(X, ZEROS, ONES, residual=X[1:]), ValueError, r"residual: expected shape \(8, 3, 5\), that of x, got \(7, 3, 5\)"),
    (lambda: norm(X, ZEROS, ONES, residual=X.rechunk(5)), ValueError, r"residual: expected the chunks of x, got others on axes \[0, 1\]: see"),
    (lambda: norm(X, ZEROS, ONES, residual=X.astype(float)), TypeError, "residual: expected dtype float32, that of x, got float64"),
    (lambda: norm(X, ZEROS, ONES, residual=dask.delayed(1)), TypeError, "residual: expected an array, got Delayed"),
])  # fmt: skip
def test_mistakes_are_found_at_once(call, error, message):
    with pytest.raises(error, match="^" + message):
        call()


def test_mistakes_that_only_computing_shows():
    x = da.zeros((4, 3, 2), chunks=(2, 2, 2), dtype="f")
    for wrong in (cbn.dask.batch_stats(da.zeros((9, 4))).mean, dask.delayed(np.zeros)((1, 4)), dask.delayed(None)):
        with pytest.raises((ValueError, TypeError), match="^running_mean"):
            cbn.dask.batch_norm(x, wrong, ONES).compute()


def test_xarray():
    """By apply_ufunc, and as the data of one, whose channels may be cut."""
    xr = pytest.importorskip("xarray", reason="needs xarray")
    a = values(np.random.default_rng(109), (12, 3, 8, 9), np.float32)
    x = xr.DataArray(da.from_array(a, (5, 2, 4, 9)), dims=("time", "band", "y", "x"), coords={"band": ["red", "green", "blue"]})
    stats = cbn.dask.batch_stats(x.data, axis=x.get_axis_num("band")).compute()
    check_stats(stats, a, 1)
    mean, var = xr.DataArray(stats.mean, dims="band"), xr.DataArray(stats.var, dims="band")
    y = xr.apply_ufunc(
        cbn.batch_norm, x.chunk(band=-1), mean, var, input_core_dims=[["band"]] * 3, output_core_dims=[["band"]], kwargs={"axis": -1},
        dask="parallelized", output_dtypes=[x.dtype],
    ).transpose(*x.dims)  # fmt: skip
    assert y.chunks == ((5, 5, 2), (3,), (4, 4), (9,))
    same(y.values, cbn.batch_norm(a, stats.mean, stats.var))
    z = x.copy(data=cbn.dask.batch_norm(x.data, stats.mean, stats.var, axis=x.get_axis_num("band")))
    assert z.chunks == x.chunks
    same(z.values, y.values)


def test_example(tmp_path):
    """Whose limit of memory is real, and which checks itself."""
    pytest.importorskip("tqdm", reason="needs tqdm")
    example = pathlib.Path(__file__).parents[1] / "examples" / "large_images.py"
    command = [sys.executable, example, "--size", "100MB", "--memory", "500MB", "--cold", "--folder", tmp_path]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "largest errors" in result.stdout
    assert not list(tmp_path.iterdir())


def test_cbn_alone_imports_no_dask():
    subprocess.run([sys.executable, "-c", "import cbn, sys; assert 'dask' not in sys.modules"], cwd=FOLDER, check=True)
