"""Activation and residual in the pass that normalizes: the same bits as done apart, and PyTorch's gradients."""

import numpy as np
import pytest

import cbn

# name: the function of v, and its gradient from dy and v
ACTIVATIONS = {
    None: (lambda v: v, lambda v, dy: dy),
    "relu": (lambda v: np.where(v < 0, 0, v), lambda v, dy: np.where(v <= 0, 0, dy)),
    "relu6": (lambda v: np.where(v < 0, 0, np.where(v > 6, 6, v)), lambda v, dy: np.where((v <= 0) | (v >= 6), 0, dy)),
    ("clip", -0.5, 1.25): (lambda v: np.clip(v, -0.5, 1.25), lambda v, dy: np.where((v < -0.5) | (v > 1.25), 0, dy)),
    ("leaky_relu", 0.125): (lambda v: np.where(v < 0, v * 0.125, v), lambda v, dy: np.where(v <= 0, dy * 0.125, dy)),
    "hard_swish": (
        lambda v: v * np.clip(v + 3, 0, 6) / 6,
        lambda v, dy: np.where(v <= -3, 0, np.where(v >= 3, dy, dy * (v / 3 + v.dtype.type(0.5)))),
    ),
}
# Both layouts; whole tiles and lanes, and not; few channels folded, with a tail; planes and rows longer than what is done at a time.
LAYOUTS = [
    ((3, 5, 7), 1), ((2, 64, 9, 9), 1), ((3, 7, 57), 1), ((1, 9, 197), 1), ((15, 3, 140), 1), ((1030, 3), 1), ((9, 7, 100), -1), ((1, 2, 5001), 1),
    ((60, 1500), 1), ((4, 3, 5, 6), 2),
]  # fmt: skip


def draw(shape, axis, dtype, seed=31):
    rng = np.random.default_rng(seed)
    x, dy, residual = (2 * rng.standard_normal((3, *shape))).astype(dtype)
    weight, bias = rng.standard_normal((2, shape[axis])).astype(dtype)
    return x, dy, residual, weight, bias


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape, axis", LAYOUTS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_same_bits_as_apart(activation, shape, axis, dtype, with_residual, isa, threads):
    function, gradient = ACTIVATIONS[activation]
    x, dy, residual, weight, bias = draw(shape, axis, dtype)
    residual = residual if with_residual else None
    plain, stats = cbn.batch_norm_train(x, weight, bias, axis=axis)
    v = plain if residual is None else plain + residual
    expected = function(v)
    fused = {"axis": axis, "activation": activation, "residual": residual}
    np.testing.assert_array_equal(cbn.batch_norm_train(x, weight, bias, **fused)[0], expected)
    np.testing.assert_array_equal(cbn.batch_norm(x, None, None, weight, bias, True, **fused), expected)
    # By the statistics as they are returned: in float64 training itself has the mean to more digits.
    v = cbn.batch_norm(x, *stats[1:], weight, bias, axis=axis)
    if dtype == np.float32:
        np.testing.assert_array_equal(v, plain)
    v = v if residual is None else v + residual
    np.testing.assert_array_equal(cbn.batch_norm(x, *stats[1:], weight, bias, **fused), function(v))
    back = gradient(v, dy).astype(dtype)
    for training in (True, False):
        apart = cbn.batch_norm_backward(back, x, stats, weight, bias, axis=axis, training=training)
        for out in (None, dy.copy()):
            g = cbn.batch_norm_backward(dy if out is None else out, x, stats, weight, bias, training=training, out=out, **fused)
            for one, other in zip(g, apart, strict=True):
                np.testing.assert_array_equal(one, other)
            assert (g.residual is None) == (residual is None)
            if residual is not None:
                np.testing.assert_array_equal(g.residual, back)


@pytest.mark.parametrize("shape", [(4, 6, 5, 8), (15, 6, 4, 35)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "hard_swish"])
def test_any_array(activation, shape):
    """Views that are copied, and residuals that lie in memory otherwise than x."""
    x, dy, residual, weight, bias = draw(shape, 1, np.float32)
    expected, stats = cbn.batch_norm_train(x, weight, bias, activation=activation, residual=residual)
    gradients = cbn.batch_norm_backward(dy, x, stats, weight, bias, activation=activation, residual=residual)

    def variants(a):
        strided = np.zeros((*shape[:-1], 2 * shape[-1]), a.dtype)[..., ::2]
        strided[...] = a
        return [a, a[::-1, ::-1].copy()[::-1, ::-1], strided, a.astype(">f4")]

    for x_, dy_, residual_ in [*zip(*map(variants, (x, dy, residual)), strict=True), (x, dy, np.asfortranarray(residual)), (variants(x)[2], dy, residual)]:
        y, _ = cbn.batch_norm_train(x_, weight, bias, activation=activation, residual=residual_)
        np.testing.assert_array_equal(y, expected)
        g = cbn.batch_norm_backward(dy_, x_, stats, weight, bias, activation=activation, residual=residual_)
        for one, other in zip((*g, g.residual), (*gradients, gradients.residual), strict=True):
            np.testing.assert_array_equal(one, other)


def test_out_is_the_residual():
    x, dy, residual, weight, bias = draw((4, 6, 50), 1, np.float32)
    expected, stats = cbn.batch_norm_train(x, weight, bias, activation="relu", residual=residual)
    out = residual.copy()
    assert cbn.batch_norm_train(x, weight, bias, activation="relu", residual=out, out=out)[0] is out
    np.testing.assert_array_equal(out, expected)
    g = cbn.batch_norm_backward(dy, x, stats, weight, bias, activation="relu", residual=residual)
    out = residual.copy()
    assert cbn.batch_norm_backward(dy, x, stats, weight, bias, activation="relu", residual=out, out=out).x is out
    np.testing.assert_array_equal(out, g.x)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
def test_nan_stays(activation):
    x = np.array([[np.nan, 1.0, np.inf, -np.inf], [1.0, 2.0, 3.0, np.nan]], np.float32)
    y = cbn.batch_norm(x, np.zeros(4), np.ones(4), activation=activation)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(y, ACTIVATIONS[activation][0](cbn.batch_norm(x, np.zeros(4), np.ones(4))))
    assert np.isnan(y[0, 0]) and np.isnan(y[1, 3])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "sigmoid", "silu"], ids=str)
def test_finite_differences(activation, training):
    x, dy, residual, weight, bias = draw((4, 3, 5), 1, np.float64)
    stats = cbn.batch_stats(x)

    def loss(**changed):
        a = {"x": x, "weight": weight, "bias": bias, "residual": residual} | changed
        mean_var = (None, None) if training else stats[1:]
        y = cbn.batch_norm(a["x"], *mean_var, a["weight"], a["bias"], training, activation=activation, residual=a["residual"])
        return (dy * y).sum()

    g = cbn.batch_norm_backward(dy, x, stats, weight, bias, training=training, activation=activation, residual=residual)
    for name in ("x", "weight", "bias", "residual"):
        array = {"x": x, "weight": weight, "bias": bias, "residual": residual}[name]
        expected = np.empty_like(array)
        for i in np.ndindex(array.shape):
            step = np.zeros_like(array)
            step[i] = 1e-6
            expected[i] = (loss(**{name: array + step}) - loss(**{name: array - step})) / 2e-6
        np.testing.assert_allclose(getattr(g, name), expected, rtol=1e-5, atol=1e-6)


def test_pytorch_at_the_corners():
    """The gradients where an activation has a corner are PyTorch's."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    corners = np.array([-4, -3, -0.5, -0.0, 0, 0.5, 1, 3, 6, 7], np.float32).reshape(-1, 1)
    cases = {
        "relu": functional.relu,
        "relu6": functional.relu6,
        ("clip", -0.5, 0.5): lambda v: v.clamp(-0.5, 0.5),
        ("leaky_relu", 0.125): lambda v: functional.leaky_relu(v, 0.125),
        "hard_swish": functional.hardswish,
        "sigmoid": functional.sigmoid,
        "silu": functional.silu,
    }
    for activation, function in cases.items():
        v = torch.tensor(corners, requires_grad=True)
        y = function(v)
        y.backward(torch.full_like(v, 2.0))
        # Mean 0, variance 1 and eps 0 leave x as it is.
        fixed = {"eps": 0.0, "activation": activation}
        np.testing.assert_allclose(cbn.batch_norm(corners, [0], [1], **fixed), y.detach().numpy(), rtol=1e-6)
        g = cbn.batch_norm_backward(np.full_like(corners, 2), corners, ([0], [1]), training=False, **fixed)
        # PyTorch's gradient of sigmoid subtracts y from 1, where it loses digits that cbn keeps.
        np.testing.assert_allclose(g.x, v.grad.numpy(), rtol=1e-6, atol=2e-7 if activation == "sigmoid" else 0, err_msg=str(activation))


@pytest.mark.parametrize("activation", ["gelu", 3, ("clip", 1), ("clip", 2, 1), ("relu", 1), ("leaky_relu",), ("leaky_relu", np.inf), (), ["relu"]], ids=str)
def test_wrong_activation(activation):
    x = np.zeros((2, 3), np.float32)
    out = np.full_like(x, 5)
    with pytest.raises(ValueError, match="^activation: expected"):
        cbn.batch_norm(x, np.zeros(3), np.ones(3), activation=activation, out=out)
    assert (out == 5).all()


@pytest.mark.parametrize(
    "residual, error, message",
    [
        (np.zeros((2, 4), np.float32), ValueError, r"^residual: expected shape \(2, 3\), that of x, got \(2, 4\)"),
        (np.zeros((2, 3)), TypeError, "^residual: expected dtype float32, that of x, got float64"),
        (np.zeros((2, 3), int), TypeError, "^residual: expected an array of float16, .* got int64"),
    ],
)
def test_wrong_residual(residual, error, message):
    x = np.zeros((2, 3), np.float32)
    for call in (lambda: cbn.batch_norm(x, np.zeros(3), np.ones(3), residual=residual), lambda: cbn.batch_norm_train(x, residual=residual)):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(error, match=message):
        cbn.batch_norm_backward(x, x, (np.zeros(3), np.ones(3)), residual=residual)


def test_overlapping_residual():
    memory = np.zeros(64, np.float32)
    x, out, residual = np.zeros((4, 8), np.float32), memory[:32].reshape(4, 8), memory[8:40].reshape(4, 8)
    with pytest.raises(ValueError, match="^out: expected memory of its own or exactly that of residual"):
        cbn.batch_norm(x, np.zeros(8), np.ones(8), residual=residual, out=out)


@pytest.mark.parametrize("training", [True, False])
def test_layer(training):
    x, dy, residual, weight, bias = draw((4, 6, 5, 8), 1, np.float32)
    layer = cbn.BatchNorm2d(6, activation="relu").train(training)
    layer.weight[...], layer.bias[...] = weight, bias
    layer.running_mean[...] = 0.5
    stats = cbn.batch_stats(x) if training else (layer.running_mean, layer.running_var)
    y = layer(x, residual=residual)
    expected = cbn.batch_norm_train(x, weight, bias)[0] if training else cbn.batch_norm(x, *stats, weight, bias)
    np.testing.assert_array_equal(y, np.maximum(expected + residual, 0))
    dx = layer.backward(dy)
    g = cbn.batch_norm_backward(dy, x, stats, weight, bias, training=training, activation="relu", residual=residual)
    for one, other in zip((dx, layer.weight_grad, layer.bias_grad, layer.residual_grad), (*g, g.residual), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "activation='relu'" in repr(layer)
    layer(x)
    layer.backward(dy)
    assert layer.residual_grad is None
    layer(x, residual=residual, out=residual)
    with pytest.raises(RuntimeError, match="^backward: expected a call"):
        layer.backward(dy)
