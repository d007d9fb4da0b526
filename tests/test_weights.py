"""Trained weights in each framework's layout, made by hand: what is taken over, and the message for each way to get it wrong."""

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from interpreter import FOLDER
from ml_dtypes import bfloat16
from test_layers import same_state, trained

import cbn

RNG = np.random.default_rng(92)
C = 4


def numbers(*shape, dtype=np.float32):
    return RNG.normal(size=shape or C).astype(dtype)


def positive(*shape, dtype=np.float32):
    return RNG.uniform(0.1, 2, shape or C).astype(dtype)


def state(affine=("weight", "bias"), dtype=np.float32):
    parameters = {name: numbers(dtype=dtype) for name in affine}
    return parameters | {"running_mean": numbers(dtype=dtype), "running_var": positive(dtype=dtype), "num_batches_tracked": np.array(7)}


def named(name, arrays, separator="."):
    return {name + separator + key: value for key, value in arrays.items()}


def torch_state(**changes):
    """Of a network with other parameters, too."""
    given = {"0.weight": numbers(C, 3, 3, 3), "0.bias": numbers(), **named("1", state()), **named("block.bn", state())}
    given |= {"norm.weight": numbers(), "norm.bias": numbers(), "fc.weight": numbers(2, C)}
    return {name: value for name, value in (given | changes).items() if value is not ...}


def same(layer, arrays, own):
    """The layer has these arrays, by their names in the framework, and no others."""
    loaded = {own[key]: np.asarray(value).reshape(-1) if own[key] != "num_batches_tracked" else value for key, value in arrays.items()}
    found = layer.state_dict()
    assert found.keys() - {"num_batches_tracked"} == loaded.keys() - {"num_batches_tracked"}
    for key, value in loaded.items():
        np.testing.assert_array_equal(found[key], np.asarray(value, found[key].dtype))


AS_THEY_ARE = {name: name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def through_npz(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    return np.load(file)


@pytest.mark.parametrize("through", [dict, through_npz])
def test_torch(through):
    given = torch_state()
    layers = cbn.from_torch(through(given))
    assert list(layers) == ["1", "block.bn"]
    for name, layer in layers.items():
        same(layer, {key: given[f"{name}.{key}"] for key in AS_THEY_ARE}, AS_THEY_ARE)
        assert type(layer) is cbn.BatchNorm and not layer.training and layer.num_batches_tracked == 7
        assert (layer.eps, layer.momentum, layer.axis, layer.unbiased) == (1e-5, 0.1, 1, True)
    other = cbn.from_torch(given, eps=1e-3, momentum=None)["1"]
    assert (other.eps, other.momentum) == (1e-3, None)
    x = numbers(5, C, 2)
    expected = cbn.batch_norm(x, given["1.running_mean"], given["1.running_var"], given["1.weight"], given["1.bias"])
    np.testing.assert_array_equal(layers["1"](x), expected)
    given["1.weight"][...] = 9
    assert (layers["1"].weight != 9).all()


def test_names():
    given = torch_state()
    assert list(cbn.from_torch(given, prefix="block.")) == list(cbn.from_torch(given, prefix="block.", names={"bn": "bn"})) == ["bn"]
    assert list(cbn.from_torch(given, prefix="1.")) == [""]
    assert list(cbn.from_torch({"module." + name: a for name, a in given.items()}, prefix="module.")) == ["1", "block.bn"]
    renamed = cbn.from_torch(given, names={"1": "first", "block.bn": None})
    assert list(renamed) == ["first"]
    same_state(renamed["first"].state_dict(), cbn.from_torch(given)["1"].state_dict())
    with pytest.raises(ValueError) as error:
        cbn.from_torch(given, names={"1": "a", "missing": "b", "other": None})
    assert str(error.value) == (
        "Error(s) in from_torch:\n\t'missing': in `names`, but not found\n\t'other': in `names`, but not found\n\t"
        "'block.bn': found, but not in `names`; None there leaves it out"
    )
    with pytest.raises(ValueError, match=r"\tblock.bn: expected a name of its own, got 'a' again$"):
        cbn.from_torch(given, names={"1": "a", "block.bn": "a"})


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("affine", [("weight", "bias"), ("weight",), ("bias",), ()], ids=str)
def test_types_and_missing_parameters(affine, dtype):
    arrays = state(affine, dtype)
    layer = cbn.from_torch(named("bn", arrays))["bn"]
    same(layer, arrays, AS_THEY_ARE)
    assert layer.stats_dtype == layer.running_mean.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert all(getattr(layer, name).dtype == layer.stats_dtype for name in affine)
    mixed = cbn.from_torch(named("bn", arrays | {"running_mean": numbers(), "running_var": positive()}))["bn"]
    assert mixed.running_var.dtype == np.float32


@pytest.mark.parametrize("count", [..., np.array([7]), np.array(7, np.int32)], ids=str)
@pytest.mark.parametrize("shape", [(C,), (1, C), (1, C, 1, 1), (C, 1, 1)], ids=str)
def test_old_checkpoints(shape, count):
    arrays = state()
    given = {name: a.reshape(shape) for name, a in arrays.items() if a.ndim} | ({} if count is ... else {"num_batches_tracked": count})
    layer = cbn.from_torch(named("bn", given))["bn"]
    same(layer, arrays | {"num_batches_tracked": 0 if count is ... else 7}, AS_THEY_ARE)


def test_one_channel():
    layer = cbn.from_torch({"weight": np.ones((1, 1, 1, 1)), "running_mean": np.zeros((1, 1)), "running_var": np.ones(1)})[""]
    assert layer.num_features == 1 and layer.weight.shape == (1,)


def test_variances_below_zero():
    arrays = state() | {"running_var": np.array([1, -1e-6, 2, 3], np.float32)}
    with pytest.warns(
        UserWarning, match="^bn.running_var: expected non-negative values, got -9.99.*e-07 for channel 1; computing with var . eps"
    ) as record:
        layer = cbn.from_torch(named("bn", arrays))["bn"]
    assert record[0].filename == __file__
    x = numbers(3, C)
    with pytest.warns(UserWarning):
        y = layer(x)
    expected = (x - arrays["running_mean"]) / np.sqrt(arrays["running_var"].astype(np.float64) + 1e-5) * arrays["weight"] + arrays["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"bn.running_var: expected non-negative values, got -9.99.*e-07 for channel 1 \[eps=1e-08\]"):
        cbn.from_torch(named("bn", arrays), eps=1e-8)


WRONG = [
    ({"1.running_var": ...}, "1: expected running_var, too, got weight, bias, running_mean, num_batches_tracked"),
    ({"1.running_mean": ...}, "1: expected running_mean, too, got weight"),
    ({"1.slope": np.ones(C)}, "1: expected weight, bias, running_mean, running_var, num_batches_tracked, and no slope"),
    ({"1.weight": np.ones(C + 1)}, r"size mismatch for 1.weight: expected shape \(4,\), got \(5,\)"),
    ({"1.running_var": np.ones((C, 2))}, r"size mismatch for 1.running_var: expected shape \(4,\), got \(4, 2\)"),
    (
        {"1.running_mean": np.ones(C + 1)},
        r"size mismatch for 1.weight: .*\n.*\n\tsize mismatch for 1.running_var: expected shape \(5,\), got \(4,\)",
    ),
    ({"1.running_var": -np.ones(C)}, "1.running_var: expected non-negative values, got -1.0 for channel 0"),
    ({"1.weight": np.ones(C, complex)}, "1.weight: expected an array of real numbers, got complex128"),
    ({"1.weight": None}, "1: weight: expected an array, got None"),
    ({"1.num_batches_tracked": 1.5}, "1.num_batches_tracked: expected an integer, got float64"),
    (
        {"1.bias": np.ones(C).astype(bfloat16).view("V2")},
        r"1.bias: .* got \|V2, as which bfloat16 is saved by NumPy: a.view\(ml_dtypes.bfloat16\) is",
    ),
]


@pytest.mark.parametrize("changes, message", WRONG, ids=[message[:60] for _, message in WRONG])
def test_wrong_arrays(changes, message):
    with pytest.raises(ValueError, match=r"^Error\(s\) in from_torch:\n\t" + message):
        cbn.from_torch(torch_state(**changes))


def test_all_that_is_wrong_at_once():
    with pytest.raises(ValueError) as error:
        cbn.from_torch(
            torch_state(**{"1.running_var": ..., "block.bn.weight": np.ones(3), "block.bn.bias": np.ones(5)}),
            names={"1": "a", "block.bn": "b", "c": "c"},
        )
    assert [line.strip().split(":")[0] for line in str(error.value).splitlines()[1:]] == [
        "'c'",
        "1",
        "size mismatch for b.weight",
        "size mismatch for b.bias",
    ]


def test_nothing_found():
    for source, message in (
        (
            {"state_dict": torch_state(), "epoch": 3},
            "from_torch: expected a batch normalization, got 'state_dict', 'epoch'; 'state_dict' is a mapping itself: is it that one?",
        ),
        ({}, "from_torch: expected a batch normalization, got nothing"),
        ({"fc.weight": numbers(2, C)}, "from_torch: expected a batch normalization, got 'fc.weight'"),
        ({str(i): i for i in range(9)}, "from_torch: expected a batch normalization, got '0', '1', '2', '3', '4', ..."),
    ):
        with pytest.raises(ValueError) as error:
            cbn.from_torch(source)
        assert str(error.value) == message
    with pytest.raises(ValueError, match="^from_torch: expected a batch normalization whose name begins with 'module.', got '1', 'block.bn'$"):
        cbn.from_torch(torch_state(), prefix="module.")


def test_wrong_arguments():
    for wrong in (None, [1], 5, "bn.pt"):
        with pytest.raises(TypeError, match="^source: expected a mapping of names to arrays, or a module, got"):
            cbn.from_torch(wrong)
    for options, message in (
        ({"prefix": 1}, "prefix: expected a string, got 1"),
        ({"names": ["1"]}, "names: expected a mapping from names to names, got list"),
        ({"eps": "1e-5"}, "1: eps: expected a real number, got '1e-5'"),
        ({"eps": -1}, "1: batch_norm eps must be positive"),
        ({"momentum": 2}, "1: momentum: expected a number in"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            cbn.from_torch(torch_state(), **options)


class _BatchNorm:
    """As torch.nn.modules.batchnorm has it."""

    def __init__(self, eps, momentum, arrays):
        self.eps, self.momentum, self.num_features, self.arrays = eps, momentum, C, arrays


class BatchNorm2d(_BatchNorm):
    pass


class FrozenBatchNorm2d:
    def __init__(self, eps, arrays):
        self.eps, self.arrays = eps, arrays


class Module:
    """As torch.nn.Module has it."""

    def __init__(self, **modules):
        self.modules = modules

    def named_modules(self, remove_duplicate=True):
        yield "", self
        yield from self.modules.items()

    def state_dict(self):
        return {f"{name}.{key}": a for name, module in self.modules.items() for key, a in module.arrays.items()}


def test_modules():
    frozen = {name: a for name, a in state().items() if name != "num_batches_tracked"}
    module = Module(a=BatchNorm2d(1e-3, None, state()), b=FrozenBatchNorm2d(0.0, frozen), c=BatchNorm2d(1e-5, 0.2, {}))
    module.modules["instance"] = type("InstanceNorm2d", (), {"arrays": state()})()
    layers = cbn.from_torch(module, eps=0.5, momentum=0.5)
    assert list(layers) == ["a", "b", "c"]
    assert repr(layers["a"]) == "BatchNorm2d(4, eps=0.001, momentum=None, affine=True, track_running_stats=True)"
    assert (layers["b"].eps, layers["b"].frozen, layers["b"].num_batches_tracked) == (0, "all", 0)
    assert repr(layers["c"]) == "BatchNorm2d(4, eps=1e-05, momentum=0.2, affine=False, track_running_stats=False)"
    fresh = {"a": cbn.BatchNorm2d(C, eps=1e-3), "b": cbn.BatchNorm2d(C, eps=0)}
    del module.modules["c"], module.modules["instance"]
    with pytest.raises(ValueError, match=r"\ta.momentum: expected 0.1, that of the layer, got None$"):
        cbn.load_state_dict(fresh, module)
    fresh["a"].momentum = None
    assert cbn.load_state_dict(fresh, module) == ([], [])
    same_state(fresh["a"].state_dict(), layers["a"].state_dict())
    with pytest.raises(ValueError, match=r"\ta.eps: expected 1e-05, that of the layer, got 0.001\n\ta.momentum"):
        cbn.load_state_dict({"a": cbn.BatchNorm2d(C)}, Module(**{"net.a": module.modules["a"]}), prefix="net.")


def test_own_checkpoints():
    layers = {"a": trained(cbn.BatchNorm1d(3, axis=-2, activation=("clip", -1, 1), unbiased=False)), "b": trained(cbn.BatchNorm(3, 1e-3, None))}
    again = cbn.from_torch(cbn.state_dict(layers))
    assert {name: layer.config() for name, layer in again.items()} == {name: layer.config() for name, layer in layers.items()}
    for name, layer in layers.items():
        same_state(again[name].state_dict(), layer.state_dict())


OWN_KERAS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def keras_arrays(*, scale=True, center=True):
    arrays = {"gamma": numbers(), "beta": numbers(), "moving_mean": numbers(), "moving_variance": positive()}
    return {name: a for name, a in arrays.items() if (name != "gamma" or scale) and (name != "beta" or center)}


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("form", ["flat", "nested", "with :0"])
def test_keras_mappings(form, center, scale):
    arrays = keras_arrays(scale=scale, center=center)
    given = {
        "flat": named("block/bn", arrays, "/"),
        "nested": {"block": {"bn": arrays}},
        "with :0": {f"block/bn/{name}:0": a for name, a in arrays.items()},
    }[form] | {"conv/kernel": numbers(3, 3, C, C), "ln/gamma": numbers(), "ln/beta": numbers()}
    layers = cbn.from_keras(given)
    assert list(layers) == ["block.bn"]
    layer = layers["block.bn"]
    same(layer, arrays, OWN_KERAS)
    assert (layer.eps, layer.momentum, layer.axis, layer.unbiased, layer.training) == (1e-3, 0.01, -1, False, False)
    layer = cbn.from_keras(given, eps=1e-5, momentum=0.997, axis=1, prefix="block.")["bn"]
    assert (layer.eps, layer.momentum, layer.axis) == (1e-5, 0.003, 1)


def test_keras_configurations():
    """An index in the list of variables means what the configuration says."""
    described = lambda name, **config: {
        "class_name": "BatchNormalization",
        "config": {"name": name, "axis": -1, "momentum": 0.9, "epsilon": 1e-4} | config,
    }
    inner = {"class_name": "Sequential", "config": {"name": "inner", "layers": [described("b", axis=[1], scale=False)]}}
    config = {"class_name": "Functional", "config": {"name": "model", "layers": [described("a", trainable=False), inner]}}
    given = named("a", keras_arrays(), "/") | named("inner/b", keras_arrays(scale=False), "/")
    for described_as in (config, config["config"]):
        layers = cbn.from_keras(given, described_as)
        assert list(layers) == ["a", "inner.b"]
        assert (layers["a"].eps, layers["a"].momentum, layers["a"].frozen) == (1e-4, 0.1, "all")
        assert (layers["inner.b"].axis, layers["inner.b"].weight, layers["inner.b"].frozen) == (1, None, None)
    with pytest.raises(
        ValueError,
        match=r"\n\ta: expected gamma and beta and moving_mean and moving_variance, too, got nothing\n\tinner.b: expected moving_mean, too, got beta",
    ):
        cbn.from_keras({"inner/b/beta": numbers(), "inner/b/moving_variance": positive()}, config)
    with pytest.raises(ValueError, match=r"\n\tinner.b: expected moving_mean, too, got gamma, moving_variance"):
        cbn.from_keras(named("a", keras_arrays(), "/") | {"inner/b/gamma": numbers(), "inner/b/moving_variance": positive()})


def test_files_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", "")
    with pytest.raises(ImportError, match="^from_keras: expected h5py, which reads Keras' files: pip install h5py"):
        cbn.from_keras(tmp_path / "a.keras")


def test_wrong_keras(tmp_path):
    with pytest.raises(TypeError, match="^source: expected a model of Keras 3, the path of a file or a mapping of names to arrays, got list"):
        cbn.from_keras([numbers()])
    with pytest.raises(TypeError, match="^config: expected a model's configuration, a dict or JSON of one, got list"):
        cbn.from_keras(named("a", keras_arrays(), "/"), [])
    with pytest.raises(ValueError, match="^config: expected JSON, got 'model.json'"):
        cbn.from_keras(named("a", keras_arrays(), "/"), "model.json")
    (tmp_path / "a.weights.h5").write_bytes(b"")
    with pytest.raises(TypeError, match=r"^config: expected the model's \(model.to_json\(\)\), as a file of weights alone"):
        cbn.from_keras(tmp_path / "a.weights.h5")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(KeyError, match="config.json"):
        cbn.from_keras(tmp_path / "a.zip")


OWN_FLAX = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


@pytest.mark.parametrize("affine", [("scale", "bias"), ("scale",), ("bias",), ()], ids=str)
@pytest.mark.parametrize("form", ["Linen", "NNX"])
def test_flax(form, affine):
    arrays = {name: numbers() for name in affine} | {"mean": numbers(), "var": positive()}
    others = {"Conv_0": {"kernel": numbers(3, 3, C, C), "bias": numbers()}, "LayerNorm_0": {"scale": numbers(), "bias": numbers()}}
    given = {**others, "block": {"BatchNorm_0": arrays}}
    if form == "Linen":
        split = lambda keys: {"block": {"BatchNorm_0": {key: arrays[key] for key in keys if key in arrays}}}
        given = {"params": {**others, **split(("scale", "bias"))}, "batch_stats": split(("mean", "var"))}
    layers = cbn.from_flax(given)
    assert list(layers) == ["block.BatchNorm_0"]
    layer = layers["block.BatchNorm_0"]
    same(layer, arrays, OWN_FLAX)
    assert (layer.eps, layer.momentum, layer.axis, layer.unbiased) == (1e-5, 0.01, -1, False)
    layer = cbn.from_flax(given, eps=1e-3, momentum=0.9, axis=1, prefix="block.", names={"BatchNorm_0": "bn"})["bn"]
    assert (layer.eps, layer.momentum, layer.axis) == (1e-3, 0.1, 1)


def test_wrong_flax():
    for wrong in ([], 5, {"params": 5}, {"params": {}, "batch_stats": [1]}):
        with pytest.raises(TypeError, match="^variables: expected nested mappings of names to arrays, got "):
            cbn.from_flax(wrong)
    with pytest.raises(ValueError, match="^from_flax: expected a batch normalization, got 'bn/scale'"):
        cbn.from_flax({"params": {"bn": {"scale": numbers()}}})  # of which batch_stats were forgotten
    with pytest.raises(ValueError, match=r"\tbn: expected var, too, got mean"):
        cbn.from_flax({"batch_stats": {"bn": {"mean": numbers()}}})


onnx = pytest.importorskip("onnx", reason="makes models with onnx")
import onnx.reference


def onnx_model(nodes, arrays, constants=(), opset=15):
    """With each of `arrays` as an initializer; those of `constants` as nodes."""
    tensor = onnx.helper.make_tensor_value_info
    made = [onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(a)) for name, a in dict(constants).items()]
    x, y = (tensor(name, onnx.TensorProto.FLOAT, ["N", C, 5]) for name in "xy")
    graph = onnx.helper.make_graph([*made, *nodes], "g", [x], [y], [onnx.numpy_helper.from_array(a, name) for name, a in arrays.items()])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


def bn_node(x, y, arrays, name="", **attributes):
    return onnx.helper.make_node("BatchNormalization", [x, *arrays], [y], name=name, **attributes)


def onnx_arrays(stem):
    return {
        f"{stem}{key}": a
        for key, a in zip(("weight", "bias", "running_mean", "running_var"), (numbers(), numbers(), numbers(), positive()), strict=True)
    }


@pytest.mark.parametrize("constants", [False, True])
def test_onnx(constants, tmp_path):
    first, second, third = onnx_arrays("net.bn1."), onnx_arrays("w_"), onnx_arrays("v/")
    nodes = [
        onnx.helper.make_node("Identity", ["net.bn1.bias"], ["w_bias"]),
        bn_node("x", "a", first, "n1"),
        onnx.helper.make_node("Relu", ["a"], ["b"]),
        bn_node("b", "c", second, "n2", epsilon=1e-3, momentum=0.997),
        bn_node("c", "d", first, "n3"),  # the first again
        bn_node("d", "e", first, "n4", epsilon=0.1),  # its arrays, but another layer
        bn_node("e", "y", third),
    ]
    del second["w_bias"]
    model = onnx_model(nodes, first | second, third) if constants else onnx_model(nodes, first | second | third)
    onnx.checker.check_model(model)
    layers = cbn.from_onnx(model)
    assert list(layers) == ["net.bn1", "n2", "n4", "y"]
    assert [layer.eps for layer in layers.values()] == [1e-5, 1e-3, 0.1, 1e-5] and [layer.momentum for layer in layers.values()] == [
        0.1,
        0.003,
        0.1,
        0.1,
    ]
    assert all(layer.axis == 1 and not layer.unbiased and not layer.training for layer in layers.values())
    same(layers["net.bn1"], dict(zip(OWN_FLAX, first.values(), strict=True)), OWN_FLAX)
    x = numbers(2, C, 5)
    y = layers["net.bn1"](layers["n2"](np.maximum(layers["net.bn1"](x), 0)))
    y = layers["y"](layers["n4"](y))
    (expected,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    onnx.save(model, tmp_path / "model.onnx")
    assert list(cbn.from_onnx(tmp_path / "model.onnx", prefix="net.")) == ["bn1"]


def test_wrong_onnx():
    arrays = onnx_arrays("bn.")
    nodes = [onnx.helper.make_node("Neg", ["bn.weight"], ["scale"]), bn_node("x", "y", ["scale", *list(arrays)[1:]], "n")]
    with pytest.raises(ValueError, match=r"^Error\(s\) in from_onnx:\n\tn: expected scale, too, got B, mean, var$"):
        cbn.from_onnx(onnx_model(nodes, arrays))
    with pytest.raises(ValueError, match="^from_onnx: expected a batch normalization, got 'bn.weight'"):
        cbn.from_onnx(onnx_model([onnx.helper.make_node("Relu", ["x"], ["y"])], arrays))
    with pytest.raises(TypeError, match="^model: expected an onnx.ModelProto or the path of a file, got dict"):
        cbn.from_onnx(arrays)
    with pytest.raises(ValueError, match=r"\tsize mismatch for bn.bias: expected shape \(4,\), got \(5,\)\n\tbn.running_var: expected non-neg"):
        cbn.from_onnx(onnx_model([bn_node("x", "y", arrays)], arrays | {"bn.bias": np.ones(5), "bn.running_var": -np.ones(C)}))


def layers_to_go():
    options = [dict(), dict(weight=False), dict(bias=False), dict(affine=False), dict(dtype=np.float64, eps=1e-3, momentum=0.3)]
    layers = {f"net.bn{i}": cbn.BatchNorm1d(3, unbiased=False, **each) for i, each in enumerate(options)}
    for layer in layers.values():
        for x in RNG.normal(1, 2, (2, 5, 3)).astype(np.float32):
            layer(x)
        for name in ("weight", "bias"):
            if getattr(layer, name) is not None:
                getattr(layer, name)[...] = RNG.normal(size=3)
    return layers


def returned(layers):
    onnx_nodes, onnx_given = [], {}
    for i, (name, (attributes, inputs)) in enumerate(cbn.to_onnx(layers).items()):
        given = named(name, inputs)
        onnx_nodes.append(bn_node("x", f"y{i}", given, name, **attributes))
        onnx_given |= given
    keras_given = cbn.to_keras(layers)
    keras_config = {
        "layers": [{"class_name": "BatchNormalization", "config": {"name": name} | config} for name, (config, _) in keras_given.items()]
    }
    keras_names = {
        name: ["gamma"] * config["scale"] + ["beta"] * config["center"] + ["moving_mean", "moving_variance"]
        for name, (config, _) in keras_given.items()
    }
    keras_arrays = {f"{name}/{key}": a for name, (_, arrays) in keras_given.items() for key, a in zip(keras_names[name], arrays, strict=True)}
    yield "torch", cbn.from_torch(cbn.to_torch(layers))
    yield "keras", cbn.from_keras(keras_arrays, keras_config)
    yield "flax", cbn.from_flax(cbn.to_flax(layers), axis=1)
    yield "onnx", cbn.from_onnx(onnx_model(onnx_nodes, onnx_given))


def test_there_and_back():
    layers = layers_to_go()
    x = RNG.normal(size=(4, 3)).astype(np.float32)
    for framework, others in returned(layers):
        assert sorted(others) == sorted(layers)
        for name, layer in layers.items():
            other = others[name]
            arrays, found = layer.state_dict(), other.state_dict()
            if framework != "torch":
                del arrays["num_batches_tracked"], found["num_batches_tracked"]
            if framework in ("torch", "onnx") and ("weight" in arrays or "bias" in arrays or framework == "onnx"):
                arrays = {"weight": np.ones(3, layer.dtype), "bias": np.zeros(3, layer.dtype)} | arrays
            same_state({key: found[key] for key in sorted(found)}, {key: arrays[key] for key in sorted(arrays)})
            if framework in ("keras", "onnx"):
                assert (other.eps, other.momentum, other.axis) == (layer.eps, layer.momentum, layer.axis)
            other.eps = layer.eps
            np.testing.assert_array_equal(other(x), layer.eval()(x))


def test_what_cannot_go():
    for function in (cbn.to_keras, cbn.to_flax, cbn.to_onnx):
        for options in ({"momentum": None}, {"track_running_stats": False}):
            with pytest.raises(ValueError, match="^layers: expected running statistics and a momentum, got .* for 'bn'"):
                function({"bn": cbn.BatchNorm1d(3, **options)})
    with pytest.raises(ValueError, match="^layers: expected the channels on axis 1, as ONNX has them, got axis=-1 for 'bn'"):
        cbn.to_onnx({"bn": cbn.BatchNorm1d(3, axis=-1)})
    with pytest.raises(TypeError, match="^layers: expected layers of cbn, got .*for 'conv'"):
        cbn.to_torch({"conv": type("Conv", (), {"weight": np.ones(3)})()})
    assert list(cbn.to_torch({"bn": cbn.BatchNorm1d(3, affine=False, track_running_stats=False)})) == []


def test_nothing_is_imported():
    code = "import sys, numpy; before = set(sys.modules); import cbn; print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - {'cbn'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True)
    assert not {"json", "zipfile", "h5py", "onnx", "torch", "keras", "tensorflow", "jax", "flax", "safetensors", "ml_dtypes"} & set(
        eval(done.stdout)
    )
