"""cbn.keras.BatchNormalization beside Keras' own layer, on each backend that is installed: results, gradients, training, files."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from interpreter import python

import cbn

os.environ.setdefault("KERAS_BACKEND", "numpy")
keras = pytest.importorskip("keras", reason="the layer is one of Keras'")
import cbn.keras

BACKEND = keras.backend.backend()
SEEDS = range(4 if BACKEND == "jax" else 12)       # of JAX, which compiles each operation of each shape
POLICIES = ["float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16"]
differentiable = pytest.mark.skipif(BACKEND == "numpy", reason="Keras has no gradients on NumPy")
masks = pytest.mark.skipif(BACKEND == "jax", reason="masks are refused on JAX")

if BACKEND == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)


@pytest.mark.skipif("CBN_TEST_KERAS" in os.environ, reason="this is one of them")
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_on_other_backends(backend):
    """All tests of this file, in a process of its own."""
    if backend == BACKEND or importlib.util.find_spec(backend) is None:
        pytest.skip("is not another one that is installed")
    done = python(f"import pytest; raise SystemExit(pytest.main(['-q', {__file__!r}]))", 900, KERAS_BACKEND=backend, CBN_TEST_KERAS="1")
    assert done.returncode == 0, done.stdout


def array(tensor):
    return keras.ops.convert_to_numpy(tensor).astype(float)


def close(actual, expected, dtype):
    """To what Keras' own sums of squares in float32 (in float64, too) are worth, or to roundings of 16-bit floats."""
    tolerance = 2.0 ** -{"float32": 13, "float64": 13, "float16": 9, "bfloat16": 6}[dtype]
    expected = array(expected)
    np.testing.assert_allclose(array(actual), expected, rtol=tolerance, atol=tolerance * abs(expected).max(initial=1))


def drawn(seed, policy="float32"):
    """An input, and layers of Keras and of cbn of the same drawn arguments and weights."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(4, 9)), *(int(n) for n in rng.integers(1, 6, rng.integers(1, 4))))
    arguments = {
        "axis": int(rng.choice([-1, len(shape) - 1, 1])), "momentum": float(rng.choice([0.0, 0.5, 0.9, 0.99])),
        "epsilon": float(rng.choice([1e-5, 1e-3, 0.1])), "center": bool(rng.integers(2)), "scale": bool(rng.integers(2)), "dtype": policy,
    }  # fmt: skip
    x = rng.normal(1, 2, shape)
    layers = keras.layers.BatchNormalization(**arguments), cbn.keras.BatchNormalization(**arguments)
    for layer in layers:
        layer.build(shape)
    layers[0].set_weights([rng.random(w.shape).astype(w.dtype) + 0.5 for w in layers[0].get_weights()])
    layers[1].set_weights(layers[0].get_weights())
    return rng, x, *layers


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_results_and_moving_statistics(seed, policy):
    rng, x, theirs, ours = drawn(seed, policy)
    for step in range(4):
        for training in (True, False, None):
            expected, actual = (layer(x + step, training=training) for layer in (theirs, ours))
            assert type(actual) is type(expected) and actual.dtype == expected.dtype
            close(actual, expected, theirs.compute_dtype)
        for v, w in zip(ours.weights, theirs.weights, strict=True):
            assert (v.name, v.dtype, v.trainable) == (w.name, w.dtype, w.trainable)
            close(v, w, theirs.variable_dtype)


def gradients(layer, x, dy, training, **options):
    """Of inputs and trainable variables."""
    dtype = layer.compute_dtype
    if BACKEND == "torch":
        x = keras.ops.convert_to_tensor(x, dtype).requires_grad_()
        layer.zero_grad()
        layer(x, training=training, **options).backward(keras.ops.convert_to_tensor(dy, dtype))
        return [x.grad, *(v.value.grad for v in layer.trainable_variables)]
    values = [[v.value for v in variables] for variables in (layer.trainable_variables, layer.non_trainable_variables)]
    call = lambda x, trainable: layer.stateless_call(trainable, values[1], x, training=training, **options)[0]
    dx, dtrainable = jax.vjp(call, keras.ops.convert_to_tensor(x, dtype), values[0])[1](keras.ops.convert_to_tensor(dy, dtype))
    return [dx, *dtrainable]


@differentiable
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_gradients(seed, policy):
    rng, x, theirs, ours = drawn(seed, policy)
    dy = rng.standard_normal(x.shape)
    for training in (True, False):
        for ours_, theirs_ in zip(gradients(ours, x, dy, training), gradients(theirs, x, dy, training), strict=True):
            assert ours_.dtype == theirs_.dtype
            close(ours_, theirs_, theirs.compute_dtype)
    ours.trainable = theirs.trainable = False
    close(gradients(ours, x, dy, True)[0], gradients(theirs, x, dy, True)[0], theirs.compute_dtype)


def network(layer):
    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(4, 3, use_bias=False),
        layer(momentum=0.8, gamma_regularizer="l2", beta_constraint="non_neg"),
        keras.layers.ReLU(),
        keras.layers.Flatten(),
        keras.layers.Dense(5),
        layer(scale=False),
        keras.layers.Dense(2),
    ])  # fmt: skip


def data():
    rng = np.random.default_rng(0)
    return rng.normal(1, 2, (41, 8, 8, 1)).astype(np.float32), rng.standard_normal((41, 2)).astype(np.float32)


@differentiable
def test_continued_training():
    """The same losses and weights, epoch by epoch, by fit; the last batch has one sample, which leaves the second layer one value a channel."""
    theirs, ours = network(keras.layers.BatchNormalization), network(cbn.keras.BatchNormalization)
    ours.set_weights(theirs.get_weights())
    x, y = data()
    x, y = (x[:-1], y[:-1]) if BACKEND == "jax" else (x, y)
    losses = []
    for model in (theirs, ours):
        model.compile(keras.optimizers.SGD(0.01, momentum=0.5), "mse")
        losses.append(model.fit(x, y, batch_size=10, epochs=4, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[1][-1] < losses[1][0]
    for v, w in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(v, w, rtol=1e-3, atol=1e-4)


def test_files_and_configuration(tmp_path):
    """Models and weights are saved and loaded, also from one layer into the other; a model of Keras' layers is cloned into cbn's."""
    theirs, (x, _) = network(keras.layers.BatchNormalization), data()
    for layer in theirs.layers:
        layer.set_weights([np.random.default_rng(0).random(w.shape) + 0.5 for w in layer.get_weights()])
    kinds = {keras.layers.BatchNormalization: cbn.keras.BatchNormalization}
    ours = keras.models.clone_model(theirs, clone_function=lambda layer: kinds.get(type(layer), type(layer)).from_config(layer.get_config()))
    ours.set_weights(theirs.get_weights())
    expected = theirs.predict(x, verbose=0)
    np.testing.assert_allclose(ours.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
    assert [type(layer).__module__ for layer in ours.layers].count("cbn.keras") == 2
    assert keras.saving.get_registered_name(cbn.keras.BatchNormalization) == "cbn>BatchNormalization"
    assert [layer.get_config() for layer in ours.layers] == [layer.get_config() for layer in theirs.layers]
    ours.save(tmp_path / "ours.keras")
    loaded = keras.models.load_model(tmp_path / "ours.keras")
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in ours.layers]
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), ours.predict(x, verbose=0))
    ours.save_weights(tmp_path / "a.weights.h5")
    other = network(keras.layers.BatchNormalization)
    other.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(other.predict(x, verbose=0), expected)
    other.save_weights(tmp_path / "b.weights.h5")
    loaded.load_weights(tmp_path / "b.weights.h5")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), ours.predict(x, verbose=0))


@masks
@pytest.mark.parametrize("seed", range(8))
def test_masks(seed):
    """As Keras, but for the 1e-7 that it adds to the number of values; what is left out may be anything."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(2, 6)), *(int(n) for n in rng.integers(2, 6, rng.integers(1, 3))))
    x, mask = rng.normal(3, 2, shape), rng.random(shape[:-1]) < 0.7
    mask.flat[:2] = True
    theirs, ours = (layer(momentum=0.5, dtype="float64") for layer in (keras.layers.BatchNormalization, cbn.keras.BatchNormalization))
    close(ours(x, training=True, mask=mask), theirs(x, training=True, mask=mask), "float32")
    for v, w in zip(ours.weights, theirs.weights, strict=True):
        close(v, w, "float32")
    inside = cbn.keras.BatchNormalization(momentum=0.5, dtype="float64")
    y = inside(x[mask], training=True)
    x[~mask] = 1e9
    np.testing.assert_allclose(array(ours(x, training=True, mask=mask))[mask], array(y), rtol=1e-12, atol=1e-12)
    if BACKEND == "torch":
        x[~mask] = 7
        dy = rng.standard_normal(shape)
        for a, b in zip(gradients(ours, x, dy, True, mask=mask), gradients(theirs, x, dy, True, mask=mask), strict=True):
            close(a, b, "float32")


@masks
def test_masks_from_other_layers():
    """Masking's, as recurrent networks use it; one that leaves nothing changes nothing."""
    x = np.random.default_rng(0).standard_normal((3, 4, 2)).astype(np.float32)
    x[1:, 2:] = 0
    outputs = []
    for layer in (keras.layers.BatchNormalization(), cbn.keras.BatchNormalization()):
        model = keras.Sequential([keras.Input((4, 2)), keras.layers.Masking(), layer])
        outputs.append(model(x, training=True))
    close(outputs[1], outputs[0], "float32")
    before = layer.get_weights()
    np.testing.assert_array_equal(array(layer(x, training=True, mask=np.zeros((3, 4), bool))), array(layer(x)))
    np.testing.assert_array_equal(layer.get_weights(), before)


def test_few_values():
    """One value a channel has variance 0, as in Keras; none leave the layer as it was."""
    theirs, ours = (layer(momentum=0.5) for layer in (keras.layers.BatchNormalization, cbn.keras.BatchNormalization))
    x = np.full((1, 3), 2, np.float32)
    if BACKEND == "jax":
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            ours(x, training=True)
    else:
        close(ours(x, training=True), theirs(x, training=True), "float32")
        close(ours.moving_variance, theirs.moving_variance, "float32")
        if BACKEND == "torch":
            assert not gradients(ours, x, x, True)[0].any()
    before = ours.get_weights()
    assert ours(x[:0], training=True).shape == (0, 3)
    np.testing.assert_array_equal(ours.get_weights(), before)


def test_offset():
    """Exact where float32 sums of squares have no digit left."""
    x = (np.random.default_rng(0).standard_normal((64, 4)) + 1e6).astype(np.float32)
    layer = cbn.keras.BatchNormalization(momentum=0.0, epsilon=1e-5)
    y = array(layer(x, training=True))
    exact = (x - x.mean(0, dtype=float)) / np.sqrt(x.var(0, dtype=float) + 1e-5)
    np.testing.assert_allclose(y, exact, atol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), x.var(0, dtype=float), rtol=1e-6)


def test_float64():
    """Is computed in float64."""
    x, dy = np.random.default_rng(0).normal(3, 2, (2, 64, 4))
    layer = cbn.keras.BatchNormalization(momentum=0.0, dtype="float64")
    np.testing.assert_array_equal(array(layer(x, training=True)), cbn.batch_norm_train(x, np.ones(4), np.zeros(4), 1e-3)[0])
    np.testing.assert_allclose(array(layer.moving_mean), x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(array(layer.moving_variance), x.var(0), rtol=1e-14)
    if BACKEND != "numpy":
        expected = cbn.batch_norm_backward(dy, x, cbn.batch_stats(x), np.ones(4), np.zeros(4), 1e-3)
        for a, b in zip(gradients(layer, x, dy, True), expected, strict=True):
            np.testing.assert_allclose(array(a), b, rtol=1e-12, atol=1e-12)


def test_integers():
    x = np.random.default_rng(0).integers(0, 100, (6, 3))
    close(cbn.keras.BatchNormalization()(x, training=True), keras.layers.BatchNormalization()(x.astype(np.float32), training=True), "float32")


def test_errors():
    with pytest.raises(ValueError, match="synchronized=True is only supported"):
        cbn.keras.BatchNormalization(synchronized=True)
    with pytest.raises(ValueError, match="renorm: expected False"):
        cbn.keras.BatchNormalization(renorm=True)
    layer, x = cbn.keras.BatchNormalization(), np.ones((2, 3, 4), np.float32)
    before = layer(x) is not None and layer.get_weights()
    with pytest.raises(ValueError, match=r"mask: expected (shape \(2, 3\)|None with the JAX backend).*got"):
        layer(x, training=True, mask=np.ones((2, 1), bool))
    with pytest.raises(ValueError, match=r"mask: expected None .* where the channels aren't the last axis"):
        cbn.keras.BatchNormalization(axis=1)(x, training=True, mask=np.ones((2, 4), bool))
    with pytest.raises(ValueError, match="eps must be positive"):
        cbn.keras.BatchNormalization(epsilon=0)(x, training=True)
    np.testing.assert_array_equal(layer.get_weights(), before)
    if BACKEND == "torch":
        import torch

        x = torch.randn(4, 3, requires_grad=True)
        (dx,) = torch.autograd.grad((cbn.keras.BatchNormalization()(x, training=True) ** 3).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@pytest.mark.skipif(BACKEND != "torch", reason="is run once")
def test_example():
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    example = pathlib.Path(__file__).parents[1] / "examples" / "keras_network.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=True)
    assert done.stdout.count("100.0% of the predictions are the same") == 2, done.stdout


def test_other_backends_are_refused():
    done = python("import keras; keras.backend.backend = lambda: 'tensorflow'\nimport cbn.keras", KERAS_BACKEND="numpy")
    assert 'ImportError: cbn.keras: expected Keras with the backend "numpy", "torch" or "jax", got "tensorflow"' in done.stderr


def test_import_of_cbn_alone():
    assert python("import sys; assert 'keras' not in sys.modules").returncode == 0
