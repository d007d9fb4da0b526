"""Many layers at once: the state and the gradients of a network's layers, by their names."""

import collections.abc

import numpy as np

from .functional import array_of, checked_flag
from .layers import BatchNorm
from .states import CONFIG, NAMES, checked_prefix, converted, joined, load, lock_of, packed, read
from .words import show


class _Other:
    """A layer of another kind, which has arrays of the names that cbn's layers have."""

    def __init__(self, layer):
        self._layer, self._changes = layer, [0]

    def _state(self):
        return {name: array for name in NAMES if isinstance(array := getattr(self._layer, name, None), np.ndarray)}

    def _loaded(self, name, value, label):
        array, own = array_of(value, label), self._state()[name]
        if array.shape != own.shape:
            raise ValueError(f"size mismatch for {label}: expected shape {own.shape}, got {array.shape}")
        return converted(array, label, own.dtype).copy()

    def config(self):
        return {}


def _seen(layers):
    """The layers by name, each with the methods of those of cbn."""
    if not isinstance(layers, collections.abc.Mapping):
        raise TypeError(f"layers: expected a mapping of names to layers, got {type(layers).__name__}")
    seen, problems = {}, []
    for name, layer in layers.items():
        if not isinstance(name, str):
            problems.append(f"a name that is a string, got {show(name)}")
            continue
        seen[name] = layer if isinstance(layer, BatchNorm) else _Other(layer)
        if isinstance(layer, type) or not (isinstance(layer, BatchNorm) or seen[name]._state()):
            problems.append(f"a layer, with an array `weight` or `bias`, for {name!r}, got {show(layer)}")
    if problems:
        raise TypeError("layers: expected " + "; ".join(problems))
    return seen


def checked_layers(layers):
    """The layers by name, all of them cbn's."""
    for name, layer in _seen(layers).items():
        if not isinstance(layer, BatchNorm):
            raise TypeError(f"layers: expected layers of cbn, got {type(layers[name]).__name__} for {name!r}")
    return layers


def state_dict(layers, *, prefix=""):
    """Copies of the parameters and running statistics of many layers, {"bn1.weight": array, ...}, and what they are configured as.

    layers : mapping of names to layers: cbn's, or any other objects that have arrays as their attributes `weight` and `bias`.
    prefix : what each name begins with.
    Returns a dict of arrays under PyTorch's names, as np.savez and safetensors' save_file take it. Its entry "cbn.config" (bytes: JSON) holds
        the `config()` of cbn's layers; `to_torch` is without it. Each layer's arrays are of one moment, where other threads train.
    """
    layers, prefix, state = _seen(layers), checked_prefix(prefix), {}
    for name, layer in layers.items():
        with lock_of(layer):
            state |= {prefix + joined(name, key): array.copy() for key, array in layer._state().items()}
    return state | {prefix + CONFIG: packed({name: config for name, layer in layers.items() if (config := layer.config())})}


def load_state_dict(layers, state_dict, strict=True, *, prefix=""):
    """Copy parameters and running statistics into many layers: into all of them or, where anything is wrong, into none.

    layers : as in `state_dict`.
    state_dict : mapping of names to array-likes (what `state_dict` gave, an npz file, a PyTorch state dict), or a PyTorch module.
    strict : whether to refuse missing and unexpected names, and a source whose eps, momentum, axis, unbiased or activation are said to be
        others; False: a warning says so. What says nothing of them, as a state dict of PyTorch, is taken as it is.
    prefix : the names in state_dict that begin with it are meant, without it; others are passed over.
    Returns (missing_keys, unexpected_keys). Raises one ValueError that lists all that doesn't fit, or TypeError, having changed nothing.
    """
    layers = _seen(layers)
    return load(layers, *read(state_dict, prefix), checked_flag(strict, "strict"), f"Error(s) in loading state_dict for {len(layers)} layers")


def parameters(layers):
    """What an optimizer works on: (name, array, gradient) of each weight and bias, as a list.

    layers : as in `state_dict`; gradients are their attributes `weight_grad` and `bias_grad`.
    The arrays are the layers' own, to be updated in place: `array -= rate * gradient`. A gradient is None before the first `backward`.
    Layers that are frozen with their weight and bias (`freeze()`) are left out.
    """
    _seen(layers)
    return [
        (joined(name, key), array, getattr(layer, key + "_grad", None))
        for name, layer in layers.items()
        for key in ("weight", "bias")
        if getattr(layer, "frozen", None) != "all" and isinstance(array := getattr(layer, key, None), np.ndarray)
    ]
