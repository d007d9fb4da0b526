"""Frozen layers: statistics, or all parameters, stay as they are in a network that trains."""

import pickle

import numpy as np
import pytest

import cbn

ACTIVATIONS = [None, "relu", ("leaky_relu", 0.125), "hard_swish", "sigmoid", "silu"]
LAYOUTS = [((3, 5, 7), 1), ((2, 64, 9, 9), 1), ((1030, 3), 1), ((9, 7, 100), -1), ((1, 2, 5001), 1)]


def draw(shape, axis, dtype=np.float32):
    """x, dy, a residual, weight, bias, and a mean and variance."""
    rng = np.random.default_rng(41)
    weight, bias, mean = rng.normal(0.2, 1, (3, shape[axis]))
    return *rng.normal(0.5, 2, (3, *shape)).astype(dtype), weight, bias, mean, rng.uniform(0.5, 2, shape[axis])


def layer_of(shape, axis, weight, bias, mean, var, **options):
    layer = cbn.BatchNorm(shape[axis], axis=axis, **options)
    layer.load_state_dict({"weight": weight, "bias": bias, "running_mean": mean, "running_var": var})
    return layer


def same(a, b):
    assert (a is None) == (b is None)
    if a is not None:
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape, axis", LAYOUTS, ids=str)
def test_without_gradients_of_weight_and_bias(shape, axis, dtype, activation, with_residual, isa, threads):
    """affine_grad=False leaves the bits of the other gradients as they are."""
    x, dy, residual, weight, bias, mean, var = draw(shape, axis, dtype)
    options = {"axis": axis, "activation": activation, "residual": residual if with_residual else None}
    for training in (False, True):
        expected = cbn.batch_norm_backward(dy, x, (mean, var), weight, bias, training=training, **options)
        for out in (None, dy.copy()):
            given = dy if out is None else out
            g = cbn.batch_norm_backward(given, x, (mean, var), weight, bias, training=training, affine_grad=False, out=out, **options)
            assert out is None or g.x is out
            assert g.weight is g.bias is None
            same(g.x, expected.x)
            same(g.residual, expected.residual)


def test_input_without_memory():
    """With constant statistics and no activation, of x only shape and dtype matter, and the result takes dy's order of memory."""
    x, dy, _, weight, _, mean, var = draw((4, 3, 5, 6), 1)
    expected = cbn.batch_norm_backward(dy, x, (mean, var), weight, training=False).x
    nothing = np.broadcast_to(np.float32(np.nan), x.shape)
    for given in (dy, dy.astype(">f4"), np.asfortranarray(dy), dy[:, :, ::-1].copy()[:, :, ::-1]):
        g = cbn.batch_norm_backward(given, nothing, (mean, var), weight, training=False, affine_grad=False)
        np.testing.assert_array_equal(g.x, expected)
    last = np.ascontiguousarray(dy.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert cbn.batch_norm_backward(last, nothing, (mean, var), weight, training=False, affine_grad=False).x.strides == last.strides
    for wrong, error in ((dy[:2], ValueError), (dy.astype(np.float64), TypeError)):
        with pytest.raises(error, match="^dy: expected"):
            cbn.batch_norm_backward(wrong, nothing, (mean, var), weight, training=False, affine_grad=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("frozen", ["statistics", "all"])
def test_layer(frozen, activation, with_residual, training):
    shape, axis = (4, 6, 5, 7), 1
    x, dy, residual, *parameters = draw(shape, axis)
    residual = residual if with_residual else None
    layer = layer_of(shape, axis, *parameters, activation=activation).freeze(affine=frozen == "all").train(training)
    assert layer.frozen == frozen and layer.training == training
    before = layer.state_dict()
    stats = layer.running_mean, layer.running_var
    same(layer(x, residual=residual), cbn.batch_norm(x, *stats, layer.weight, layer.bias, activation=activation, residual=residual))
    dx = layer.backward(dy)
    g = cbn.batch_norm_backward(dy, x, stats, layer.weight, layer.bias, training=False, activation=activation, residual=residual)
    same(dx, g.x)
    same(layer.residual_grad, g.residual)
    same(layer.weight_grad, g.weight if frozen == "statistics" else None)
    same(layer.bias_grad, g.bias if frozen == "statistics" else None)
    for name, array in layer.state_dict().items():
        same(array, before[name])


def test_training_the_network_does_not_unfreeze():
    shape, axis = (4, 6, 5, 7), 1
    x, dy, _, *parameters = draw(shape, axis)
    layer, twin = layer_of(shape, axis, *parameters, frozen="statistics"), layer_of(shape, axis, *parameters)
    assert layer.training
    y = layer.eval()(x)
    layer.train()
    same(layer(x), y)
    assert layer.num_batches_tracked == 0
    assert layer.unfreeze() is layer and layer.frozen is None
    same(layer(x), twin(x))
    same(layer.backward(dy), twin.backward(dy))
    assert layer.num_batches_tracked == 1
    same(layer.running_var, twin.running_var)


def test_the_call_decides_what_backward_does():
    """Freezing or unfreezing after a call is as changing the mode after it."""
    shape, axis = (4, 6, 5, 7), 1
    x, dy, _, *parameters = draw(shape, axis)
    layer, twin = layer_of(shape, axis, *parameters), layer_of(shape, axis, *parameters)
    layer(x), twin(x)
    same(layer.freeze().backward(dy), twin.backward(dy))
    same(layer.weight_grad, twin.weight_grad)
    layer(x)
    dx = layer.backward(dy, retain=True)
    assert layer.weight_grad is layer.bias_grad is None
    same(layer.unfreeze().backward(dy), dx)
    assert layer.weight_grad is None


def test_what_is_kept_of_the_input():
    shape, axis = (4, 6, 5, 7), 1
    x, dy, residual, *parameters = draw(shape, axis)
    layer = layer_of(shape, axis, *parameters, frozen="statistics")
    layer(x.copy())
    dx = layer.backward(dy)  # the network trains: the input lives as long as it is needed
    layer.freeze()
    for mode in (layer.train, layer.eval):
        mode()
        layer(x.copy())  # the input isn't needed
        same(layer.backward(dy), dx)
        out = x.copy()
        assert layer(out, residual=residual, out=out) is out
        same(layer.backward(dy), dx)
        same(layer.residual_grad, dy)
        layer(out, out=out)
        with pytest.raises(ValueError, match="^dy: expected shape"):
            layer.backward(dy[:2])
    layer.activation = "relu"
    layer(x.copy())
    with pytest.raises(RuntimeError, match="^backward: expected a call"):
        layer.backward(dy)  # in eval mode
    out = x.copy()
    layer.train()(out, out=out)
    with pytest.raises(RuntimeError, match="^backward: expected a call"):
        layer.backward(dy)


def test_without_weight_and_bias():
    x, dy, *_ = draw((4, 3, 5), 1)
    layer = cbn.BatchNorm1d(3, affine=False, frozen="statistics")
    layer.running_var[...] = 3
    layer(x)
    same(layer.backward(dy), cbn.batch_norm_backward(dy, x, (layer.running_mean, layer.running_var), training=False).x)
    assert layer.weight_grad is layer.bias_grad is None


def test_empty_batch():
    layer = cbn.BatchNorm1d(3, frozen="all")
    layer.running_var[...] = 3
    empty = np.ones((0, 3, 5), np.float32)
    assert layer(empty).shape == layer.backward(empty).shape == empty.shape


@pytest.mark.parametrize("frozen", ["statistics", "all"])
def test_state_copies_and_repr(frozen):
    layer = cbn.BatchNorm2d(3, frozen=frozen)
    assert list(layer.state_dict()) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    layer.load_state_dict({**layer.state_dict(), "running_mean": [1, 2, 3]})
    assert layer.running_mean.tolist() == [1, 2, 3]
    assert repr(layer).endswith(f", frozen={frozen!r})")
    for other in (eval(repr(layer), vars(cbn)), pickle.loads(pickle.dumps(layer))):
        assert other.frozen == frozen and repr(other) == repr(layer)
    assert "frozen" not in repr(layer.unfreeze())


def test_warning_where_statistics_were_never_updated():
    x, *_ = draw((4, 3, 5), 1)
    with pytest.warns(UserWarning, match="^BatchNorm1d frozen uses running statistics that were never updated") as record:
        cbn.BatchNorm1d(3, frozen="all")(x)
    assert record[0].filename == __file__


def test_one_value_per_channel():
    """Frozen statistics need no variance of the batch, in training mode either."""
    layer = layer_of((1, 3), 1, *draw((1, 3), 1)[3:], frozen="statistics")
    x = np.ones((1, 3), np.float32)
    same(layer(x), cbn.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias))


@pytest.mark.parametrize("frozen", [True, "affine", 1, ["all"]], ids=str)
def test_wrong_frozen(frozen):
    with pytest.raises(ValueError, match='^frozen: expected None, "statistics" or "all", got'):
        cbn.BatchNorm1d(3, frozen=frozen)
    layer = cbn.BatchNorm1d(3)
    with pytest.raises(ValueError, match='^frozen: expected None, "statistics" or "all", got'):
        layer.frozen = frozen
    assert layer.frozen is None


def test_nothing_to_freeze():
    layer = cbn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="^frozen: expected None where there are no running statistics"):
        layer.freeze()
    assert layer.frozen is None
    with pytest.raises(ValueError, match="^frozen: expected None where there are no running statistics"):
        cbn.BatchNorm1d(3, track_running_stats=False, frozen="all")


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("frozen", ["statistics", "all"])
def test_finite_differences(frozen, activation):
    x, dy, residual, *parameters = draw((4, 3, 5), 1, np.float64)
    layer = layer_of((4, 3, 5), 1, *parameters, dtype=np.float64, activation=activation, frozen=frozen)
    layer(x, residual=residual)
    found = {"x": layer.backward(dy), "residual": layer.residual_grad, "weight": layer.weight_grad, "bias": layer.bias_grad}
    arrays = {"x": x, "residual": residual, "weight": layer.weight, "bias": layer.bias}
    for name, array in arrays.items():
        if frozen == "all" and name in ("weight", "bias"):
            assert found[name] is None
            continue
        expected = np.empty_like(array)
        for i in np.ndindex(array.shape):
            losses, before = [], array[i]
            for step in (1e-6, -1e-6):
                array[i] = before + step
                losses.append((dy * layer(x, residual=residual)).sum())
            array[i] = before
            expected[i] = (losses[0] - losses[1]) / 2e-6
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["statistics", "all"])
def test_pytorch(frozen):
    """A network in training mode whose batch normalization is in eval mode; for "all", whose parameters require no gradients."""
    torch = pytest.importorskip("torch")
    x, dy, _, *parameters = draw((4, 6, 5, 7), 1, np.float64)
    layer = layer_of((4, 6, 5, 7), 1, *parameters, dtype=np.float64, frozen=frozen)
    module = torch.nn.BatchNorm2d(6, dtype=torch.float64).eval()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in layer.state_dict().items()})
    module.requires_grad_(frozen == "statistics")
    tensor = torch.tensor(x, requires_grad=True)
    y = module(tensor)
    y.backward(torch.tensor(dy))
    np.testing.assert_allclose(layer(x), y.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.backward(dy), tensor.grad.numpy(), rtol=1e-12, atol=1e-12)
    for name in ("weight", "bias"):
        grad, expected = getattr(layer, name + "_grad"), getattr(module, name).grad
        assert (grad is None) == (expected is None)
        if grad is not None:
            np.testing.assert_allclose(grad, expected.numpy(), rtol=1e-12, atol=1e-12)
