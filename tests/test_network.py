"""Many layers at once: what is saved is loaded to the bit, or not at all; another configuration is noticed; optimizers get what they need."""

import io
import json
import pathlib
import signal
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from test_layers import same_state, trained

import cbn

RNG = np.random.default_rng(91)


def other_layer(inputs=3, outputs=4):
    """Of a user's own."""
    return SimpleNamespace(weight=RNG.normal(size=(inputs, outputs)).astype(np.float32), bias=np.zeros(outputs, np.float32))


def network():
    return {
        "conv": other_layer(),
        "bn1": trained(cbn.BatchNorm1d(3)),
        "block.bn2": trained(cbn.BatchNorm1d(3, 1e-3, 0.3, unbiased=False, activation=("clip", -1, 1), dtype=np.float64)),
        "bn3": trained(cbn.BatchNorm1d(3, affine=False, momentum=None)),
    }


def through_npz(state):
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    return np.load(file)


def through_safetensors(state):
    safetensors = pytest.importorskip("safetensors.numpy", reason="saves with safetensors")
    return safetensors.load(safetensors.save(state))


def arrays(layers):
    return {name: a for name, a in cbn.state_dict(layers).items() if name != "cbn.config"}


def test_names():
    layers = network()
    state = cbn.state_dict(layers)
    assert list(state)[:7] == [
        "conv.weight",
        "conv.bias",
        "bn1.weight",
        "bn1.bias",
        "bn1.running_mean",
        "bn1.running_var",
        "bn1.num_batches_tracked",
    ]
    assert list(state)[-4:] == ["bn3.running_mean", "bn3.running_var", "bn3.num_batches_tracked", "cbn.config"]
    same_state({name: state[f"bn1.{name}"] for name in layers["bn1"].state_dict()}, layers["bn1"].state_dict())
    assert not any(np.shares_memory(state[f"bn1.{name}"], getattr(layers["bn1"], name)) for name in ("weight", "running_var"))
    assert json.loads(state["cbn.config"].tobytes()) == {name: layer.config() for name, layer in layers.items() if name != "conv"}
    assert list(cbn.state_dict(layers, prefix="net.")) == ["net." + name for name in state]
    same_state(arrays({"": layers["bn1"]}), layers["bn1"].state_dict())


@pytest.mark.parametrize("through", [dict, through_npz, through_safetensors])
def test_saved_and_loaded(through):
    layers, fresh = network(), network()
    kept = {name: (layer.weight, layer.bias) for name, layer in fresh.items()}
    for layer in fresh.values():
        if layer.weight is not None:
            layer.weight[...] = layer.bias[...] = 0
    fresh["bn1"].reset_running_stats()
    assert cbn.load_state_dict(fresh, through(cbn.state_dict(layers))) == ([], [])
    same_state(arrays(fresh), arrays(layers))
    assert all(layer.weight is kept[name][0] and layer.bias is kept[name][1] for name, layer in fresh.items())


@pytest.mark.parametrize("through", [dict, through_npz, through_safetensors])
def test_training_goes_on_to_the_bit(through):
    def steps(layers, count, seed):
        rng = np.random.default_rng(seed)
        for _ in range(count):
            x = rng.normal(2, 3, (6, 3)).astype(np.float32)
            for layer in layers.values():
                x = layer(x)
            for layer in reversed(layers.values()):
                x = layer.backward(x)
            for _, array, gradient in cbn.parameters(layers):
                array -= 0.1 * gradient

    layers = {
        "a": cbn.BatchNorm1d(3, momentum=None, activation="sigmoid"),
        "b": cbn.BatchNorm1d(3, unbiased=False, stats_dtype=np.float64, activation="silu"),
        "c": cbn.BatchNorm1d(3, weight=False),
    }
    steps(layers, 4, 1)
    state = through(cbn.state_dict(layers))
    steps(layers, 4, 2)
    resumed = {name: cbn.BatchNorm.from_config(config) for name, config in json.loads(bytes(state["cbn.config"])).items()}
    cbn.load_state_dict(resumed, state)
    assert arrays(resumed)["a.weight"].tolist() != arrays(layers)["a.weight"].tolist()
    steps(resumed, 4, 2)
    same_state(arrays(resumed), arrays(layers))


def test_all_problems_at_once_and_nothing_changed():
    layers = network()
    state = cbn.state_dict(layers)
    changed = {name: a + 1 for name, a in state.items() if name != "cbn.config"}
    before = arrays(layers)
    changed |= {"bn1.weight": np.ones(4), "conv.weight": np.ones((3, 5)), "block.bn2.running_var": -np.ones(3), "extra": np.ones(3), 5: 1}
    del changed["bn3.running_mean"]
    layers["bn1"].bias.flags.writeable = False
    with pytest.raises(ValueError) as error:
        cbn.load_state_dict(layers, changed)
    text = str(error.value)
    assert text.startswith("Error(s) in loading state_dict for 4 layers:\n")
    for line in (
        'Missing key(s) in state_dict: "bn3.running_mean"',
        'Unexpected key(s) in state_dict: "extra", 5',
        "size mismatch for conv.weight: expected shape (3, 4), got (3, 5)",
        "size mismatch for bn1.weight: expected shape (3,), got (4,)",
        "bn1.bias: expected a writeable array, got a read-only one",
        "block.bn2.running_var: expected non-negative values, got -1.0 for channel 0 [eps=0.001]",
    ):
        assert "\t" + line + "\n" in text + "\n", line
    same_state(arrays(layers), before)
    layers["bn1"].bias.flags.writeable = True
    del state["bn3.running_mean"]
    assert cbn.load_state_dict(layers, state | {"extra": 1}, strict=False) == (["bn3.running_mean"], ["extra"])


def test_a_warning_that_is_an_error_changes_nothing():
    layers = {"a": cbn.BatchNorm1d(3), "b": cbn.BatchNorm1d(3)}
    state = {name: a + 2 for name, a in arrays(layers).items()} | {"b.running_var": [1, -1e-6, 1]}
    before = arrays(layers)
    with pytest.raises(UserWarning, match="^b.running_var: expected non-negative values, got -9.99.*e-07 for channel 1; computing with var"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cbn.load_state_dict(layers, state)
    same_state(arrays(layers), before)
    with pytest.warns(UserWarning, match=r"^b.running_var: expected non-negative"):
        cbn.load_state_dict(layers, state)


DIFFERENT = {
    "eps": (1e-3, "bn.eps: expected 1e-05, that of the layer, got 0.001"),
    "momentum": (0.01, "bn.momentum: expected 0.1, that of the layer, got 0.01"),
    "axis": (-1, "bn.axis: expected 1, that of the layer, got -1"),
    "unbiased": (False, "bn.unbiased: expected True, that of the layer, got False"),
    "activation": ("relu", "bn.activation: expected None, that of the layer, got 'relu'"),
}


@pytest.mark.parametrize("through", [dict, through_npz, through_safetensors])
@pytest.mark.parametrize("what", DIFFERENT)
def test_another_configuration(what, through):
    value, message = DIFFERENT[what]
    saved = trained(cbn.BatchNorm1d(3))
    setattr(saved, what, value)
    state = through(cbn.state_dict({"bn": saved}, prefix="net."))
    layer = cbn.BatchNorm1d(3)
    before = layer.state_dict()
    with pytest.raises(ValueError, match=message):
        cbn.load_state_dict({"bn": layer}, state, prefix="net.")
    same_state(layer.state_dict(), before)
    with pytest.warns(UserWarning, match=message):
        cbn.load_state_dict({"bn": layer}, state, strict=False, prefix="net.")
    same_state(layer.state_dict(), saved.state_dict())
    if what in ("eps", "momentum"):
        with pytest.raises(ValueError, match=message.removeprefix("bn.")):
            cbn.BatchNorm1d(3).load_state_dict(saved)


@pytest.mark.parametrize(
    "wrong", [np.zeros(3, np.uint8), np.ones(3), "x", 5, np.frombuffer(b"[1]", np.uint8), np.frombuffer(b'{"a": 1}', np.uint8)], ids=str
)
def test_wrong_configurations(wrong):
    layers = {"bn": cbn.BatchNorm1d(3)}
    with pytest.raises(ValueError, match="^cbn.config: expected the configurations of layers, as state_dict"):
        cbn.load_state_dict(layers, cbn.state_dict(layers) | {"cbn.config": wrong})


def test_prefix():
    layers = network()
    state = cbn.state_dict(layers, prefix="model.") | {"optimizer.step": np.ones(()), 5: None}
    fresh = network()
    with pytest.raises(ValueError, match='Unexpected.*"model.conv.weight"'):
        cbn.load_state_dict(fresh, state)
    assert cbn.load_state_dict(fresh, state, prefix="model.") == ([], [])
    same_state(arrays(fresh), arrays(layers))
    with pytest.raises(ValueError, match=r'Missing key\(s\) in state_dict: "conv.weight"'):
        cbn.load_state_dict(fresh, state, prefix="module.")
    with pytest.raises(TypeError, match="^prefix: expected a string, got 1"):
        cbn.load_state_dict(fresh, state, prefix=1)


def test_parameters():
    layers = network() | {"frozen": cbn.BatchNorm1d(3).freeze(), "half": cbn.BatchNorm1d(3, weight=False, frozen="statistics")}
    x = RNG.normal(size=(5, 3)).astype(np.float32)
    layers["bn1"](x), layers["bn1"].backward(x)
    layers["conv"].weight_grad = x
    expected = ["conv.weight", "conv.bias", "bn1.weight", "bn1.bias", "block.bn2.weight", "block.bn2.bias", "half.bias"]
    found = {name: (array, gradient) for name, array, gradient in cbn.parameters(layers)}
    assert list(found) == expected
    assert found["bn1.weight"][0] is layers["bn1"].weight and found["bn1.weight"][1] is layers["bn1"].weight_grad is not None
    assert found["conv.weight"][0] is layers["conv"].weight and found["conv.weight"][1] is x
    assert found["conv.bias"][1] is None and found["half.bias"][1] is None


@pytest.mark.parametrize("function", [cbn.state_dict, cbn.parameters, lambda layers: cbn.load_state_dict(layers, {}), cbn.to_torch])
@pytest.mark.parametrize(
    "layers, message",
    [
        ([cbn.BatchNorm1d(3)], "expected a mapping of names to layers, got list"),
        (cbn.BatchNorm1d(3), "expected a mapping of names to layers, got BatchNorm1d"),
        (
            {"a": 5, 3: cbn.BatchNorm1d(3), "b": cbn.BatchNorm1d},
            "expected a layer, .* for 'a', got 5; a name that is a string, got 3; a layer, .* for 'b', got <class",
        ),
    ],
    ids=["list", "layer", "junk"],
)
def test_wrong_layers(function, layers, message):
    with pytest.raises(TypeError, match="^layers: " + message):
        function(layers)


def test_wrong_sources():
    layers = {"bn": cbn.BatchNorm1d(3)}
    for wrong in (None, [1], 5, cbn.BatchNorm1d):
        for call in (lambda: cbn.load_state_dict(layers, wrong), lambda: layers["bn"].load_state_dict(wrong)):
            with pytest.raises(TypeError, match="^state_dict: expected a mapping of names to arrays, or a module, got"):
                call()
    with pytest.raises(TypeError, match="^strict: expected True or False"):
        cbn.load_state_dict(layers, {}, 1)


def test_loads_in_either_order():
    """Threads that load the same layers, named in other orders, wait for each other, and don't for ever."""
    layers = [cbn.BatchNorm1d(3) for _ in range(40)]
    states = [cbn.state_dict({str(i): layer for i, layer in enumerate(layers)}) for _ in range(2)]
    states = [{name: a if a.dtype == np.uint8 else np.full_like(a, i + 1) for name, a in state.items()} for i, state in enumerate(states)]

    def loads(order, state):
        for _ in range(100):
            cbn.load_state_dict({str(i): layers[i] for i in order}, state)

    threads = [threading.Thread(target=loads, args=(order, state)) for order, state in ((range(40), states[0]), (range(39, -1, -1), states[1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len({a[0] for layer in layers for a in (layer.weight, layer.running_var)}) == 1  # all of one state


CONFIGS = [
    dict(),
    dict(eps=1, momentum=None, affine=False),
    dict(track_running_stats=False, weight=False),
    dict(bias=False, axis=-1, unbiased=False, activation=("leaky_relu", np.float32(0.1))),
    dict(axis=np.int64(2), eps=np.float32(1e-3), dtype=np.float64, on_nonfinite="skip", frozen="all"),
    dict(stats_dtype="float64", activation="silu", frozen="statistics"),
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", [cbn.BatchNorm, cbn.BatchNorm1d, cbn.BatchNorm3d])
def test_configurations(kind, options):
    layer = kind(3, **options)
    config = json.loads(json.dumps(layer.config()))
    assert config == layer.config() and config["class"] == kind.__name__
    other = cbn.BatchNorm.from_config(config)
    assert type(other) is kind and repr(other) == repr(layer) == repr(eval(repr(layer), vars(cbn))) and other.config() == config
    same_state(other.state_dict(), layer.state_dict())
    assert kind.from_config({name: value for name, value in config.items() if name != "class"}).config() == config


class Own(cbn.BatchNorm2d):
    pass


def test_classes_of_configurations():
    assert type(cbn.BatchNorm.from_config(Own(3).config())) is Own
    for wrong, message in (("BatchNorm1d", "'BatchNorm1d'"), (["x"], r"\['x'\]"), ("Layer", "'Layer'")):
        with pytest.raises(ValueError, match="^config: expected a class among BatchNorm2d, Own, got " + message):
            cbn.BatchNorm2d.from_config({"class": wrong, "num_features": 3})
    with pytest.raises(TypeError, match="^config: expected a mapping of names to values, got list"):
        cbn.BatchNorm.from_config([3])
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        cbn.BatchNorm.from_config({"num_features": 3, "epsilon": 1})
    with pytest.raises(TypeError, match="^eps: expected a real number"):
        cbn.BatchNorm.from_config({"num_features": 3, "eps": "1"})


@pytest.mark.parametrize("training", [True, False])
def test_a_bias_without_a_weight(training):
    layer = cbn.BatchNorm1d(3, weight=False).train(training)
    layer.bias[...], layer.running_var[...] = [1, 2, 3], 2
    x, dy = RNG.normal(size=(2, 6, 3)).astype(np.float32)
    assert layer.weight is None and "weight" not in layer.state_dict() and "weight=False" in repr(layer)
    expected = cbn.batch_norm(x, layer.running_mean.copy(), layer.running_var.copy(), None, layer.bias, training)
    stats = cbn.batch_stats(x) if training else (layer.running_mean.copy(), layer.running_var.copy())
    np.testing.assert_array_equal(layer(x), expected)
    gradients = cbn.batch_norm_backward(dy, x, stats, None, layer.bias, training=training)
    np.testing.assert_array_equal(layer.backward(dy), gradients.x)
    np.testing.assert_array_equal(layer.bias_grad, gradients.bias)
    assert layer.weight_grad is None
    layer.reset_parameters()
    assert layer.weight is None and not layer.bias.any()


def test_example():
    pytest.importorskip("sklearn", reason="the example's digits are in scikit-learn")
    example = pathlib.Path(__file__).parents[1] / "examples" / "resume.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=True)
    assert "resumed from npz: " in done.stdout and done.stdout.count("the same bits") >= 1 and "other bits" not in done.stdout
    assert "1.eps: expected 0.001, that of the layer, got 1e-05" in done.stdout


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="interrupts itself by a timer")
def test_interrupted_loads():
    """By a signal's handler that raises: all layers are loaded or none, and their locks are free."""
    layers = {str(i): cbn.BatchNorm1d(50) for i in range(30)}
    states = [{name: np.full_like(a, i + 1) for name, a in arrays(layers).items()} for i in range(2)]

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for i in range(400):
            try:
                signal.setitimer(signal.ITIMER_REAL, RNG.uniform(1e-5, 3e-3))
                for _ in range(20):
                    cbn.load_state_dict(layers, states[i % 2])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            assert len({value for a in arrays(layers).values() for value in np.unique(a)}) == 1 or i == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 50
    thread = threading.Thread(target=cbn.load_state_dict, args=(layers, states[0]), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
