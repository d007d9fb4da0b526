"""The layers: a batch normalization with its parameters, running statistics and modes, behaving as PyTorch's of the same name."""

import collections.abc
import functools
import weakref
from typing import NamedTuple

import numpy as np

from .functional import (
    array_of, batch_norm, batch_norm_backward, check_writeable, checked_activation, checked_flag, checked_integer, checked_number,
    forward_training, overlap,
)  # fmt: skip
from .states import NAMES, converted, form_of_count, load, lock_of, read, write
from .synchronize import Group
from .words import show, warn


def _checked_policy(value):
    if not isinstance(value, str) or value not in ("propagate", "skip", "raise"):
        raise ValueError(f'on_nonfinite: expected "propagate", "skip" or "raise", got {show(value)}')
    return value


def _finite(stats, running=()):
    """Which channels' statistics are finite, as they are and as they would be stored in `running`; of no values, all count as such."""
    fine = np.isfinite(stats.mean) & np.isfinite(stats.var)
    for a in running:
        fine &= np.isfinite(a)
    return fine | (stats.count == 0)


def _refuse_nonfinite(stats, running=()):
    bad = np.flatnonzero(~_finite(stats, running))
    if bad.size:
        c = bad[0]
        stored = f", which {running[0].dtype} would store as {running[0][c]} and {running[1][c]}" if running and _finite(stats)[c] else ""
        raise FloatingPointError(f'x: expected a finite mean and variance of each channel [on_nonfinite="raise"], got mean {stats.mean[c]} '
                                 f"and variance {stats.var[c]} for channel {c}{stored}" + (f" ({bad.size} channels in all)" if bad.size > 1 else ""))


def _checked_dtype(value, name):
    try:
        dtype = None if value is None else np.dtype(value)
    except Exception:
        dtype = None
    if dtype is None or dtype not in (np.float32, np.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {show(value) if dtype is None else dtype}")
    return dtype


def _checked_array(layer, name, value):
    """A parameter or a running statistic as an array of shape (C,) of the layer's type: `value` itself where it is one, or a copy."""
    if value is None:
        return None
    array = array_of(value, name)
    channels, dtype = layer.num_features, layer._dtype_of(name)
    if array.shape not in ((channels,), (1, channels)):
        should = "" if array.size == channels else f" should contain {channels} elements not {array.size}"
        raise ValueError(f"{name}{should}: expected shape ({channels},), got {array.shape} [num_features={channels}]")
    array = converted(array, name, dtype)
    if name == "running_var":
        _check_variance(layer, name, array)
    return array if array.ndim == 1 else array[0]


def _check_variance(layer, label, array):
    if (array < 0).any() and not (array.astype(np.float64) + layer.eps > 0)[array < 0].all():
        c = int(array.argmin())
        raise ValueError(f"{label}: expected non-negative values, got {array.reshape(-1)[c]} for channel {c} [eps={layer.eps}]")


def _checked_count(layer, name, value):
    return None if value is None else form_of_count(name, value)


class _Checked:
    """An attribute that is checked, and brought into its form, whenever it is set. Reading it costs nothing more."""

    def __init__(self, check):
        self.check = check

    def __set_name__(self, owner, name):
        self.name = name

    def __set__(self, layer, value):
        layer.__dict__[self.name] = self.check(layer, self.name, value)

    def __delete__(self, layer):
        raise AttributeError(f"{self.name}: can't be deleted; set it to None if it may be missing")


def _checked_eps(value):
    try:
        return checked_number(value, "eps")
    except ValueError:
        raise ValueError(f"batch_norm eps must be positive during training, non-negative and finite in any case, but got {show(value)}") from None


def _flag(layer, name, value):
    return checked_flag(value, name)


def _fixed(layer, name, value):
    if name in layer.__dict__:
        raise AttributeError(f"{name}: fixed when the layer was made; make a new layer")
    return value


def _weak(a):
    """A weak reference; of what allows none (a list), one that is dead."""
    try:
        return weakref.ref(a)
    except TypeError:
        return lambda: None


@functools.cache        # NumPy takes a microsecond
def _name_of(dtype):
    return dtype.name


def _held(a):
    """What was kept of a call: an array itself, or what is left behind a weak reference."""
    return a() if callable(a) else a


def _outline(a):
    """An array of a's shape and dtype in next to no memory, where a gradient needs no more than those."""
    return np.ndarray(a.shape, a.dtype, np.zeros(1, a.dtype), strides=(0,) * a.ndim)


def overwritten(out, *arrays):
    """Whether writing `out` changes one of the arrays."""
    return out is not None and any(a is not None and overlap(a, out) for a in arrays)


class _Call(NamedTuple):
    """What `backward` goes back through: the last call's arguments and the attributes that it read."""

    x: object               # x and the residual: arrays, or in eval mode weak references
    residual: object
    stats: object           # BatchStats in training, else (running_mean, running_var)
    training: bool
    affine_grad: bool
    weight: object
    bias: object
    eps: float
    axis: int
    activation: object
    group: object = None    # of a batch that lies on several ranks, these


class _Together(str):
    """Why there is no call to go back through, where the layers of other ranks may have one: they are told."""


class BatchNorm:
    """Batch normalization over `num_features` channels of an array of any rank >= 2.

    y = layer(x) normalizes by the batch's statistics while training, and updates the running statistics; in eval mode it normalizes by those.

    num_features : C, the length of the channel axis.
    eps : added to the variance; > 0 in training.
    momentum : weight of a new batch in the running statistics, in [0, 1]; None: they are the average over all batches.
    affine : whether there are a weight (ones at first) and a bias (zeros); weight=False or bias=False leaves out one of them.
    track_running_stats : if False, there are no running statistics, and both modes use the batch's.
    axis : the channel axis: 1 for (N, C, ...), -1 for (N, ..., C).
    unbiased : whether running_var tracks the unbiased variance (PyTorch) or the population variance (Keras, TensorFlow, ONNX, Flax).
    frozen : None, "statistics" or "all": what stays as it is in a network that trains, in either mode: see `freeze`.
    activation : None, "relu", "relu6", ("clip", low, high), ("leaky_relu", slope), "hard_swish", "sigmoid" or "silu": what follows, in the same
        pass over memory.
    dtype : of weight, bias and the running statistics, float32 or float64.
    stats_dtype : of the running statistics, if another: float64 holds variances beyond 3.4e38.
    on_nonfinite : what a batch does whose mean or variance of some channel is NaN or infinite, while training:
        "propagate": it makes that channel's running statistics so, too;
        "skip": that channel's running statistics stay as they were; num_batches_tracked counts the batch unless it skips every channel;
        "raise": the call raises FloatingPointError, having changed nothing. Costs nothing more, unless `out` is given: then x is read
        once more beforehand, as its statistics must be known before anything is written.
    comm : None, or a communicator of mpi4py whose ranks normalize the parts of one batch, in training: see docs/distributed.md. To set it is
        collective. Copies of a layer keep it, pickles don't.
    reduce_grads : with `comm`, whether weight_grad and bias_grad are of all ranks' parts, or of this one's, as those of a network's other
        layers are.

    Attributes: weight, bias, running_mean, running_var: arrays of shape (C,) or None; num_batches_tracked: int64 array of shape () or None;
    weight_grad, bias_grad, residual_grad: gradients of the last `backward`, or None; training: the mode. Failing calls change
    none of them. What is set is checked at once: arrays of the layer's type are kept as they are, anything else is copied into one.

    From many threads at once, calls in eval mode or frozen run together; those that train, `backward` and all other methods one after the
    other. Ioffe & Szegedy 2015, algorithms 1 and 2.
    """

    _ranks = None   # the ranks of input that are accepted, and how an error calls them
    _expected = ""

    num_features, dtype, stats_dtype = (_Checked(_fixed) for _ in range(3))
    weight, bias, running_mean, running_var = (_Checked(_checked_array) for _ in range(4))
    num_batches_tracked = _Checked(_checked_count)
    affine, track_running_stats, training, unbiased, reduce_grads = (_Checked(_flag) for _ in range(5))
    eps = _Checked(lambda layer, name, value: _checked_eps(value))
    momentum = _Checked(lambda layer, name, value: None if value is None else checked_number(value, name))
    axis = _Checked(lambda layer, name, value: checked_integer(value, name))
    activation = _Checked(lambda layer, name, value: checked_activation(value))
    on_nonfinite = _Checked(lambda layer, name, value: _checked_policy(value))
    frozen = _Checked(lambda layer, name, value: layer._checked_frozen(value))
    _group = None   # the ranks of comm

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, *, weight=True, bias=True,
                 axis=1, unbiased=True, activation=None, dtype=np.float32, stats_dtype=None, on_nonfinite="propagate", frozen=None,
                 comm=None, reduce_grads=False):
        channels = checked_integer(num_features, "num_features")
        if not 0 <= channels < 1 << 48:
            raise ValueError(f"num_features: expected a number of channels, got {show(num_features)}")
        self.num_features = channels
        self.dtype = _checked_dtype(dtype, "dtype")
        self.stats_dtype = self.dtype if stats_dtype is None else _checked_dtype(stats_dtype, "stats_dtype")
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.axis = axis
        self.unbiased = unbiased
        self.activation = activation
        self.on_nonfinite = on_nonfinite
        self.training = True
        with_weight, with_bias = checked_flag(weight, "weight"), checked_flag(bias, "bias")
        self.weight = np.ones(channels, self.dtype) if self.affine and with_weight else None
        self.bias = np.zeros(channels, self.dtype) if self.affine and with_bias else None
        self.running_mean = np.zeros(channels, self.stats_dtype) if self.track_running_stats else None
        self.running_var = np.ones(channels, self.stats_dtype) if self.track_running_stats else None
        self.num_batches_tracked = np.zeros((), np.int64) if self.track_running_stats else None
        self.weight_grad = None
        self.bias_grad = None
        self.residual_grad = None
        self._may_be_untrained = self.track_running_stats
        self._changes = [0]     # of the arrays, counted before and after each: odd while one is under way
        self.frozen = frozen
        self._forward = "no call came before"      # what a _Call holds, or why there is none
        self.reduce_grads = reduce_grads
        if comm is not None:
            self.comm = comm        # last, as other ranks wait for it

    @property
    def comm(self):
        return None if self._group is None else self._group.comm

    @comm.setter
    def comm(self, comm):
        self._group = None if comm is None else Group(comm, self.num_features)

    def _dtype_of(self, name):
        return self.stats_dtype if name.startswith("running") else self.dtype

    def __call__(self, x, *, residual=None, out=None):
        """Normalize x, of shape (N, C, ...), by the batch's statistics (training) or the running ones (eval).

        residual : array of x's shape and dtype to add before the activation, or None.
        out : array of x's shape and dtype to write; may be x or the residual itself, at the cost of `backward`. None: a new array.
        Raises ValueError, TypeError or (on_nonfinite="raise") FloatingPointError, having changed neither `out` nor the layer.
        """
        group = self._group
        if group is not None and self.training and self.frozen is None:
            return self._call_together(group, x, residual, out)
        given, given_residual = x, residual
        if type(x) is not np.ndarray:
            x = array_of(x, "x")
        if residual is not None and type(residual) is not np.ndarray:
            residual = array_of(residual, "residual")
        if self._ranks is not None and x.ndim not in self._ranks:
            raise self._unexpected(x)
        own = self.__dict__     # where a _Checked attribute is: in a third of the time
        frozen, training = own["frozen"], own["training"]
        if frozen is not None:
            self._checked_frozen(frozen)
        if own["running_mean"] is None and own["running_var"] is None:
            return self._call_training(x, residual, out)
        if training and frozen is None:
            with self._lock:
                if self.training and self.frozen is None:       # still, after other threads' calls
                    return self._call_training(x, residual, out)
        if own["_may_be_untrained"]:
            self._warn_if_untrained()
        # What another thread loads or trains meanwhile is seen in whole or not at all: a call whose parameters were changed under it is made again.
        count = own["_changes"]
        changes, training = count[0], own["training"]
        mean, var, weight, bias = arrays = own["running_mean"], own["running_var"], own["weight"], own["bias"]
        eps, axis, activation = own["eps"], own["axis"], own["activation"]
        in_place = out is not None and overwritten(out, x, residual)
        copied = in_place or changes % 2 == 1
        if copied:
            arrays = self._copies(arrays)
        y = batch_norm(x, *arrays, False, 0.0, eps, axis=axis, activation=activation, residual=residual, out=out)
        if not copied and changes != count[0]:
            y = batch_norm(x, *self._copies(arrays), False, 0.0, eps, axis=axis, activation=activation, residual=residual, out=out)
        own["_may_be_untrained"] = False    # only now: the warning of a call that fails is not the last one
        affine = frozen != "all" and (weight is not None or bias is not None)
        if not affine and activation is None:
            x = _outline(x)
            kept, kept_residual = x, None if residual is None else x
        elif in_place:
            self._forward = "the last call wrote its output over its input"
            return y
        elif training:
            kept, kept_residual = x, residual
        else:   # weak, so that a network at inference doesn't keep its layers' inputs alive
            kept, kept_residual = _weak(given), None if residual is None else _weak(given_residual)
        own["_forward"] = kept, kept_residual, (mean, var), False, affine, weight, bias, eps, axis, activation      # a _Call, made quickly
        return y

    def _copies(self, arrays):
        """Of one moment."""
        with self._lock:
            return [None if a is None else a.copy() for a in arrays]

    @property
    def _lock(self):
        return lock_of(self)

    def _unexpected(self, x):
        return ValueError(f"expected {self._expected} input (got {x.ndim}D input)")

    def _call_together(self, group, x, residual, out):
        """A training call whose batch is that of all ranks."""
        with group.lock:
            if not self.training or self.frozen is not None:        # after other threads' calls
                return self(x, residual=residual, out=out)
            with group.together():
                x = array_of(x, "x")
                residual = None if residual is None else array_of(residual, "residual")
                if self._ranks is not None and x.ndim not in self._ranks:
                    raise self._unexpected(x)
                return self._call_training(x, residual, out, group)

    def _call_training(self, x, residual, out, group=None):
        weight, bias, eps, axis, activation = used = self.weight, self.bias, self.eps, self.axis, self.activation
        tracked = self.training and self.track_running_stats
        running = (self.running_mean, self.running_var) if tracked else (None, None)
        if running[0] is None:
            self._check_channels(x)
        batches = self.num_batches_tracked if tracked else None
        momentum = self.momentum
        if momentum is None:
            momentum = 0.0 if batches is None else 1.0 / (int(batches) + 1)
        policy = self.on_nonfinite
        merge = None if group is None else lambda stats: group.statistics(stats, self._agreed(x, residual, momentum))
        if tracked:
            self._changes[0] |= 1       # odd, also where an interrupt left it so
        try:
            y, stats = forward_training(x, *running, weight, bias, momentum, eps, axis, activation, residual, out, batches,
                                        None if policy == "propagate" else self._accept, policy == "raise", self.unbiased, merge)
        finally:
            if tracked:
                self._changes[0] += 1
        if tracked:
            self._may_be_untrained = False
        self._forward = ("the last call wrote its output over its input" if overwritten(out, x, residual) else
                         (x, residual, stats, True, True, *used))
        if group is not None:
            self._forward = _Together(self._forward) if isinstance(self._forward, str) else _Call(*self._forward, group)
        return y

    def _agreed(self, x, residual, momentum):
        """What must be the same on all ranks of a call, as texts."""
        own = self.__dict__
        names = ("axis", "eps", "unbiased", "activation", "on_nonfinite", "track_running_stats")
        return [f"x of {x.ndim} dimensions", f"x of {_name_of(x.dtype)}", f"parameters of {_name_of(self.dtype)}",
                f"running statistics of {_name_of(self.stats_dtype)}", f"momentum={momentum}",
                f"residual={'None' if residual is None else 'an array'}", *[f"{name}={own[name]}" for name in names]]

    def _accept(self, stats, mean, var):
        """What on_nonfinite "skip" or "raise" makes of a batch by its statistics and the new running ones (or None); returns whether it counts."""
        new = () if mean is None else (mean, var)
        if self.on_nonfinite == "raise":
            _refuse_nonfinite(stats, new)
        fine = _finite(stats, new)
        for a, before in zip(new, (self.running_mean, self.running_var), strict=False):
            np.copyto(a, np.reshape(before, a.shape), where=~fine)
        return bool(fine.any() or not fine.size)

    def _check_channels(self, x):
        """Where no parameter's shape tells that x is wrong."""
        try:
            channels = x.shape[self.axis]
        except (TypeError, IndexError):     # the call itself says what is wrong
            return
        if x.ndim >= 2 and channels != self.num_features:
            raise ValueError(f"x: expected {self.num_features} channels, got {channels} [x has shape {x.shape}, axis={self.axis}]")

    def _warn_if_untrained(self):
        mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if batches is not None and batches == 0 and mean is not None and var is not None and not mean.any() and (var == 1).all():
            state = "in eval mode" if self.frozen is None else "frozen"
            warn(f"{type(self).__name__} {state} uses running statistics that were never updated (mean 0, variance 1), so it does not "
                 "normalize: run batches in training mode first, or load trained statistics")

    def backward(self, dy, *, out=None, retain=False):
        """The gradient with respect to the input of the last call (of any thread), from that with respect to its output.

        dy : array of the shape and dtype of that input, which must not have been changed since (and, after a call in eval mode, still exist).
        out : array to write, may be dy itself; None: a new array.
        retain : whether what is kept of the call stays for another `backward`; otherwise it is used up, and the input released.
        Sets weight_grad and bias_grad, shape (C,), of the parameters that there are (None after a call with frozen="all"), and residual_grad,
        of x's shape, if there was one. Raises RuntimeError where there is no call to go back through.
        """
        with self._lock:
            forward = self._forward
            group = forward.group if type(forward) is _Call else self._group if type(forward) is _Together else None
            if group is None:
                return self._backward(dy, out, retain)
            with group.together():
                return self._backward(dy, out, retain)

    def _backward(self, dy, out, retain):
        retain = checked_flag(retain, "retain")
        reason = self._forward if isinstance(self._forward, str) else None
        if reason is None:
            call = _Call(*self._forward)
            x, residual = _held(call.x), _held(call.residual)
            if x is None or residual is None and call.residual is not None:
                reason = ("in eval mode a layer keeps only a weak reference to its input, which is gone, or was a list or another object that allows "
                          "none: pass an array and keep it")
        if reason is not None:
            raise RuntimeError("backward: expected a call of the layer before, whose input still exists and was not overwritten (out=x), "
                               f"got none: {reason}")
        gradients = batch_norm_backward(dy, x, call.stats, call.weight, call.bias, call.eps, axis=call.axis, training=call.training,
                                        affine_grad=call.affine_grad, activation=call.activation, residual=residual,
                                        sums=None if call.group is None else call.group.sums, out=out)
        weight_grad, bias_grad = gradients.weight, gradients.bias
        if call.group is not None and not self.reduce_grads:
            own = call.group.own
            with np.errstate(all="ignore"):
                weight_grad, bias_grad = own.dy_xhat.astype(weight_grad.dtype), own.dy.astype(bias_grad.dtype)
        self.weight_grad = weight_grad if call.weight is not None else None
        self.bias_grad = bias_grad if call.bias is not None else None
        self.residual_grad = gradients.residual
        if not retain:
            reason = "the last call's was used up by the backward before, which keeps it with retain=True"
            self._forward = reason if call.group is None else _Together(reason)
        return gradients.x

    def _checked_frozen(self, value):
        if value is not None and (not isinstance(value, str) or value not in ("statistics", "all")):
            raise ValueError(f'frozen: expected None, "statistics" or "all", got {show(value)}')
        if value is not None and (self.running_mean is None or self.running_var is None):
            raise ValueError(f"frozen: expected None where there are no running statistics [track_running_stats=False], got {value!r}")
        return value

    def freeze(self, affine=True):
        """Keep the running statistics as they are, and normalize by them in either mode, until unfreeze(); returns the layer.

        affine : whether weight and bias are fixed, too, and `backward` gives the gradient of the input alone (FrozenBatchNorm2d; Keras'
            `trainable = False`). Without an activation it then needs no input: none is kept alive, and `out` may be x. affine=False is
            PyTorch's `bn.eval()`, but not undone by train().
        `backward` goes by what was frozen at the call. Raises ValueError where there are no running statistics.
        """
        self.frozen = "all" if checked_flag(affine, "affine") else "statistics"
        return self

    def unfreeze(self):
        """Let the mode decide again; returns the layer."""
        self.frozen = None
        return self

    def train(self, mode=True):
        """Set the training mode (mode=False: eval mode), which is without effect on the results of a frozen layer; returns the layer.

        A call that trains, in another thread, is waited for.
        """
        with self._lock:
            self.training = checked_flag(mode, "mode")
        return self

    def eval(self):
        """Set the eval mode; returns the layer."""
        return self.train(False)

    def reset_running_stats(self):
        """Set the running statistics to mean 0 and variance 1, seen in no batch."""
        self._reset(("running_mean", "running_var", "num_batches_tracked") if self.track_running_stats else ())

    def reset_parameters(self):
        """Set the weight to ones and the bias to zeros, and reset the running statistics."""
        tracked = ("running_mean", "running_var", "num_batches_tracked") if self.track_running_stats else ()
        self._reset(tracked + (("weight", "bias") if self.affine else ()))

    def _reset(self, names):
        with self._lock:
            state = self._state()
            ones = ("weight", "running_var")
            self._write({name: (np.ones_like if name in ones else np.zeros_like)(state[name]) for name in names if name in state})
            if "running_var" in names:
                self._may_be_untrained = self.running_var is not None

    def _write(self, values):
        """Write arrays of the shape and type of those of the state into these: all of them or, where one can't be written, none. The lock is held."""
        state = self._state()
        for name in values:
            check_writeable(state[name], name)
        write([self], [(state[name], value) for name, value in values.items()])

    def _state(self):
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}

    def state_dict(self):
        """Copies of the parameters and running statistics, under PyTorch's names and in its order."""
        with self._lock:
            return {name: array.copy() for name, array in self._state().items()}

    def load_state_dict(self, state_dict, strict=True):
        """Copy parameters and running statistics from a mapping of names to array-likes, or from a PyTorch module or another layer.

        strict : whether to refuse missing and unexpected names. A state dict without num_batches_tracked (of old PyTorch) is accepted.
        Returns (missing_keys, unexpected_keys). Raises ValueError that names each key that doesn't fit, or TypeError, having changed nothing.
        """
        return load({"": self}, *read(state_dict), checked_flag(strict, "strict"), f"Error(s) in loading state_dict for {type(self).__name__}")

    def _loaded(self, name, value, label):
        """A copy of what is to be loaded, in the form of the state's array, or an error that calls it `label`."""
        if name == "num_batches_tracked":
            return form_of_count(label, value).copy()
        array = array_of(value, label)
        expected = (self.num_features,)
        if array.shape not in (expected, (1, *expected)):
            raise ValueError(f"size mismatch for {label}: expected shape {expected}, got {array.shape}")
        array = converted(array, label, self._dtype_of(name)).reshape(expected).copy()
        if name == "running_var":
            _check_variance(self, label, array)
        return array

    def _at_inference(self):
        """Copies of running_mean, running_var, weight and bias, all of one moment, and eps."""
        with self._lock:
            arrays = self.running_mean, self.running_var, self.weight, self.bias
            return *(None if a is None else a.copy() for a in arrays), self.eps

    def __getstate__(self):
        """Of one moment, whatever other threads train meanwhile: for pickles and deep copies."""
        with self._lock:
            state = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in self.__dict__.items()}
        return state | {"_forward": "a copy of a layer starts without one", "_changes": [0]}

    def __setstate__(self, state):
        self.__dict__.update(state)

    def __copy__(self):
        """Another layer of the same arrays."""
        other = object.__new__(type(self))
        with self._lock:
            other.__dict__.update(self.__dict__, _forward="a copy of a layer starts without one", _changes=[0])
        return other

    def config(self):
        """The class and the arguments that make such a layer, of Python's plain types, as JSON has them: {"class": "BatchNorm2d", ...}.

        What is in the arrays, the mode, the gradients and `comm` are not part of it.
        """
        activation = self.activation
        if isinstance(activation, tuple):
            activation = [activation[0], *map(float, activation[1:])]
        return {
            "class": type(self).__name__, "num_features": int(self.num_features), "eps": self.eps, "momentum": self.momentum,
            "affine": self.weight is not None or self.bias is not None, "track_running_stats": self.track_running_stats,
            "weight": self.weight is not None, "bias": self.bias is not None, "axis": int(self.axis), "unbiased": self.unbiased,
            "activation": activation, "dtype": self.dtype.name, "stats_dtype": self.stats_dtype.name, "on_nonfinite": self.on_nonfinite,
            "frozen": self.frozen, "reduce_grads": self.reduce_grads,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config):
        """The layer that `config`, as `config()` gave it, describes: of the class that it names, which is this one or one derived from it.

        Arguments that it lacks have their defaults. Raises ValueError or TypeError.
        """
        if not isinstance(config, collections.abc.Mapping):
            raise TypeError(f"config: expected a mapping of names to values, got {type(config).__name__}")
        options = dict(config)
        kinds, name = {kind.__name__: kind for kind in _derived(cls)}, options.pop("class", cls.__name__)
        if not isinstance(name, str) or name not in kinds:
            raise ValueError(f"config: expected a class among {', '.join(sorted(kinds))}, got {show(name)}")
        if isinstance(options.get("activation"), list):
            options["activation"] = tuple(options["activation"])
        return kinds[name](**options)

    def __repr__(self):
        options = self.config()
        shown = {name: options[name] for name in ("eps", "momentum")} | {"affine": self.affine, "track_running_stats": self.track_running_stats}
        if self.affine:
            shown |= {name: False for name in ("weight", "bias") if not options[name]}
        usual = {"axis": 1, "unbiased": True, "activation": None, "dtype": "float32", "stats_dtype": options["dtype"], "on_nonfinite": "propagate",
                 "frozen": None, "reduce_grads": False}  # fmt: skip
        shown |= {name: options[name] for name, value in usual.items() if options[name] != value}
        if isinstance(self.activation, tuple):
            shown["activation"] = tuple(options["activation"])
        comm = "" if self._group is None else f", comm=<rank {self._group.rank} of {self._group.size}>"
        return f"{type(self).__name__}({self.num_features}, {', '.join(f'{name}={value!r}' for name, value in shown.items())}{comm})"


def _derived(cls):
    yield cls
    for kind in cls.__subclasses__():
        yield from _derived(kind)


class BatchNorm1d(BatchNorm):
    """Batch normalization of (N, C) or (N, C, L) arrays, or with axis=-1 (N, L, C): see BatchNorm."""

    _ranks = (2, 3)
    _expected = "2D or 3D"


class BatchNorm2d(BatchNorm):
    """Batch normalization of (N, C, H, W) arrays, or with axis=-1 (N, H, W, C): see BatchNorm."""

    _ranks = (4,)
    _expected = "4D"


class BatchNorm3d(BatchNorm):
    """Batch normalization of (N, C, D, H, W) arrays, or with axis=-1 (N, D, H, W, C): see BatchNorm."""

    _ranks = (5,)
    _expected = "5D"
