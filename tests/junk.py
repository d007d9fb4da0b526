"""Calls every public function and method with junk in any argument, and any part of one: an error of the right kind, nothing changed, never a crash.

    python tests/junk.py --seed 1 --calls 1000000

Every call is a function of the seed and its number: `--start N --calls 1` makes call N again. The calls are made in child processes, so that one
that dies is reported, and the run goes on behind it.
"""

import argparse
import collections
import decimal
import faulthandler
import fractions
import os
import random
import subprocess
import sys
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

import cbn
from cbn import dispatch

ALLOWED = TypeError, ValueError, MemoryError
CHANNELS = 3
X = np.random.default_rng(81).normal(size=(4, CHANNELS, 2, 2)).astype(np.float32)


def raising(method, error):
    """An object of which one method raises."""

    def fail(self, *args, **kwargs):
        raise error("of its own")

    return type("Raising", (), {method: fail})()


class Lying:
    """Whose interface says what isn't so."""

    __array_interface__ = {"shape": ("a",), "typestr": "<f4", "version": 3, "data": (0, False)}


class Sub(np.ndarray):
    """An array that wants to be asked."""

    def __getattribute__(self, name):
        if name in ("shape", "strides", "dtype"):
            return np.ndarray.__getattribute__(self, name)
        return super().__getattribute__(name)

    def __len__(self):
        raise RuntimeError("no length")


def released():
    view = memoryview(bytearray(8))
    view.release()
    return view


def locked(a):
    a.flags.writeable = False
    return a


def of(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


# Each is made anew for each call. Numbers, names and arrays that are right in some place are wrong in others.
JUNK = [
    *(lambda value=value: value for value in (
        None, (None, None), [None], (), [], {}, "", "no", b"x", True, False, np.True_, 0, 1, -1, 2.5, 1e-5, float("nan"), float("inf"), -float("inf"),
        1j, 10**400, -(10**400), 2**63, 2**70, -(2**63), np.int64(3), np.float16(0.5), decimal.Decimal(1), fractions.Fraction(1, 3), "relu", "torch",
        ("clip", None, 1), ("clip", 1), ("leaky_relu", "a"), ("leaky_relu", float("nan")), ("clip", float("nan"), 1), ("clip", 10**400, 1),
        ..., NotImplemented, int, np, len, np.float32, "float64", np.dtype(">f4"), "M8[s]", object(), {1, 2}, range(3), slice(3), {"weight": None}, {None: 1},
        [[1.0], [2.0, 3.0]], [1e300] * CHANNELS, [1.0] * CHANNELS, ["a"] * CHANNELS, [None] * CHANNELS, (1,) * 5, (None,) * 5, (None,) * 3,
    )),
    *(lambda shape=shape, dtype=dtype: np.ones(shape, dtype)
      for shape in ((), (1,), (CHANNELS,), (CHANNELS, 1), (1, CHANNELS), (CHANNELS + 1,), (0,), (1,) * 32, X.shape, (4, CHANNELS), (0, CHANNELS, 2, 2))
      for dtype in (np.float32, np.float64, np.float16, np.int64, np.uint8, bool, object, complex, "U2", "M8[s]", np.longdouble, [("a", "f4")], "V4")),
    lambda: np.full(CHANNELS, np.nan, np.float32), lambda: np.full(CHANNELS, -1.0), lambda: np.full(CHANNELS, -1e-9), lambda: np.full(CHANNELS, 1e300),
    lambda: locked(of(CHANNELS)), lambda: locked(of(*X.shape)), lambda: of(2 * CHANNELS)[::-2], lambda: of(*X.shape)[::-1, :, ::-1],
    lambda: np.broadcast_to(np.float32(1), X.shape), lambda: np.lib.stride_tricks.as_strided(of(1), (CHANNELS,), (0,)),
    lambda: np.frombuffer(bytearray(4 * CHANNELS + 1), np.uint8)[1:].view(np.float32), lambda: of(*X.shape, dtype=">f4"), lambda: of(CHANNELS, dtype=">f8"),
    lambda: np.broadcast_to(np.float32(1), (1 << 23, CHANNELS, 1 << 12, 1 << 12)), lambda: np.ma.masked_array(of(CHANNELS)), lambda: np.ma.masked_array(X),
    lambda: np.matrix(of(CHANNELS)), lambda: of(CHANNELS).view(Sub), lambda: X.copy().view(Sub), lambda: np.array(5), lambda: np.array(None),
    lambda: (i for i in range(3)), lambda: memoryview(of(CHANNELS)), released, Lying, lambda: bytearray(12),
    *(lambda method=method, error=error: raising(method, error)
      for method in ("__array__", "__index__", "__float__", "__bool__", "__eq__", "__repr__", "__iter__", "__len__", "__dlpack__", "__hash__")
      for error in (ValueError, KeyError, RecursionError, ZeroDivisionError)),
    lambda: type("Wrong", (), {"__array__": lambda self, dtype=None, copy=None: "no array"})(),
    lambda: cbn.BatchNorm2d(CHANNELS), lambda: cbn.BatchNorm2d, lambda: cbn.batch_stats(X), lambda: cbn.batch_stats(X)._replace(count=None),
    lambda: cbn.batch_stats(X)._replace(mean=None), lambda: cbn.batch_stats(X)._replace(var=None), lambda: cbn.batch_stats(X)._replace(count=1 << 80),
    lambda: cbn.GradientSums(np.zeros(CHANNELS), None), lambda: cbn.GradientSums(of(CHANNELS), of(CHANNELS)), lambda: cbn.GradientSums("ab", 1),
]  # fmt: skip
ATTRIBUTES = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked", "momentum", "eps", "axis", "activation", "frozen", "training", "affine",
              "track_running_stats", "on_nonfinite", "num_features", "dtype", "stats_dtype", "unbiased", "comm", "reduce_grads"]  # fmt: skip


def vector(value=1.0):
    return np.full(CHANNELS, value, np.float32)


def layer(**options):
    made = cbn.BatchNorm2d(CHANNELS, **options)
    made.num_batches_tracked = 1  # nothing to warn of
    made(X)
    return made


def with_statistics(**more):
    return {"x": X.copy(), "running_mean": vector(0), "running_var": vector(), "weight": vector(), "bias": vector(), "training": False, "momentum": 0.1,
            "eps": 1e-5, "axis": 1, "unbiased": True, "activation": None, "residual": None, "out": None} | more  # fmt: skip


def onnx_model():
    """Whose only node has no arrays."""
    import onnx

    node = onnx.helper.make_node("BatchNormalization", ["x", "a.scale", "a.b", "a.mean", "a.var"], ["y"])
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))


def assign(of, name, value):
    setattr(of, name, value)
    of(X)
    of.backward(X)


def use(manager):
    with manager:
        cbn.get_num_threads()


# The callables by name, each a function that makes (what is called, its arguments, the layer whose state it may not change when it fails).
def targets():
    bn = lambda: (vector(0), vector(), vector(), vector(), 1e-5)
    fusions = {"activation": ("clip", 0, 1), "residual": X.copy()}
    plain = lambda names, arguments: {name: arguments[name] for name in names}
    train = lambda: plain(("x", "weight", "bias", "eps", "axis", "activation", "residual", "out"), with_statistics(**fusions))
    yield "batch_norm", lambda: (cbn.batch_norm, with_statistics(out=X.copy(), **fusions), None)
    yield "batch_norm", lambda: (cbn.batch_norm, with_statistics(training=True, out=X.copy()), None)
    yield "batch_norm_train", lambda: (cbn.batch_norm_train, train(), None)
    yield "batch_norm_train", lambda: (cbn.batch_norm_train, {**train(), "stats": cbn.batch_stats(X)}, None)
    back = lambda: {"dy": X.copy(), "stats": cbn.batch_stats(X), **train(), "out": X.copy()}
    sums = lambda: cbn.GradientSums(np.zeros(CHANNELS), np.zeros(CHANNELS))
    yield "gradient_sums", lambda: (cbn.gradient_sums, {name: value for name, value in back().items() if name != "out"}, None)
    yield "batch_norm_backward", lambda: (cbn.batch_norm_backward, {**back(), "sums": sums()}, None)
    yield "merge", lambda: (sums().merge, {"other": sums()}, None)
    activate = lambda: plain(("x", "bias", "axis", "activation", "residual", "out"), with_statistics(out=X.copy(), **fusions))
    yield "activate", lambda: (cbn.activate, activate(), None)
    yield "activate_backward", lambda: (cbn.activate_backward, {"dy": X.copy(), **activate()}, None)
    yield "batch_stats", lambda: (cbn.batch_stats, {"x": X.copy(), "axis": 1}, None)
    for training in (True, False):
        for stats in (lambda: cbn.batch_stats(X), lambda: (vector(0), vector())):
            yield "batch_norm_backward", lambda training=training, stats=stats: (
                cbn.batch_norm_backward, {"dy": X.copy(), "stats": stats(), "training": training, "affine_grad": True, **train(), "out": X.copy()}, None,
            )  # fmt: skip
    for name, kind in (("BatchNorm", cbn.BatchNorm), ("BatchNorm1d", cbn.BatchNorm1d), ("BatchNorm2d", cbn.BatchNorm2d), ("BatchNorm3d", cbn.BatchNorm3d)):
        options = dict(num_features=CHANNELS, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, weight=True, bias=True, axis=1, unbiased=False,
                       activation=("clip", 0, 1), dtype=np.float32, stats_dtype=None, on_nonfinite="propagate", frozen=None,
                       comm=None, reduce_grads=False)  # fmt: skip
        yield name, lambda kind=kind, options=options: (kind, options, None)
    for mode in ("training", "eval", "frozen"):
        made = lambda mode=mode: layer(frozen="statistics" if mode == "frozen" else None).train(mode == "training")
        yield "layer", lambda made=made: (lambda of, **arguments: of(**arguments), {"x": X.copy(), "residual": X.copy(), "out": X.copy()}, made())
        yield "backward", lambda made=made: (lambda of, **arguments: of.backward(**arguments), {"dy": X.copy(), "out": X.copy(), "retain": True}, layer())
        for name in ATTRIBUTES:
            yield "assignment", lambda made=made, name=name: (lambda of, value: assign(of, name, value), {"value": 1}, made())
    state = lambda: cbn.BatchNorm2d(CHANNELS).state_dict()
    yield "load_state_dict", lambda: (lambda of, **arguments: of.load_state_dict(**arguments), {"state_dict": state(), "strict": True}, layer())
    yield "train", lambda: (lambda of, mode: of.train(mode), {"mode": True}, layer())
    yield "freeze", lambda: (lambda of, affine: of.freeze(affine), {"affine": True}, layer())
    yield "merge", lambda: (cbn.batch_stats(X).merge, {"other": cbn.batch_stats(X)}, None)
    network = lambda: {"a": layer(), "b": cbn.BatchNorm2d(CHANNELS, affine=False)}
    for name in ("parameters", "to_torch", "to_keras", "to_flax", "to_onnx"):
        yield name, lambda name=name: (getattr(cbn, name), {"layers": network()}, None)
    yield "state_dict", lambda: (cbn.state_dict, {"layers": network(), "prefix": "net."}, None)
    yield "load_state_dict", lambda: (
        cbn.load_state_dict, {"layers": network(), "state_dict": cbn.state_dict(network(), prefix="net."), "strict": True, "prefix": "net."}, None)  # fmt: skip
    yield "from_config", lambda: (cbn.BatchNorm.from_config, {"config": layer().config()}, None)
    found = lambda: {"eps": 1e-5, "momentum": 0.1, "prefix": "", "names": {"a": "b"}}
    yield "from_torch", lambda: (cbn.from_torch, {"source": {f"a.{name}": a for name, a in state().items()}, **found()}, None)
    flax = {"a": {"mean": vector(), "var": vector()}}
    for variables in (flax, {"params": {}, "batch_stats": flax}):
        yield "from_flax", lambda variables=variables: (cbn.from_flax, {"variables": variables, "axis": -1, **found()}, None)
    described = {"class_name": "BatchNormalization", "config": {"name": "a", "axis": -1, "momentum": 0.9, "epsilon": 1e-3, "scale": False, "center": False}}
    for config in (None, {"layers": [described]}, described["config"]):
        yield "from_keras", lambda config=config: (
            cbn.from_keras, {"source": {"a/moving_mean": vector(), "a/moving_variance": vector()}, "config": config, "axis": -1, **found()}, None)  # fmt: skip
    yield "from_onnx", lambda: (cbn.from_onnx, {"model": onnx_model(), "prefix": "", "names": {"a": "b"}}, None)
    convolution = {"order": "torch", "groups": 1, "transposed": False, "before": True, "padding": (0, 0)}
    yield "fold_conv", lambda: (cbn.fold_conv, {"weight": of(CHANNELS, CHANNELS, 1, 1), "bias": vector(), "bn": bn(), **convolution}, None)
    yield "fold_linear", lambda: (
        cbn.fold_linear, {"weight": of(CHANNELS, CHANNELS), "bias": vector(), "bn": bn(), "order": "torch", "before": False}, None)  # fmt: skip
    images = {"scale": 1 / 255, "layout": "channels_first", "dtype": None, "out": None}
    yield "normalize_images", lambda: (
        cbn.normalize_images, {"images": of(2, 4, 4, CHANNELS, dtype=np.uint8), "mean": vector(), "std": vector(), **images}, None)  # fmt: skip
    yield "set_num_threads", lambda: (cbn.set_num_threads, {"n": 1}, None)
    yield "num_threads", lambda: (lambda n: use(cbn.num_threads(n)), {"n": 1}, None)
    yield "set_cache_limit", lambda: (cbn.set_cache_limit, {"size": 0}, None)
    yield "set_isa", lambda: (dispatch.set_isa, {"name": "baseline"}, None)
    yield "set_stream_bytes", lambda: (dispatch.set_stream_bytes, {"size": 0}, None)


TARGETS = list(targets())


def junk(pick, arguments):
    """Drawn junk, or an array that another argument is, too."""
    if pick(range(12)) == 0:
        return pick(list(arguments.values()))
    drawn = pick(JUNK)()
    endless = type(drawn) is np.ndarray and drawn.size > 1 << 30 and len(arguments) < 3  # to read for statistics alone, without an output
    return None if endless else drawn


def spoil(pick, value, arguments):
    """Junk in the place of the value, or of a part of it."""
    if isinstance(value, dict) and value and pick((True, True, False)):
        key = pick(list(value))
        return {**value, key: junk(pick, arguments)} if pick(range(5)) else {**value, "extra" if pick((True, False)) else 5: junk(pick, arguments)}
    if isinstance(value, tuple) and value and pick((True, True, False)):
        i = pick(range(len(value)))
        parts = [*value[:i], junk(pick, arguments), *value[i + 1 :]]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return junk(pick, arguments)


def arrays_in(value):
    if isinstance(value, np.ndarray):
        if value.dtype != object and value.nbytes < 1 << 20:
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from arrays_in(part)
    elif isinstance(value, dict):
        yield from arrays_in(list(value.values()))


def snapshot(arguments, of):
    found = list(arrays_in(list(arguments.values())))
    if of is not None:
        found += [value for value in vars(of).values() if isinstance(value, np.ndarray)]
    attributes = {} if of is None else {name: value for name, value in vars(of).items() if name != "_changes"}
    settings = cbn.get_num_threads(), cbn.get_cache_limit(), dispatch.get_isa(), dispatch.get_stream_bytes()
    return [(a, np.ascontiguousarray(a).tobytes()) for a in found], attributes, settings


def unchanged(before, of):
    """What a call that failed has changed, or None."""
    found, attributes, settings = before
    for a, data in found:
        if np.ascontiguousarray(a).tobytes() != data:
            return f"an array of shape {np.ndarray.__getattribute__(a, 'shape')} was written"
    if of is not None and any(vars(of).get(name) is not value for name, value in attributes.items()):
        return "attributes " + ", ".join(name for name, value in attributes.items() if vars(of).get(name) is not value)
    if settings != (cbn.get_num_threads(), cbn.get_cache_limit(), dispatch.get_isa(), dispatch.get_stream_bytes()):
        return "settings"
    return None


def one(index, seed):
    """Make a call; returns its name and outcome, or raises AssertionError."""
    rng = random.Random(seed << 40 | index).random
    pick = lambda options: options[int(rng() * len(options))]
    name, make = pick(TARGETS)
    call, arguments, of = make()
    for _ in range(pick((1, 1, 1, 1, 2, 3))):
        argument = pick(list(arguments))
        arguments[argument] = spoil(pick, arguments[argument], arguments)
    before = snapshot(arguments, of)
    settings = before[2]
    mode = pick(("ignore", "error"))
    with warnings.catch_warnings(), np.errstate(all=pick(("ignore", "warn", "raise"))):
        warnings.simplefilter(mode)
        try:
            call(**arguments) if of is None else call(of, **arguments)
            outcome = "done"
        except Exception as error:
            outcome = type(error).__name__
            allowed = isinstance(error, ALLOWED) or mode == "error" and isinstance(error, Warning) or name == "assignment" and isinstance(
                error, AttributeError) and "fixed when" in str(error) or isinstance(error, FloatingPointError) and "on_nonfinite" in str(error)
            allowed = allowed or isinstance(error, RuntimeError) and str(error).startswith("backward:")
            allowed = allowed or isinstance(error, OSError | ImportError) and name in ("from_keras", "from_onnx")  # of files that aren't there
            assert allowed and str(error), f"{name}{tuple(arguments)}: {type(error).__name__}: {error!s:.200}"
            changed = unchanged(before, of) if name != "assignment" else None
            assert changed is None, f"{name}: {changed} by a call that failed: {error!s:.200}"
    cbn.set_num_threads(settings[0]), cbn.set_cache_limit(settings[1]), dispatch.set_isa(settings[2]), dispatch.set_stream_bytes(settings[3])
    return name, outcome


def make_calls(seed, start, count):
    """In this process; prints the number of each call that is at fault."""
    faulthandler.enable()
    counts, faults = collections.Counter(), 0
    for index in range(start, start + count):
        os.pwrite(3, b"%20d" % index, 0)  # where the parent finds it if this call is the last one
        try:
            counts[one(index, seed)[1]] += 1
        except AssertionError as error:
            faults += 1
            print(f"call {index} of seed {seed}: {error}", flush=True)
    print("counts", dict(counts), flush=True)
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first call")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return int(make_calls(options.seed, options.start, options.calls) > 0)
    start, end, wrong = options.start, options.start + options.calls, 0
    place = os.memfd_create("call") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
    os.dup2(place, 3)
    while start < end:
        command = [sys.executable, __file__, "--child", f"--seed={options.seed}", f"--start={start}", f"--calls={end - start}"]
        done = subprocess.run(command, pass_fds=(3,))
        wrong += done.returncode != 0
        if done.returncode in (0, 1):
            break
        died = int(os.pread(3, 20, 0) or -1)
        print(f"call {died} of seed {options.seed}: the process died, {done.returncode}", flush=True)
        start = died + 1
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
