"""Keras' networks, drawn: weights of models and files taken over, outputs and further training agree with Keras' own; and weights handed back."""

import os

import numpy as np
import perceptron
import pytest

import cbn

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="compares with Keras' networks")
pytest.importorskip("h5py", reason="reads Keras' files")
if keras.backend.backend() == "numpy":
    pytest.skip("Keras' NumPy backend doesn't train", allow_module_level=True)
L = keras.layers
ONCE, TRAINED = 1e-5, 1e-4  # of results: Keras normalizes in float32, also what is float64


@pytest.fixture(autouse=True)
def in_float64():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def network(seed):
    keras.utils.set_random_seed(seed)
    rng, hidden = perceptron.drawn(seed)
    layers = [L.Input((perceptron.INPUTS,))]
    for width, eps, momentum, scale, center in hidden:
        layers += [L.Dense(width), L.BatchNormalization(epsilon=eps, momentum=1 - momentum, scale=scale, center=center), L.ReLU()]
    net = keras.Sequential([*layers, L.Dense(perceptron.OUTPUTS)])
    train(net, perceptron.batches(rng))
    return rng, net


def train(net, data):
    net.compile(keras.optimizers.SGD(perceptron.RATE), "mse")
    for x, target in data:
        net.train_on_batch(x, target)


def infer(net, x):
    return keras.ops.convert_to_numpy(net(x, training=False))


def taken_over(net, norms):
    layers = {}
    for layer in net.layers:
        if isinstance(layer, L.Dense):
            layers[layer.name] = perceptron.Dense(*layer.get_weights())
        elif layer.name in norms:
            layers[layer.name] = norms[layer.name]
            layers[layer.name].activation = "relu"
    return layers


@pytest.mark.parametrize("seed", range(12))
def test_training_goes_on(seed):
    rng, net = network(seed)
    norms = cbn.from_keras(net)
    layers = taken_over(net, norms)
    assert sum(isinstance(layer, L.BatchNormalization) for layer in net.layers) == len(norms)
    x = rng.normal(1, 2, (5, perceptron.INPUTS))
    perceptron.close(perceptron.forward(layers, x), infer(net, x), ONCE)
    data = perceptron.batches(rng)
    perceptron.train(layers, data)
    train(net, data)
    for name, (config, weights) in cbn.to_keras(norms).items():
        own = net.get_layer(name)
        assert {key: own.get_config()[key] for key in config} == pytest.approx(config)
        for array, expected in zip(weights, own.get_weights(), strict=True):
            perceptron.close(array, expected, TRAINED)
    perceptron.close(perceptron.forward(layers, x), infer(net, x), TRAINED)
    for name, (_, weights) in cbn.to_keras(norms).items():
        net.get_layer(name).set_weights([a + 1 for a in weights])  # seen to be handed back
        norms[name].load_state_dict({key: a + 1 for key, a in norms[name].state_dict().items()})
    perceptron.close(perceptron.forward(layers, x), infer(net, x), TRAINED)


def images():
    """A model with models and wrappers in it, and each kind of batch normalization."""
    keras.utils.set_random_seed(1)
    inner = keras.Sequential([L.Input((6, 6, 4)), L.Conv2D(4, 3), L.BatchNormalization(scale=False)], name="inner")
    twice = L.BatchNormalization(name="twice")
    x = start = L.Input((8, 8, 3))
    x = L.BatchNormalization(name="first", epsilon=1e-4, momentum=0.9)(L.Conv2D(4, 3)(x))
    x = L.BatchNormalization(axis=1, center=False)(inner(x))
    x = L.BatchNormalization(trainable=False)(x)
    x = twice(L.ReLU()(twice(x)))
    x = L.Reshape((16, 4))(x)
    x = L.TimeDistributed(L.BatchNormalization(name="in_time"))(x)
    net = keras.Model(start, x)
    rng = np.random.default_rng(2)
    net.set_weights([rng.uniform(0.5, 2, w.shape) for w in net.get_weights()])
    return net


NAMES = ["batch_normalization_1", "batch_normalization_2", "first", "inner.batch_normalization", "time_distributed.in_time", "twice"]


def test_files_and_models(tmp_path):
    keras.backend.clear_session()  # names are counted from here
    net = images()
    net.save(tmp_path / "net.keras")
    net.save_weights(tmp_path / "net.weights.h5")
    again = keras.models.load_model(tmp_path / "net.keras")
    sources = [
        cbn.from_keras(net),
        cbn.from_keras(again),
        cbn.from_keras(tmp_path / "net.keras"),
        cbn.from_keras(str(tmp_path / "net.weights.h5"), net.to_json()),
        cbn.from_keras(tmp_path / "net.weights.h5", net.get_config()),
        cbn.from_keras({variable.path: keras.ops.convert_to_numpy(variable) for variable in net.weights}, net.get_config()),
    ]
    for layers in sources:
        assert sorted(layers) == NAMES
        for name, layer in layers.items():
            assert layer.config() == sources[0][name].config(), name
            for key, array in layer.state_dict().items():
                np.testing.assert_array_equal(array, sources[0][name].state_dict()[key])
    layers = sources[0]
    assert (layers["first"].eps, layers["first"].momentum, layers["first"].axis) == (1e-4, 0.1, -1)
    assert layers["inner.batch_normalization"].weight is None and layers["batch_normalization_1"].bias is None
    assert layers["batch_normalization_1"].axis == 1 and layers["batch_normalization_2"].frozen == "all"
    assert list(cbn.from_keras(tmp_path / "net.keras", prefix="inner.")) == ["batch_normalization"]
    for name in ("first", "batch_normalization_1", "batch_normalization_2"):
        own = net.get_layer(name)
        given, expected = keras.Model(net.inputs, [own.input, own.output])(np.random.default_rng(3).normal(size=(2, 8, 8, 3)), training=False)
        perceptron.close(layers[name](keras.ops.convert_to_numpy(given)), keras.ops.convert_to_numpy(expected), ONCE)


def test_wrong_files(tmp_path):
    import h5py

    net = images()
    net.save_weights(tmp_path / "net.weights.h5")
    with pytest.raises(TypeError, match="^config: expected the model's"):
        cbn.from_keras(tmp_path / "net.weights.h5")
    with pytest.raises(FileNotFoundError):
        cbn.from_keras(tmp_path / "none.weights.h5", net.get_config())
    with h5py.File(tmp_path / "net.weights.h5", "a") as file:
        group = file["layers/batch_normalization/vars"]
        del group["3"]
        group = file["layers/sequential/layers/batch_normalization/vars"]
        group["3"] = np.ones(4)
    with pytest.raises(ValueError) as error:
        cbn.from_keras(tmp_path / "net.weights.h5", net.get_config())
    assert "\n\tfirst: expected moving_variance, too, got gamma, beta, moving_mean" in str(error.value)
    assert "\n\tinner.batch_normalization" in str(error.value)
    assert str(error.value).endswith(": expected gamma, beta, moving_mean, moving_variance, and no 3")
    with h5py.File(tmp_path / "net.weights.h5", "a") as file:
        del file["vars"].attrs["name"]
    with pytest.raises(ValueError, match="^source: expected a file of Keras 3 in which layers have names, got one without"):
        cbn.from_keras(tmp_path / "net.weights.h5", net.get_config())
    with pytest.raises(ValueError, match="^from_keras: expected a batch normalization, got"):
        cbn.from_keras(keras.Sequential([L.Input((3,)), L.Dense(2)]))


def test_types():
    """Of half precision, Keras keeps the parameters in float32, or in the type of all variables."""
    for dtype in ("mixed_float16", "mixed_bfloat16", "bfloat16", "float16"):
        net = keras.Sequential([L.Input((4,)), L.BatchNormalization(dtype=dtype, name="bn")])
        (layer,) = cbn.from_keras(net).values()
        assert layer.dtype == layer.stats_dtype == np.float32 and layer.running_var.tolist() == [1] * 4
