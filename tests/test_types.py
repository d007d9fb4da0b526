"""16-bit floats and small integers give float32's results, rounded once to the type of the output, whatever the layout, level and threads."""

import math

import numpy as np
import pytest

import cbn

ml_dtypes = pytest.importorskip("ml_dtypes")

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # ml_dtypes' own, of NaN

FLOATS = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
INTEGERS = [np.dtype(t) for t in (np.int8, np.uint8, np.int16, np.uint16)]
named = {"ids": lambda dtype: dtype.name}


def off_by_one(a):
    """At an odd address."""
    view = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


LAYOUTS = {
    "N,C,H,W": ((3, 5, 9, 7), 1, np.array),
    "N,C,H,W, one image": ((1, 5, 9, 27), 1, np.array),
    "N,C,H,W, many images": ((15, 3, 10, 14), 1, np.array),
    "N,C,H,W, large images": ((2, 3, 70, 90), 1, np.array),
    "N,H,W,C": ((3, 9, 7, 66), -1, np.array),
    "N,H,W,C, few channels": ((2, 40, 30, 3), -1, np.array),
    "N,C": ((70, 40), 1, np.array),
    "channels last in memory": ((2, 20, 6, 5), 1, lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)),
    "misaligned": ((2, 3, 40, 50), 1, off_by_one),
    "misaligned, channels last": ((20, 50, 64), -1, off_by_one),
    "reversed": ((2, 20, 6, 5), 1, lambda a: np.ascontiguousarray(a[:, ::-1, :, ::-1])[:, ::-1, :, ::-1]),
    "a crop of many images": ((15, 3, 10, 14), 1, lambda a: np.pad(a, 1)[1:-1, 1:-1, 1:-1, 1:-1]),
    "a crop": ((3, 5, 9, 7), 1, lambda a: np.pad(a, 1)[1:-1, 1:-1, 1:-1, 1:-1]),
    "a slice of channels": ((3, 9, 7, 5), -1, lambda a: np.concatenate([a, a], -1)[..., :5]),
}


def all_values(dtype):
    """Every value that a type of 8 or 16 bits has."""
    return np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert ((a == b) | (np.isnan(a) & np.isnan(b))).all()


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, **named)
def test_every_value_is_read_and_written_exactly(dtype, isa):
    x = all_values(dtype).reshape(-1, 1)
    one = np.ones(1)
    y = cbn.batch_norm(x, 0 * one, one, eps=0.0)
    same(y, x.astype(np.float32) if dtype in INTEGERS else x)
    for view in (np.repeat(x, 3)[::3], x[::-1].reshape(-1), np.repeat(x, 2)[::2]):
        same(cbn.batch_norm(view.reshape(1, 1, -1), 0 * one, one, eps=0.0).reshape(-1), view.astype(y.dtype))


@pytest.mark.parametrize("dtype", FLOATS, **named)
def test_rounding_to_nearest_even(dtype, isa):
    """Results that lie between two values of the type, on the middle between them, and beyond its range."""
    x = all_values(dtype)
    x = x[np.isfinite(x)].reshape(1, -1)
    scale = np.array([1 + 2.0**-9, 1 + 2.0**-12, 1.5, 1 / 3, 2.0**-13 + 2.0**-15], np.float32).reshape(-1, 1)
    x = np.repeat(x, len(scale), 0)
    mean = np.zeros(len(scale))
    y = cbn.batch_norm(x, mean, mean + 1, scale.reshape(-1), eps=0.0, axis=0)
    with np.errstate(over="ignore"):
        same(y, (x.astype(np.float32) * scale).astype(dtype))
        bias = np.float32(2.0**-11 if dtype == np.float16 else 2.0**-8)
        same(cbn.batch_norm(x, mean, mean + 1, bias=np.full(len(scale), bias), eps=0.0, axis=0), (x.astype(np.float32) + bias).astype(dtype))


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, **named)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_operation(layout, dtype, threads):
    shape, axis, view = LAYOUTS[layout]
    rng = np.random.default_rng(61)
    result = np.dtype(np.float32) if dtype in INTEGERS else dtype
    x = view((rng.standard_normal(shape) * 20 + 60).astype(dtype))
    dy, residual = (view(rng.standard_normal(shape).astype(result)) for _ in range(2))
    mean, weight, bias = rng.standard_normal((3, shape[axis])).astype(np.float32)
    var = weight**2 + 1
    wide = lambda a: view(np.asarray(a, np.float32))
    for options in ({}, {"activation": "relu"}, {"activation": "hard_swish", "residual": residual}):
        wider = options | ({"residual": wide(residual)} if "residual" in options else {})
        rounded = lambda a: np.asarray(a).astype(result)
        same(cbn.batch_norm(x, mean, var, weight, bias, axis=axis, **options),
             rounded(cbn.batch_norm(wide(x), mean, var, weight, bias, axis=axis, **wider)))  # fmt: skip
        y, stats = cbn.batch_norm_train(x, weight, bias, axis=axis, **options)
        y_wide, stats_wide = cbn.batch_norm_train(wide(x), weight, bias, axis=axis, **wider)
        same(y, rounded(y_wide))
        same(stats.mean, stats_wide.mean)
        same(stats.var, stats_wide.var)
        for training in (True, False):
            g = cbn.batch_norm_backward(dy, x, stats, weight, bias, axis=axis, training=training, **options)
            g_wide = cbn.batch_norm_backward(wide(dy), wide(x), stats, weight, bias, axis=axis, training=training, **wider)
            same(g.x, rounded(g_wide.x))
            same(g.weight, g_wide.weight)
            same(g.bias, g_wide.bias)
            if "residual" in options:
                same(g.residual, rounded(g_wide.residual))
    assert y.flags.c_contiguous == view(y).flags.c_contiguous or layout in ("reversed", "a crop", "a crop of many images", "a slice of channels")


@pytest.mark.parametrize("dtype", FLOATS + [np.dtype(np.float32)], **named)
@pytest.mark.parametrize("shape, axis", [((rows, channels), -1) for rows in (1, 2, 9) for channels in (3, 16, 32, 48, 80)] + [
    ((2, 3, length), 1) for length in (5, 31, 33, 600)], ids=str)
def test_nothing_beside_the_output_is_written(shape, axis, dtype, threads):
    """Wherever it begins in a cache line."""
    rng = np.random.default_rng(87)
    x = rng.standard_normal(shape).astype(dtype)
    mean, var = rng.standard_normal(shape[axis]), rng.uniform(0.5, 2, shape[axis])
    expected = cbn.batch_norm(x, mean, var, axis=axis)
    memory = np.empty(x.size + 192, dtype)
    for begin in range(64, 128):
        memory[...] = 7
        out = memory[begin:begin + x.size].reshape(shape)
        same(cbn.batch_norm(x, mean, var, axis=axis, out=out), expected)
        assert (memory[:begin] == 7).all() and (memory[begin + x.size:] == 7).all()


@pytest.mark.parametrize("dtype", FLOATS, **named)
def test_a_residual_with_other_steps(dtype, threads):
    """Not those of x from image to image, but of more channels."""
    x, dy, residual, others = np.random.default_rng(63).standard_normal((4, 15, 3, 10, 14)).astype(dtype)
    weight, bias = np.float32([1, -2, 3]), np.float32([0, 1, -1])
    _, stats = cbn.batch_norm_train(x)
    expected = cbn.batch_norm_backward(dy, x, stats, weight, bias, activation="relu", residual=residual)
    with_others = np.concatenate([residual, others], 1)[:, :3]
    for one, other in zip(cbn.batch_norm_backward(dy, x, stats, weight, bias, activation="relu", residual=with_others), expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("dtype", FLOATS, **named)
def test_in_place_and_running_statistics(dtype, threads):
    x = np.random.default_rng(62).standard_normal((4, 6, 5, 5)).astype(dtype)
    for kept in (np.float32, np.float64):
        running, expected = (np.array([np.zeros(6), np.ones(6)], kept) for _ in range(2))
        a = x.copy()
        y = cbn.batch_norm(a, *running, training=True, out=a)
        y_wide = cbn.batch_norm(x.astype(np.float32), *expected, training=True)
        assert y is a
        same(y, y_wide.astype(dtype))
        np.testing.assert_array_equal(running, expected)


@pytest.mark.parametrize("dtype", FLOATS, **named)
@pytest.mark.parametrize("weight_type", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_types_of_parameters_and_their_gradients(dtype, weight_type):
    rng = np.random.default_rng(63)
    x, dy = rng.standard_normal((2, 8, 5, 3)).astype(dtype)
    weight, bias = rng.standard_normal((2, 5)).astype(weight_type)
    y, stats = cbn.batch_norm_train(x, weight, bias)
    same(y, cbn.batch_norm_train(x, weight.astype(np.float64), bias.astype(np.float64))[0])
    g = cbn.batch_norm_backward(dy, x, stats, weight, bias)
    assert g.x.dtype == dtype and g.weight.dtype == g.bias.dtype == weight_type
    assert cbn.batch_norm_backward(dy, x, stats).weight.dtype == np.float32


@pytest.mark.parametrize("dtype", FLOATS, **named)
def test_layers(dtype):
    x = np.random.default_rng(64).standard_normal((8, 5, 3, 3)).astype(dtype)
    layer, wide = cbn.BatchNorm2d(5, activation="relu"), cbn.BatchNorm2d(5, activation="relu")
    same(layer(x), wide(x.astype(np.float32)).astype(dtype))
    assert layer.backward(x).dtype == dtype and layer.weight_grad.dtype == np.float32
    np.testing.assert_array_equal(layer.running_var, wide.running_var)
    same(layer.eval()(x), wide.eval()(x.astype(np.float32)).astype(dtype))


def test_integers_are_images_straight_from_a_decoder():
    image = np.random.default_rng(65).integers(0, 256, (2, 30, 20, 3), np.uint8)
    first, mean, var = image.transpose(0, 3, 1, 2), np.array([120.0, 110, 100]), np.array([60.0, 55, 70]) ** 2
    y = cbn.batch_norm(first, mean, var, out=np.empty(first.shape, np.float32))
    same(y, cbn.batch_norm(first.astype(np.float32), mean, var))
    y, stats = cbn.batch_norm_train(first)
    assert y.dtype == np.float32 and y.transpose(0, 2, 3, 1).flags.c_contiguous
    np.testing.assert_allclose(stats.mean, image.mean((0, 1, 2)), rtol=1e-7)


X = np.ones((2, 3), np.float16)


@pytest.mark.parametrize("call, message", [
    (lambda: cbn.batch_norm_train(X, out=np.empty(X.shape, np.float32)), "^out: expected dtype float16, that of x, got float32"),
    (lambda: cbn.batch_norm_train(X.astype(np.uint8), out=X.astype(np.uint8)), "^out: expected dtype float32, that of the output where x is uint8"),
    (lambda: cbn.batch_norm_train(X, residual=X.astype(ml_dtypes.bfloat16)), "^residual: expected dtype float16, that of x, got bfloat16"),
    (lambda: cbn.batch_norm_backward(X.astype(np.uint8), X.astype(np.uint8), (X[0], X[0])), "^dy: expected dtype float32, .* got uint8"),
    (lambda: cbn.batch_norm(X, X[0], X[0], training=True), "^running_mean: expected an array of float32 or float64, got float16"),
    (lambda: cbn.batch_norm_train(X.astype(ml_dtypes.float8_e4m3fn)), "^x: expected an array of float16, bfloat16, .* got float8_e4m3fn"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_nothing_of_the_array_s_size_is_kept(restored):
    """The working memory of a call doesn't grow with the array: the peak of the process, in the units of the system, Linux only."""
    resource = pytest.importorskip("resource")
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    x = np.zeros((64, 8, 256, 256), np.float16)[:, :, ::-1, ::-1]
    x[...] = np.arange(256, dtype=np.float16)
    cbn.batch_norm_train(x[:1], out=x[:1])
    before = peak()
    assert before > x.nbytes > 1 << 25 and math.isfinite(before)
    cbn.batch_norm_train(x, out=x)
    assert peak() - before < x.nbytes / 8
