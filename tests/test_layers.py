"""Layers do what the functions do, keep their state as PyTorch's layers do, and keep it where a call fails."""

import copy
import pickle
import warnings

import numpy as np
import pytest

import cbn

SHAPES = {cbn.BatchNorm1d: (4, 3, 5), cbn.BatchNorm2d: (4, 3, 5, 2), cbn.BatchNorm3d: (2, 3, 5, 2, 3), cbn.BatchNorm: (2, 3, 2, 1, 3, 2)}
NAMES = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def batches(shape=(4, 3, 5), count=3, dtype=np.float32):
    return np.random.default_rng(12).normal(2, 3, (count, *shape)).astype(dtype)


def trained(layer, shape=(4, 3, 5)):
    """A layer with parameters unlike the first ones, after some batches."""
    rng = np.random.default_rng(13)
    if layer.affine:
        layer.weight[...], layer.bias[...] = rng.standard_normal((2, layer.num_features))
    for x in batches(shape):
        layer(x)
    return layer


def same_state(a, b):
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layer", SHAPES)
def test_as_the_functions(layer, dtype, affine, axis):
    shape = SHAPES[layer]
    if axis == -1:
        shape = (shape[0], *shape[2:], shape[1])
    layer = layer(3, 1e-3, 0.3, affine, axis=axis, dtype=dtype)
    weight, bias = np.random.default_rng(14).standard_normal((2, 3)).astype(dtype)
    mean, var = np.zeros(3, dtype), np.ones(3, dtype)
    if affine:
        layer.weight[...], layer.bias[...] = weight, bias
    else:
        weight = bias = None
    for i, x in enumerate(batches(shape)):
        y = layer(x)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, cbn.batch_norm(x, mean, var, weight, bias, True, 0.3, 1e-3, axis=axis))
        g = cbn.batch_norm_backward(x + 1, x, cbn.batch_stats(x, axis=axis), weight, bias, 1e-3, axis=axis)
        np.testing.assert_array_equal(layer.backward(x + 1), g.x)
        assert layer.num_batches_tracked == i + 1
    np.testing.assert_array_equal(layer.running_mean, mean, strict=True)
    np.testing.assert_array_equal(layer.running_var, var, strict=True)

    assert layer.eval() is layer and not layer.training
    np.testing.assert_array_equal(layer(x), cbn.batch_norm(x, mean, var, weight, bias, eps=1e-3, axis=axis))
    frozen = cbn.batch_norm_backward(x + 1, x, (mean, var), weight, bias, 1e-3, axis=axis, training=False)
    np.testing.assert_array_equal(layer.backward(x + 1), frozen.x)
    np.testing.assert_array_equal(layer.running_mean, mean)
    assert layer.num_batches_tracked == 3
    if affine:
        np.testing.assert_array_equal(layer.weight_grad, frozen.weight, strict=True)
        np.testing.assert_array_equal(layer.bias_grad, frozen.bias, strict=True)
    else:
        assert layer.weight_grad is layer.bias_grad is None
    assert layer.train() is layer and layer.training and not layer.train(False).training


def test_cumulative_average():
    layer = cbn.BatchNorm1d(3, momentum=None, dtype=np.float64)
    xs = batches(dtype=np.float64)
    for k, x in enumerate(xs, 1):
        layer(x)
        np.testing.assert_allclose(layer.running_mean, xs[:k].mean((0, 1, 3)), rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, xs[:k].var((1, 3), ddof=1).mean(0), rtol=1e-12)


def test_without_running_statistics():
    layer = cbn.BatchNorm1d(3, track_running_stats=False)
    x = batches()[0]
    for mode in (layer.train, layer.eval):
        mode()
        np.testing.assert_array_equal(layer(x), cbn.batch_norm_train(x)[0])
        np.testing.assert_array_equal(layer.backward(x), cbn.batch_norm_backward(x, x, cbn.batch_stats(x)).x)
    assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
    assert list(layer.state_dict()) == NAMES[:2]
    with pytest.raises(ValueError, match="3 channels, got 5"):
        cbn.BatchNorm1d(3, affine=False, track_running_stats=False)(x.transpose(0, 2, 1))


def test_initial_state():
    layer = cbn.BatchNorm2d(3)
    assert (layer.eps, layer.momentum, layer.affine, layer.track_running_stats, layer.training) == (1e-5, 0.1, True, True, True)
    expected = np.ones(3, np.float32), np.zeros(3, np.float32), np.zeros(3, np.float32), np.ones(3, np.float32), np.array(0, np.int64)
    same_state(layer.state_dict(), dict(zip(NAMES, expected, strict=True)))
    assert layer.weight_grad is layer.bias_grad is None


def test_state_dict_copies():
    layer = trained(cbn.BatchNorm1d(3))
    state, before = layer.state_dict(), layer.state_dict()
    for array in state.values():
        array[...] = 9
    same_state(layer.state_dict(), before)
    other = cbn.BatchNorm1d(3)
    weight = other.weight
    assert other.load_state_dict(before) == ([], [])
    same_state(other.state_dict(), before)
    assert other.weight is weight
    x = batches()[0]
    np.testing.assert_array_equal(other.eval()(x), layer.eval()(x))
    before["weight"][...] = 9
    assert (other.weight != 9).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": ...}, r'Missing key\(s\) in state_dict: "weight"'),
        ({"bias": ..., "running_var": ...}, r'Missing key\(s\) in state_dict: "bias", "running_var"'),
        ({"extra": np.ones(3)}, r'Unexpected key\(s\) in state_dict: "extra"'),
        ({"weight": np.ones(4)}, r"size mismatch for weight: expected shape \(3,\), got \(4,\)"),
        ({"bias": np.ones((3, 1))}, r"size mismatch for bias: .* got \(3, 1\)"),
        ({"num_batches_tracked": np.zeros(2, int)}, r"num_batches_tracked: expected shape \(\), got \(2,\)"),
        ({"num_batches_tracked": -1}, "num_batches_tracked: expected a number of batches >= 0, got -1"),
        ({"num_batches_tracked": 1.5}, "num_batches_tracked: expected an integer, got float64"),
        ({"running_var": np.array([1, 1e300, 1])}, "running_var: expected values within the range of float32, got 1e.300"),
        ({"running_mean": ["a", "b", "c"]}, r"running_mean: expected an array of real numbers"),
        ({"running_var": np.array([1, -1, 1])}, r"running_var: expected non-negative values, got -1"),
        ({"bias": ..., "weight": np.ones(2), "extra": 1}, r"(?s)BatchNorm1d.*bias.*extra.*weight"),
    ],
    ids=str,
)
def test_wrong_state_dict(change, message):
    layer = trained(cbn.BatchNorm1d(3))
    before = layer.state_dict()
    state = {name: np.zeros_like(a) for name, a in before.items()}
    state = {name: a for name, a in {**state, **change}.items() if a is not ...}
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(state)
    same_state(layer.state_dict(), before)


def test_lenient_loading():
    layer = cbn.BatchNorm1d(3)
    assert layer.load_state_dict({"bias": [1, 2, 3], "extra": 1}, strict=False) == (["weight", "running_mean", "running_var"], ["extra"])
    assert layer.bias.tolist() == [1, 2, 3] and layer.weight.tolist() == [1, 1, 1]
    state = trained(cbn.BatchNorm1d(3)).state_dict()
    del state["num_batches_tracked"]  # as before PyTorch 0.4.1
    layer.load_state_dict(state)
    np.testing.assert_array_equal(layer.running_var, state["running_var"])


@pytest.mark.parametrize(
    "copied, shared", [(copy.deepcopy, False), (copy.copy, True), (lambda layer: pickle.loads(pickle.dumps(layer)), False)]
)
def test_copies(copied, shared):
    layer = trained(cbn.BatchNorm1d(3, momentum=0.3, axis=-2))
    x = batches()[0]
    layer.backward(x)
    other = copied(layer)
    assert repr(other) == repr(layer) and type(other) is cbn.BatchNorm1d
    same_state(other.state_dict(), layer.state_dict())
    np.testing.assert_array_equal(other.weight_grad, layer.weight_grad)
    np.testing.assert_array_equal(other.eval()(x), layer.eval()(x))
    assert np.shares_memory(other.running_mean, layer.running_mean) == shared
    with pytest.raises(RuntimeError, match="^backward: expected a call"):
        copied(layer).backward(x)


def test_repr():
    assert repr(cbn.BatchNorm2d(3)) == "BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)"
    for layer in (
        cbn.BatchNorm1d(7, 1e-3, None, False),
        cbn.BatchNorm(2, track_running_stats=False, axis=-1),
        cbn.BatchNorm3d(2, bias=False, dtype=np.float64, on_nonfinite="skip"),
    ):
        other = eval(repr(layer), vars(cbn))
        assert repr(other) == repr(layer)
        same_state(other.state_dict(), layer.state_dict())
    assert "dtype='float64'" in repr(layer)


def test_warning_once_where_statistics_were_never_updated():
    x = batches()[0]
    layer = cbn.BatchNorm1d(3).eval()
    with pytest.warns(UserWarning, match=r"BatchNorm1d in eval mode uses running statistics that were never updated") as record:
        layer(x)
    assert record[0].filename == __file__
    updated = cbn.BatchNorm1d(3)
    updated(x)
    loaded = cbn.BatchNorm1d(3)
    loaded.load_state_dict(loaded.state_dict())
    assigned = cbn.BatchNorm1d(3)
    assigned.running_var[...] = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for quiet in (layer, updated.eval(), loaded.eval(), assigned.eval(), cbn.BatchNorm1d(3, track_running_stats=False).eval()):
            quiet(x)
    layer.reset_running_stats()
    with pytest.warns(UserWarning, match="never updated"):
        layer(x)


def test_reset():
    layer = trained(cbn.BatchNorm1d(3))
    weight = layer.state_dict()["weight"]
    layer.reset_running_stats()
    same_state(layer.state_dict(), cbn.BatchNorm1d(3).state_dict() | {"weight": weight, "bias": layer.bias})
    layer.reset_parameters()
    same_state(layer.state_dict(), cbn.BatchNorm1d(3).state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_out(training):
    layer = trained(cbn.BatchNorm1d(3)).train(training)
    other = copy.deepcopy(layer)
    x = batches()[1]
    expected, dx = layer(x), layer.backward(x + 1)
    out = np.empty_like(x)
    assert other(x, out=out) is out
    np.testing.assert_array_equal(out, expected)
    dy = x + 1
    assert other.backward(dy, out=dy) is dy
    np.testing.assert_array_equal(dy, dx)
    assert other(x, out=x) is x
    with pytest.raises(RuntimeError, match=r"^backward: .* not overwritten \(out=x\)"):
        other.backward(dy)


def test_backward_needs_a_call_whose_input_lives():
    layer = cbn.BatchNorm1d(3)
    x = batches()[0]
    with pytest.raises(RuntimeError, match="^backward: expected a call of the layer before"):
        layer.backward(x)
    layer(x.copy())  # training keeps its input
    expected = layer.backward(x, retain=True)
    np.testing.assert_array_equal(layer.backward(x), expected)
    with pytest.raises(RuntimeError, match="used up by the backward before, which keeps it with retain=True"):
        layer.backward(x)
    layer.eval()(x.copy())  # eval mode does not
    with pytest.raises(RuntimeError, match="in eval mode a layer keeps only a weak reference to its input"):
        layer.backward(x)


X = batches()[0]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda layer: layer(X[0]), ValueError, r"^expected 4D input \(got 2D input\)"),
        (lambda layer: layer(X), ValueError, r"^expected 4D input \(got 3D input\)"),
        (lambda layer: layer(np.ones((2, 4, 2, 2), np.float32)), ValueError, "^running_mean should contain 4 elements not 3"),
        (lambda layer: layer(np.ones((1, 3, 1, 1), np.float32)), ValueError, r"^Expected more than 1 value .* got input size \(1, 3, 1, 1\)"),
        (lambda layer: layer(np.ones((2, 3, 2, 2), int)), TypeError, "^x: expected an array of float16, .* got int64"),
        (lambda layer: layer(X[..., None], out=X), ValueError, r"^out: expected shape \(4, 3, 5, 1\), got \(4, 3, 5\)"),
        (lambda layer: layer(X[..., None], out=layer.weight), ValueError, "^out: expected shape"),
        (
            lambda layer: (setattr(layer, "eps", 0), layer(X[..., None])),
            ValueError,
            "^batch_norm eps must be positive during training, but got 0",
        ),
        (
            lambda layer: (setattr(layer, "momentum", 1.5), layer(X[..., None])),
            ValueError,
            r"^momentum: expected a number in \[0, 1\], got 1.5",
        ),
        (lambda layer: (setattr(layer, "bias", np.ones(2)), layer(X[..., None])), ValueError, "^bias should contain 3 elements not 2"),
    ],
)
def test_failing_calls_change_nothing(call, error, message):
    layer = trained(cbn.BatchNorm2d(3), (4, 3, 5, 2))
    x = batches((4, 3, 5, 2))[-1]
    state, dx, grad = layer.state_dict(), layer.backward(x, retain=True), layer.weight_grad
    with pytest.raises(error, match=message):
        call(layer)
    layer.eps, layer.bias = 1e-5, state["bias"]
    same_state(layer.state_dict(), state)
    for wrong in (x[:1], x.astype(np.float64)):
        with pytest.raises((ValueError, TypeError), match="^dy: expected"):
            layer.backward(wrong)
    assert layer.weight_grad is grad
    np.testing.assert_array_equal(layer.backward(x), dx)


@pytest.mark.parametrize(
    "layer, shape, message",
    [
        (cbn.BatchNorm1d, (4, 3, 5, 2), r"expected 2D or 3D input \(got 4D input\)"),
        (cbn.BatchNorm1d, (4,), r"expected 2D or 3D input \(got 1D input\)"),
        (cbn.BatchNorm2d, (4, 3, 5), r"expected 4D input \(got 3D input\)"),
        (cbn.BatchNorm3d, (4, 3, 5, 2), r"expected 5D input \(got 4D input\)"),
        (cbn.BatchNorm, (4,), "at least 2 dimensions"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:.*never updated")
def test_ranks(layer, shape, message, training):
    with pytest.raises(ValueError, match=message):
        layer(3).train(training)(np.ones(shape, np.float32))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"num_features": 3.0}, TypeError, "^num_features: expected an integer, got 3.0"),
        ({"num_features": True}, TypeError, "^num_features: expected an integer, got True"),
        ({"num_features": "3"}, TypeError, "^num_features: expected an integer"),
        ({"num_features": -1}, ValueError, "^num_features: expected a number of channels, got -1"),
        ({"num_features": 3, "dtype": int}, TypeError, "^dtype: expected float32 or float64, got int64"),
        ({"num_features": 3, "dtype": np.complex64}, TypeError, "^dtype: expected float32 or float64, got complex64"),
    ],
)
def test_wrong_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        cbn.BatchNorm2d(**arguments)


def test_no_features():
    layer = cbn.BatchNorm1d(0)
    assert layer(np.ones((4, 0), np.float32)).shape == layer.backward(np.ones((4, 0), np.float32)).shape == (4, 0)


def test_empty_batch_leaves_running_statistics_alone():
    layer = trained(cbn.BatchNorm1d(3))
    before = layer.state_dict()
    assert layer(np.ones((0, 3, 5), np.float32)).shape == (0, 3, 5)
    for name in NAMES[:4]:
        np.testing.assert_array_equal(layer.state_dict()[name], before[name])
