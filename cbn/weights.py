"""Trained weights from other frameworks, as layers, and back: from plain mappings of arrays, their files or their models.

What each means by momentum, eps and variance, and where it keeps its channels, is in docs/frameworks.md.
"""

import collections.abc
import os
from typing import NamedTuple

import numpy as np

from .functional import array_of, checked_number
from .layers import BatchNorm
from .network import checked_layers
from .states import NAMES, below, checked_prefix, joined, load, read
from .words import show


class _Found(NamedTuple):
    """A batch normalization in a source."""

    arrays: dict        # by the names of cbn's state dicts
    options: dict       # arguments of the layer, as far as the source says


def from_torch(source, *, eps=1e-5, momentum=0.1, prefix="", names=None):
    """Layers, by name, of the batch normalizations among PyTorch's parameters: {"features.1": BatchNorm(64, ...), ...}, in eval mode.

    source : a state dict, of tensors or arrays (safetensors' load_file, an npz file, ...), where groups with running_mean and running_var are
        batch normalizations; or a module, which also says its eps, momentum, rank and whether it is frozen. What cbn.state_dict gave says all.
    eps, momentum : of those for which the source doesn't say: a state dict never does. momentum is the weight of the new value.
    prefix : the names that begin with it are meant, without it; others are passed over.
    names : None, or a mapping from each name found to that wanted, or to None for those to be left out.
    Arrays of float16 and bfloat16 make float32 layers; such of shape (1, C, 1, 1) are taken as (C,). num_batches_tracked may be missing.
    Raises one ValueError that lists all that is missing, left over or of the wrong shape; TypeError for what is no mapping or module.
    """
    given, configs = read(source, "", "source")
    groups, found = _groups(given, "."), {}
    for name in configs or groups:
        arrays = groups.get(name, {})
        trained = {"running_mean", "running_var"} & arrays.keys()
        if trained or configs:
            options = {"eps": eps, "momentum": momentum, "track_running_stats": bool(trained)} | configs.get(name, {})
            found[name] = _checked(arrays, {key: key for key in NAMES}, options, trained and ("running_mean", "running_var"))
    return _made(found, given, prefix, names, "from_torch")


def from_keras(source, config=None, *, eps=1e-3, momentum=0.99, axis=-1, prefix="", names=None):
    """Layers, by name, of the batch normalizations of Keras 3: {"block.bn1": BatchNorm(64, axis=-1, unbiased=False, ...), ...}, in eval mode.

    source : a model; the path of a `.keras` file, or of a `.weights.h5` file with `config` (these need h5py); or a mapping of arrays by the
        paths of variables, {"block/bn1/gamma": array, ...}, where groups with moving_mean and moving_variance are batch normalizations.
    config : None, or the model's: `model.to_json()`, or what `model.get_config()` gave.
    eps, momentum, axis : of those for which there is no configuration. momentum is Keras', the weight of the old value.
    prefix, names : as in `from_torch`; names are those of layers in layers, joined by dots.
    A layer with trainable=False, which Keras runs by its moving statistics, is frozen. Raises as `from_torch` does, and OSError.
    """
    if isinstance(config, str):
        import json

        try:
            config = json.loads(config)
        except ValueError:
            raise ValueError(f"config: expected JSON, got {show(config)}") from None
    if config is not None and not isinstance(config, dict):
        raise TypeError(f"config: expected a model's configuration, a dict or JSON of one, got {type(config).__name__}")
    if isinstance(source, (str, os.PathLike)):
        given, config = _keras_file(os.fspath(source), config)
    elif isinstance(source, collections.abc.Mapping):
        given = _groups(_flat(source), "/")
    elif hasattr(source, "_layers") and hasattr(source, "get_config"):
        given, config = _keras_model(source), None
    else:
        raise TypeError(f"source: expected a model of Keras 3, the path of a file or a mapping of names to arrays, got {type(source).__name__}")
    configs, found = {} if config is None else dict(_keras_configs(config.get("config", config))), {}
    own = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    for name in {**configs, **given}:
        arrays, said = given.get(name, {}), configs.get(name)
        if isinstance(arrays, tuple):       # a layer, and what it says
            arrays, said = arrays
        known = ["moving_mean", "moving_variance"]
        if said is not None:
            known = ["gamma"] * (said.get("scale") is not False) + ["beta"] * (said.get("center") is not False) + known
        if isinstance(arrays, list):        # the variables in a file, in this order and without names
            arrays = dict(zip([*known, *map(str, range(len(known), len(arrays)))], arrays, strict=False)) if said is not None else {}
        if said is not None or arrays.keys() & known:
            said = said or {}
            options = _decaying(said.get("epsilon", eps), said.get("momentum", momentum), said.get("axis", axis))
            options |= {"frozen": "all"} if said.get("trainable") is False else {}
            found[name.replace("/", ".")] = _checked(arrays, own, options, known)
    return _made(found, given, prefix, names, "from_keras")


def from_flax(variables, *, eps=1e-5, momentum=0.99, axis=-1, prefix="", names=None):
    """Layers, by name, of the batch normalizations among Flax' variables: {"block.BatchNorm_0": BatchNorm(64, axis=-1, ...)}, in eval mode.

    variables : nested mappings: Linen's {"params": ..., "batch_stats": ...}, or the state of an NNX module, with groups of mean, var, scale and bias.
    eps, momentum, axis : those of the modules, of which variables say nothing. momentum is Flax', the weight of the old value.
    prefix, names : as in `from_torch`; names are joined by dots.
    Raises as `from_torch` does.
    """
    linen = isinstance(variables, collections.abc.Mapping) and ("params" in variables or "batch_stats" in variables)
    given = {}
    for tree in [variables.get(name, {}) for name in ("params", "batch_stats")] if linen else [variables]:
        if not isinstance(tree, collections.abc.Mapping):
            raise TypeError(f"variables: expected nested mappings of names to arrays, got {show(variables)}")
        given |= _flat(tree)
    own, found = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}, {}
    for name, arrays in _groups(given, "/").items():
        if {"mean", "var"} & arrays.keys():
            found[name.replace("/", ".")] = _checked(arrays, own, _decaying(eps, momentum, axis), ("mean", "var"))
    return _made(found, given, prefix, names, "from_flax")


def from_onnx(model, *, prefix="", names=None):
    """Layers, by name, of the BatchNormalization nodes of an ONNX model: {"features.1": BatchNorm(64, unbiased=False, ...), ...}, in eval mode.

    model : ModelProto of the package onnx, which is imported, or the path of a file. A layer's name is what the names of its arrays
        ("features.1.running_var") have in common, otherwise that of its node, otherwise that of its output.
    prefix, names : as in `from_torch`.
    epsilon and momentum, which ONNX holds in float32, are taken as the shortest decimal that is that float32: 1e-05. Raises as `from_torch`
    does; arrays that are computed are among what it lists as missing.
    """
    import onnx

    if isinstance(model, (str, os.PathLike)):
        model = onnx.load(model)
    if not hasattr(model, "graph"):
        raise TypeError(f"model: expected an onnx.ModelProto or the path of a file, got {type(model).__name__}")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants |= {node.output[0]: attribute.t for attribute in node.attribute if attribute.name == "value"}
        elif node.op_type == "Identity" and node.input[0] in constants:     # as exporters share equal arrays
            constants[node.output[0]] = constants[node.input[0]]
    own, found, nodes = {"scale": "weight", "B": "bias", "mean": "running_mean", "var": "running_var"}, {}, {}
    for node in [node for node in model.graph.node if node.op_type == "BatchNormalization"]:
        inputs = dict(zip(own, node.input[1:5], strict=False))
        attributes = {attribute.name: float(str(np.float32(attribute.f))) for attribute in node.attribute}
        options = _decaying(attributes.get("epsilon", 1e-5), attributes.get("momentum", 0.9), 1)
        stems = {name.rpartition(".")[0] for name in inputs.values()}
        name = stems.pop() if len(stems) == 1 and "" not in stems else node.name or node.output[0]
        if nodes.setdefault(name, (inputs, options)) != (inputs, options):      # otherwise one layer, applied in two places
            name = node.name or node.output[0]
        arrays = {key: onnx.numpy_helper.to_array(constants[i]) for key, i in inputs.items() if i in constants}
        found[name] = _checked(arrays, own, options, own)
    return _made(found, constants, prefix, names, "from_onnx")


def to_torch(layers):
    """A state dict for PyTorch's modules of the same names, of new arrays: module.load_state_dict({n: torch.as_tensor(a) for n, a in ...}).

    layers : mapping of names to layers of cbn.
    A layer with only one of weight and bias gets ones or zeros as the other, as PyTorch's have both or neither. eps, momentum and an
    activation are not in a state dict: give the modules the layers' own. The modules track the unbiased variance, whatever the layers do.
    """
    state = {}
    for name, layer in checked_layers(layers).items():
        arrays = layer.state_dict()
        if layer.weight is not None or layer.bias is not None:
            arrays = {"weight": np.ones(layer.num_features, layer.dtype), "bias": np.zeros(layer.num_features, layer.dtype)} | arrays
        state |= {joined(name, key): array for key, array in arrays.items()}
    return state


def to_keras(layers):
    """For each layer, by name, (config, weights): keras.layers.BatchNormalization(**config), once built, takes set_weights(weights).

    layers : mapping of names to layers of cbn with running statistics and a momentum.
    """
    made = {}
    for name, layer, arrays in _decaying_layers(layers):
        config = {"axis": layer.axis, "epsilon": layer.eps, "momentum": _other(layer.momentum), "scale": "weight" in arrays,
                  "center": "bias" in arrays, "trainable": layer.frozen != "all"}  # fmt: skip
        made[name] = config, [arrays[key] for key in NAMES[:4] if key in arrays]
    return made


def to_flax(layers):
    """Variables for Linen's modules, {"params": ..., "batch_stats": ...}, nested where names have dots.

    layers : mapping of names to layers of cbn with running statistics and a momentum.
    Give the modules epsilon=layer.eps, momentum=1 - layer.momentum, axis=layer.axis, and use_scale or use_bias=False where there is no weight or bias.
    """
    variables = {"params": {}, "batch_stats": {}}
    own = {"params": {"scale": "weight", "bias": "bias"}, "batch_stats": {"mean": "running_mean", "var": "running_var"}}
    for name, _, arrays in _decaying_layers(layers):
        for collection, group in variables.items():
            there = {key: arrays[ours] for key, ours in own[collection].items() if ours in arrays}
            for part in name.split(".") if there else ():
                group = group.setdefault(part, {})
            group |= there
    return variables


def to_onnx(layers):
    """For each layer, by name, (attributes, inputs) of a BatchNormalization node: {"epsilon": ..., "momentum": ...}, and a dict of arrays of
    its inputs scale, B, input_mean and input_var, in this order.

    layers : mapping of names to layers of cbn with running statistics and a momentum, and channels on axis 1.
    Weights that a layer doesn't have are ones, and biases zeros. Raises ValueError or TypeError.
    """
    made = {}
    for name, layer, arrays in _decaying_layers(layers):
        if layer.axis != 1:
            raise ValueError(f"layers: expected the channels on axis 1, as ONNX has them, got axis={layer.axis} for {name!r}")
        arrays = {"weight": np.ones(layer.num_features, layer.dtype), "bias": np.zeros(layer.num_features, layer.dtype)} | arrays
        inputs = dict(zip(("scale", "B", "input_mean", "input_var"), (arrays[key] for key in NAMES[:4]), strict=True))
        made[name] = {"epsilon": layer.eps, "momentum": _other(layer.momentum)}, inputs
    return made


def _decaying_layers(layers):
    """(name, layer, its arrays), of layers that a framework with a decaying average has."""
    for name, layer in checked_layers(layers).items():
        arrays = layer.state_dict()
        if "running_mean" not in arrays or "running_var" not in arrays or layer.momentum is None:
            raise ValueError(f"layers: expected running statistics and a momentum, got track_running_stats={layer.track_running_stats}, "
                             f"momentum={layer.momentum} for {name!r}")
        yield name, layer, arrays


def _other(momentum):
    """The weight of the old value from that of the new one, or the other way round: 0.1 from 0.9, not 0.09999999999999998."""
    return round(1 - checked_number(momentum, "momentum"), 15)


def _decaying(eps, momentum, axis):
    """What Keras, Flax and ONNX mean, as arguments of a layer."""
    axis = axis[0] if isinstance(axis, (list, tuple)) and len(axis) == 1 else axis
    return {"eps": eps, "momentum": _other(momentum), "axis": axis, "unbiased": False}


def _flat(tree, path=()):
    """Nested mappings as one, of names joined by slashes."""
    flat = {}
    for key, value in tree.items():
        inner = *path, str(key)
        flat |= _flat(value, inner) if isinstance(value, collections.abc.Mapping) else {"/".join(inner): value}
    return flat


def _groups(given, separator):
    """Arrays by the part of their names before the last separator, and by that behind it."""
    groups = {}
    for name, value in given.items():
        stem, _, key = str(name).removesuffix(":0").rpartition(separator)
        groups.setdefault(stem, {})[key] = value
    return groups


def _checked(arrays, own, options, needed):
    """A batch normalization, by cbn's names, which are the values of `own`; or what is missing or left over, in words."""
    missing, extra = [key for key in needed if key not in arrays], [key for key in arrays if key not in own]
    if missing or extra:
        there = ", ".join(map(str, arrays)) or "nothing"
        return f"expected {' and '.join(missing)}, too, got {there}" if missing else f"expected {', '.join(own)}, and no {', '.join(extra)}"
    return _Found({own[key]: value for key, value in arrays.items()}, options)


def _vector(value, name):
    """An array in one dimension where all axes but one are of length 1, as in (1, C, 1, 1). A parameter's gradient is left behind."""
    array = array_of(value.detach() if hasattr(value, "detach") else value, name)
    return array.reshape(-1) if array.ndim > 1 and array.size == max(array.shape) else array


def _made(found, given, prefix, names, function):
    """The layers of what was found, under their new names, or an error that lists all that is wrong."""
    if names is not None and not isinstance(names, collections.abc.Mapping):
        raise TypeError(f"names: expected a mapping from names to names, got {type(names).__name__}")
    chosen = below(checked_prefix(prefix), found)
    if not chosen:
        nested = [name for name, value in given.items() if isinstance(value, collections.abc.Mapping)] if not found else []
        some = list(found or given)
        raise ValueError(
            f"{function}: expected a batch normalization{f' whose name begins with {prefix!r}' if found else ''}, got "
            + (", ".join(map(show, some[:5])) + ", ..." * (len(some) > 5) or "nothing")
            + (f"; {show(nested[0])} is a mapping itself: is it that one?" if nested else "")
        )
    problems = []
    if names is not None:
        problems += [f"{show(name)}: in `names`, but not found" for name in names if name not in chosen]
        problems += [f"{name!r}: found, but not in `names`; None there leaves it out" for name in chosen if name not in names]
    layers, arrays = {}, {}
    for old, each in chosen.items():
        name = old if names is None else names.get(old)
        if name is None:
            continue
        try:
            if isinstance(each, str) or not isinstance(name, str) or name in layers:
                of_name = f"a name of its own, got {name!r} again" if isinstance(name, str) else f"a string in `names`, got {show(name)}"
                raise ValueError(each if isinstance(each, str) else f"expected {of_name}")
            values = {key: _vector(value, key) for key, value in each.arrays.items()}
            layers[name] = _layer(values, each.options)
            arrays |= {joined(name, key): value for key, value in values.items()}
        except (TypeError, ValueError) as error:
            problems.append(f"{old}: {error}" if old else str(error))
    load(layers, arrays, {}, True, f"Error(s) in {function}", problems)
    return {name: layer.eval() for name, layer in layers.items()}


def _layer(values, options):
    """A layer of the parameters that there are, in float64 where they are."""
    wide = lambda *keys: np.float64 if any(key in values and values[key].dtype == np.float64 for key in keys) else np.float32
    channels = next((values[key].size for key in ("running_mean", "weight", "bias") if key in values), options.get("num_features"))
    affine = {"affine": "weight" in values or "bias" in values, "weight": "weight" in values, "bias": "bias" in values}
    dtypes = {"dtype": wide("weight", "bias"), "stats_dtype": wide("running_mean", "running_var")}
    return BatchNorm.from_config(options | {"num_features": channels} | affine | dtypes)


def _keras_file(path, config):
    """(variables by the path of their layer's names, configuration) of a file of Keras 3."""
    import io
    import json
    import zipfile

    file = path
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            config, file = json.loads(archive.read("config.json")), io.BytesIO(archive.read("model.weights.h5"))
    if config is None:
        raise TypeError("config: expected the model's (model.to_json()), as a file of weights alone doesn't say whose they are, got None")
    try:
        import h5py
    except ImportError:
        raise ImportError("from_keras: expected h5py, which reads Keras' files: pip install h5py") from None
    with h5py.File(file, "r") as groups:
        return dict(_keras_variables(groups)), config


def _keras_variables(group, path=None):
    """(path of layers' names, their variables) of all that stands in a file; the outermost model's own name is left out."""
    own = group.get("vars", {})
    if "name" in getattr(own, "attrs", ()):
        path = () if path is None else (*path, own.attrs["name"])
    elif len(own) or path is None:
        raise ValueError("source: expected a file of Keras 3 in which layers have names, got one without: load it in Keras and pass the model")
    if path and len(own):
        yield "/".join(path), [own[str(i)][()] for i in range(len(own))]
    for key, child in group.items():
        if key != "vars" and hasattr(child, "items"):
            yield from _keras_variables(child, path)


def _keras_configs(config, path=()):
    """(path of layers' names, configuration) of each batch normalization in that of a model."""
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        inner = value.get("config") if isinstance(value, dict) and "class_name" in value else None
        if not isinstance(inner, dict) or "name" not in inner:
            yield from _keras_configs(value, path)
        elif value["class_name"] == "BatchNormalization":
            yield "/".join((*path, inner["name"])), inner
        else:
            yield from _keras_configs(inner, (*path, inner["name"]))


def _keras_model(model, path=()):
    """(variables, configuration) of each batch normalization in a model, by layers' names: paths of variables depend on how it was made."""
    found = {}
    for layer in model._layers:
        inner = *path, layer.name
        if any(kind.__name__ == "BatchNormalization" for kind in type(layer).__mro__):
            found["/".join(inner)] = {variable.path.rpartition("/")[2]: variable.numpy() for variable in layer.variables}, layer.get_config()
        else:
            found |= _keras_model(layer, inner)
    return found
