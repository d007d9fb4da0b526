"""cbn's functions on xarray's labelled arrays: by xarray.apply_ufunc, names and coordinates stay, as docs/sklearn.md shows."""

import numpy as np
import pytest

import cbn

xarray = pytest.importorskip("xarray", reason="the arrays are xarray's")


def images(dims):
    rng = np.random.default_rng(0)
    x, coords = rng.normal(3, 2, (4, 3, 5, 6)).astype(np.float32), {"channel": ["red", "green", "blue"], "time": range(4)}
    x = xarray.DataArray(x, dims=("time", "channel", "y", "x"), coords=coords, attrs={"units": "K"})
    vectors = [xarray.DataArray(v, dims="channel", coords={"channel": x.channel}) for v in rng.random((4, 3)).astype(np.float32)]
    return x.transpose(*dims), vectors


DIMS = [("time", "channel", "y", "x"), ("time", "y", "x", "channel"), ("channel", "x", "time", "y")]


@pytest.mark.parametrize("dims", DIMS)
def test_inference(dims):
    x, vectors = images(dims)
    y = xarray.apply_ufunc(cbn.batch_norm, x, *vectors, input_core_dims=[["channel"]] * 5, output_core_dims=[["channel"]],
                           kwargs={"axis": -1}, keep_attrs=True).transpose(*x.dims)
    assert y.dims == x.dims and y.attrs == x.attrs
    for name in x.coords:
        xarray.testing.assert_identical(y[name], x[name])
    axis = x.get_axis_num("channel")
    np.testing.assert_array_equal(y, cbn.batch_norm(x.to_numpy(), *(v.to_numpy() for v in vectors), axis=axis))
    assert y.to_numpy().strides == x.to_numpy().strides, "of x's order of memory"


@pytest.mark.parametrize("dims", DIMS)
def test_training(dims):
    x, (weight, bias, *_) = images(dims)

    def train(x, weight, bias):
        y, stats = cbn.batch_norm_train(x, weight, bias, axis=axis)
        return y, stats.mean, stats.var

    axis = x.get_axis_num("channel")
    y, mean, var = xarray.apply_ufunc(train, x, weight, bias, input_core_dims=[x.dims, ["channel"], ["channel"]],
                                      output_core_dims=[x.dims, ["channel"], ["channel"]])
    assert y.dims == x.dims and mean.dims == var.dims == ("channel",)
    xarray.testing.assert_identical(mean.channel, x.channel)
    expected, stats = cbn.batch_norm_train(x.to_numpy(), weight.to_numpy(), bias.to_numpy(), axis=axis)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(mean, stats.mean)
    np.testing.assert_array_equal(var, stats.var)


def test_parameters_in_another_order():
    """xarray aligns by coordinates, or refuses; cbn sees what it gives."""
    x, vectors = images(DIMS[0])
    with pytest.raises(ValueError, match="channel"):
        xarray.apply_ufunc(cbn.batch_norm, x, *(v[::-1] for v in vectors), input_core_dims=[["channel"]] * 5, output_core_dims=[["channel"]],
                           kwargs={"axis": -1})


def test_chunks():
    """Of a dask array, each chunk of which has all channels."""
    pytest.importorskip("dask", reason="the chunks are dask's")
    x, vectors = images(DIMS[0])
    y = xarray.apply_ufunc(cbn.batch_norm, x.chunk(time=2, y=3), *vectors, input_core_dims=[["channel"]] * 5, output_core_dims=[["channel"]],
                           kwargs={"axis": -1}, dask="parallelized", output_dtypes=[x.dtype]).transpose(*x.dims)
    assert y.chunks is not None
    np.testing.assert_array_equal(y, cbn.batch_norm(x.to_numpy(), *(v.to_numpy() for v in vectors)))


def test_given_as_they_are():
    """Read where they are; the result is a plain array."""
    x, vectors = images(DIMS[0])
    y = cbn.batch_norm(x, *vectors)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, cbn.batch_norm(x.to_numpy(), *(v.to_numpy() for v in vectors)))
