"""The state of layers, by names: how it is read from mappings and modules, checked as a whole, and written in whole or not at all."""

import collections.abc
import contextlib
import os
import threading
from typing import NamedTuple

import numpy as np

from .functional import array_of, check_writeable, store
from .synchronize import LOCKS as LOCKS_OF_GROUPS
from .words import show, warn

NAMES = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
CONFIG = "cbn.config"       # the name of the layers' configurations among their arrays: JSON, as an array of bytes
TELLING = "eps", "momentum", "axis", "unbiased", "activation"       # what of a configuration makes arrays mean something else


class IncompatibleKeys(NamedTuple):
    """What load_state_dict(strict=False) passed over."""

    missing_keys: list
    unexpected_keys: list


# What changes a layer's state, or takes several parts of it, holds one of these, chosen by the layer's address: a lock of its own could be
# neither copied nor pickled. Reentrant, as a signal's handler may save the layer that a call is training. (A layer that waits for other ranks has
# another.) Several are taken in one order.
_LOCKS = tuple(threading.RLock() for _ in range(61))
_locks_held = contextlib.ExitStack()


def lock_of(layer):
    group = getattr(layer, "_group", None)
    return _LOCKS[id(layer) // 16 % len(_LOCKS)] if group is None else group.lock


def _in_order(locks):
    return sorted(set(locks), key=id)


def _holding(locks, call):
    """Call with these locks held. A `with` for each: what else enters several may lose one to an interrupt before it knows of it."""
    if not locks:
        return call()
    with locks[0]:
        return _holding(locks[1:], call)


def _hold_all():
    for lock in _in_order((*_LOCKS, *LOCKS_OF_GROUPS)):
        _locks_held.enter_context(lock)


def _release_all():
    _locks_held.pop_all().close()     # detached first: with the first lock, the next to fork may come


# A forked child finds each layer as between two calls, and no lock held by a thread that it doesn't have.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_all, after_in_parent=_release_all, after_in_child=_release_all)


def converted(array, name, dtype):
    """`array` in another type, itself where it has that, or an error where it holds values that the type has no room for."""
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        hint = ", as which bfloat16 is saved by NumPy: a.view(ml_dtypes.bfloat16) is the array" if array.dtype == "V2" else ""
        raise TypeError(f"{name}: expected an array of real numbers, got {array.dtype}{hint}")
    if array.dtype == dtype and array.flags.aligned:
        return array
    with np.errstate(all="ignore"):
        result = array.astype(dtype)
        lost = np.isfinite(array) & ~np.isfinite(result)
    if lost.any():
        raise ValueError(f"{name}: expected values within the range of {dtype}, got {array[lost][0]}")
    return result


def joined(name, key):
    """The name of an array in a network: a layer without a name is the whole of it."""
    return f"{name}.{key}" if name else key


def checked_prefix(prefix):
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a string, got {show(prefix)}")
    return prefix


def below(prefix, layers):
    """Of what is there by names of layers, that whose arrays' names begin with the prefix, by the names without it."""
    return {f"{name}.".removeprefix(prefix)[:-1]: each for name, each in layers.items() if f"{name}.".startswith(prefix)}


def module_config(module):
    """What a PyTorch module says of itself, in a layer's words, if it is a batch normalization; or a layer of cbn; otherwise None."""
    if hasattr(module, "_loaded"):
        return module.config()
    kinds = [kind.__name__ for kind in type(module).__mro__]
    if "FrozenBatchNorm2d" in kinds:        # of torchvision, detectron2, ...
        return {"class": "BatchNorm2d", "eps": module.eps, "frozen": "all"}
    if "_BatchNorm" not in kinds:
        return None
    kind = next((kind for kind in kinds if kind in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")), "BatchNorm")
    return {"class": kind, "num_features": module.num_features, "eps": module.eps, "momentum": module.momentum, "unbiased": True}


def read(source, prefix="", argument="state_dict"):
    """(arrays by name, configurations by name of layer) of a mapping, a PyTorch module or a layer, below the prefix and without it."""
    prefix, configs = checked_prefix(prefix), {}
    if not isinstance(source, collections.abc.Mapping) and callable(getattr(source, "state_dict", None)) and not isinstance(source, type):
        modules = dict(source.named_modules(remove_duplicate=False)) if hasattr(source, "named_modules") else {"": source}
        configs = {name: config for name, module in modules.items() if (config := module_config(module)) is not None}
        source = source.state_dict()
    if not isinstance(source, collections.abc.Mapping):
        raise TypeError(f"{argument}: expected a mapping of names to arrays, or a module, got {type(source).__name__}")
    arrays = dict(source)
    if prefix:
        arrays = {name.removeprefix(prefix): value for name, value in arrays.items() if isinstance(name, str) and name.startswith(prefix)}
        configs = below(prefix, configs)
    return arrays, configs | _unpacked(arrays.pop(CONFIG, None))


def packed(configs):
    """Configurations as an array, which every file of arrays can hold."""
    import json

    return np.frombuffer(json.dumps(configs).encode(), np.uint8).copy()


def _unpacked(array):
    if array is None:
        return {}
    import json

    try:
        configs = json.loads(np.asarray(array, np.uint8).tobytes())
        if all(isinstance(config, dict) for config in configs.values()):
            return configs
    except Exception:
        pass
    raise ValueError(f"{CONFIG}: expected the configurations of layers, as state_dict() packs them, got {show(array)}")


def _differences(layers, configs):
    for name, layer in layers.items():
        own, other = layer.config(), configs.get(name, {})
        for key in TELLING:
            if key in own and key in other and own[key] != other[key]:
                yield f"{joined(name, key)}: expected {own[key]!r}, that of the layer, got {other[key]!r}"


def load(layers, given, configs, strict, heading, problems=()):
    """Overwrite the arrays of layers (with the methods _state, _loaded and config, and the attribute _changes) by those given, or raise."""
    return _holding(_in_order(map(lock_of, layers.values())), lambda: _load(layers, given, configs, strict, heading, problems))


def _load(layers, given, configs, strict, heading, problems):
    """With the locks held."""
    wanted = {joined(name, key): (layer, key, array) for name, layer in layers.items() for key, array in layer._state().items()}
    missing = [name for name in wanted if name not in given and wanted[name][1] != "num_batches_tracked"]
    unexpected = [name for name in given if name not in wanted]
    differences, problems, loaded = list(_differences(layers, configs)), list(problems), {}
    if strict and missing:
        problems.append("Missing key(s) in state_dict: " + ", ".join(f'"{name}"' for name in missing))
    if strict and unexpected:
        names = (f'"{name}"' if isinstance(name, str) else show(name) for name in unexpected)
        problems.append("Unexpected key(s) in state_dict: " + ", ".join(names))
    if strict:
        problems += differences
    for name in [name for name in wanted if name in given]:
        layer, key, array = wanted[name]
        try:
            loaded[name] = layer._loaded(key, given[name], name)
            check_writeable(array, name)
        except (TypeError, ValueError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{heading}:\n\t" + "\n\t".join(problems))
    if differences:
        warn("state_dict: expected the layers' configuration, got another; loading nevertheless [strict=False]: " + "; ".join(differences))
    for name, value in loaded.items():
        if wanted[name][1] == "running_var" and (value < 0).any():
            c = int(np.flatnonzero(value < 0)[0])
            warn(f"{name}: expected non-negative values, got {value[c]} for channel {c}; computing with var + eps, which is positive")
    write({id(wanted[name][0]): wanted[name][0] for name in loaded}.values(), [(wanted[name][2], value) for name, value in loaded.items()])
    for name in loaded:
        if wanted[name][1].startswith("running"):
            wanted[name][0]._may_be_untrained = False
    return IncompatibleKeys(missing, unexpected)


def write(layers, pairs):
    """Write, for each (to, value), arrays of one shape and type, value to `to`: all or none. The arrays are these layers', whose locks are held."""
    for layer in layers:
        layer._changes[0] |= 1      # odd, also where an interrupt left it so
    try:
        store(pairs)
    finally:
        for layer in layers:
            layer._changes[0] += 1


def form_of_count(name, value):
    """A number of batches as an int64 array of shape (): `value` itself where it is one, or a copy."""
    array = array_of(value, name)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected an integer, got {array.dtype}")
    if array.shape not in ((), (1,)):
        raise ValueError(f"{name}: expected shape (), got {array.shape}")
    if not 0 <= int(array.reshape(())) < 1 << 62:
        raise ValueError(f"{name}: expected a number of batches >= 0, got {int(array.reshape(()))}")
    if array.dtype != np.int64 or not array.flags.aligned:
        array = array.astype(np.int64)
    return array.reshape(()) if array.ndim else array
