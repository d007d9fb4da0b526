"""Normalizing images: the formula in float64, rounded, for every layout, type and view, and errors for what it can't take."""

import numpy as np
import pytest

import cbn

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # torchvision's, of ImageNet
SHAPES = [(2, 37, 53, 3), (224, 224, 3), (1, 1, 1, 3), (3, 8, 8, 3), (0, 4, 4, 3), (5, 0, 3)]


def images(shape, dtype=np.uint8):
    return np.random.default_rng(71).integers(0, 256, shape).astype(dtype)


def expected(a, layout, scale=1 / 255, mean=MEAN, std=STD):
    y = (a.astype(np.float64) * scale - mean) / std
    return np.moveaxis(y, -1, -3) if layout == "channels_first" else y


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images(shape, layout, isa, threads):
    a = images(shape)
    y, right = cbn.normalize_images(a, MEAN, STD, layout=layout), expected(a, layout)
    assert y.shape == right.shape and y.dtype == np.float32 and y.flags.c_contiguous
    assert abs(y - right).max(initial=0) <= 2 * np.spacing(np.float32(abs(right).max(initial=0)))
    out = np.full_like(y, np.nan)
    assert cbn.normalize_images(a, MEAN, STD, layout=layout, out=out) is out
    np.testing.assert_array_equal(out, y)


@pytest.mark.parametrize("view", [lambda a: a[..., ::-1], lambda a: a[:, 3:-5, 7:-2], lambda a: a[:, :, ::-1], lambda a: a[::2, ::3, ::2]])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_views(view, layout, threads):
    a = view(images((4, 30, 40, 3)))
    np.testing.assert_array_equal(cbn.normalize_images(a, MEAN, STD, layout=layout), cbn.normalize_images(a.copy(), MEAN, STD, layout=layout))
    out = np.zeros((*np.shape(np.moveaxis(a, -1, 1) if layout == "channels_first" else a), 2), np.float32)[..., 0]
    cbn.normalize_images(a, MEAN, STD, layout=layout, out=out)
    np.testing.assert_array_equal(out, cbn.normalize_images(a, MEAN, STD, layout=layout))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.float16, np.float32])
def test_types_of_images(dtype):
    a = images((2, 9, 11, 4), np.uint8).astype(dtype)
    mean, std = np.linspace(0, 1, 4), np.linspace(1, 2, 4)
    for scale in (1, 1 / 65535, 2.5):
        y, right = cbn.normalize_images(a, mean, std, scale=scale), expected(a, "channels_first", scale, mean, std)
        assert abs(y - right).max() <= 2 * np.spacing(np.float32(abs(right).max()))


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_narrow_outputs(name, layout, isa):
    dtype = np.float16 if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    a = images((2, 33, 35, 3))
    y = cbn.normalize_images(a, MEAN, STD, layout=layout, dtype=dtype)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, cbn.normalize_images(a, MEAN, STD, layout=layout).astype(dtype))
    out = np.empty_like(y)
    np.testing.assert_array_equal(cbn.normalize_images(a, MEAN, STD, layout=layout, out=out), y)


A = images((2, 5, 6, 3))


@pytest.mark.parametrize("changes, error, message", [
    ({"images": A[0, 0]}, ValueError, r"^images: expected shape \(N, H, W, C\) or \(H, W, C\), got \(6, 3\)"),
    ({"images": A.astype(float)}, TypeError, "^images: expected an array of uint8, .* got float64"),
    ({"images": A.astype(int)}, TypeError, "^images: expected an array of float16, .* got int64"),
    ({"images": None}, TypeError, "^images: expected an array, got None"),
    ({"mean": MEAN[:2]}, ValueError, r"^mean: expected shape \(3,\), a value for each channel, got \(2,\)"),
    ({"mean": 0.5}, ValueError, r"^mean: expected shape \(3,\)"),
    ({"mean": ["a", "b", "c"]}, TypeError, "^mean: expected an array of real numbers"),
    ({"mean": [0, 0, np.nan]}, ValueError, "^mean: expected finite values"),
    ({"std": [1, 0, 1]}, ValueError, "^std: expected positive values, got 0.0"),
    ({"scale": 0}, ValueError, "^scale: expected a positive number, got 0"),
    ({"scale": "1"}, TypeError, "^scale: expected a real number, got '1'"),
    ({"layout": "NCHW"}, ValueError, "^layout: expected 'channels_first' or 'channels_last', got 'NCHW'"),
    ({"dtype": np.float64}, TypeError, "^dtype: expected float32, float16 or bfloat16, got float64"),
    ({"out": np.empty(A.shape, np.float32)}, ValueError, r"^out: expected shape \(2, 3, 5, 6\), got \(2, 5, 6, 3\)"),
    ({"out": np.empty((2, 3, 5, 6))}, TypeError, "^dtype: expected float32, float16 or bfloat16, got float64"),
    ({"out": np.empty((2, 3, 5, 6), np.float16), "dtype": np.float32}, TypeError, "^out: expected dtype float32, got float16"),
    ({"out": [1.0]}, TypeError, "^out: expected a NumPy array, got list"),
    ({"out": np.broadcast_to(np.float32(1), (2, 3, 5, 6))}, ValueError, "^out: expected a writeable array"),
])  # fmt: skip
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        cbn.normalize_images(**({"images": A, "mean": MEAN, "std": STD} | changes))


def test_overlap():
    a = np.zeros((2, 5, 6, 3), np.float32)
    with pytest.raises(ValueError, match="^out: expected memory of its own, got an array that overlaps images"):
        cbn.normalize_images(a, MEAN, STD, layout="channels_last", out=a)
