"""The layers: a batch normalization with its parameters, running statistics and modes, behaving as PyTorch's of the same name."""

import collections.abc
import contextlib
import functools
import os
import threading
import weakref
from typing import NamedTuple

import numpy as np

from .functional import (
    array_of, batch_norm, batch_norm_backward, check_writeable, checked_activation, checked_flag, checked_integer, checked_number,
    forward_training, overlap, store,
)  # fmt: skip
from .synchronize import LOCKS as _LOCKS_OF_GROUPS
from .synchronize import Group
from .words import show, warn


class IncompatibleKeys(NamedTuple):
    """What load_state_dict(strict=False) passed over."""

    missing_keys: list
    unexpected_keys: list


# What changes a layer's state, or takes several parts of it, holds one of these, chosen by the layer's address: a lock of its own could be
# neither copied nor pickled. Reentrant, as a signal's handler may save the layer that a call is training.
_LOCKS = tuple(threading.RLock() for _ in range(61))
_locks_held = contextlib.ExitStack()


def _hold_all():
    for lock in (*_LOCKS, *_LOCKS_OF_GROUPS):
        _locks_held.enter_context(lock)


def _release_all():
    _locks_held.pop_all().close()     # detached first: with the first lock, the next to fork may come


# A forked child finds each layer as between two calls, and no lock held by a thread that it doesn't have.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_all, after_in_parent=_release_all, after_in_child=_release_all)


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
    converted = _converted(array, name, dtype)
    _check_variance(layer, name, converted)
    return converted if converted.ndim == 1 else converted[0]


def _check_variance(layer, name, array):
    if name == "running_var" and (array < 0).any() and not (array.astype(np.float64) + layer.eps > 0)[array < 0].all():
        c = int(array.argmin())
        raise ValueError(f"{name}: expected non-negative values, got {array.reshape(-1)[c]} for channel {c} [eps={layer.eps}]")


def _converted(array, name, dtype):
    """`array` in another type, itself where it has that, or an error where it holds values that the type has no room for."""
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected an array of real numbers, got {array.dtype}")
    if array.dtype == dtype and array.flags.aligned:
        return array
    with np.errstate(all="ignore"):
        converted = array.astype(dtype)
        lost = np.isfinite(array) & ~np.isfinite(converted)
    if lost.any():
        raise ValueError(f"{name}: expected values within the range of {dtype}, got {array[lost][0]}")
    return converted


def _checked_count(layer, name, value):
    """A number of batches as an int64 array of shape (): `value` itself where it is one, or a copy."""
    if value is None:
        return None
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
    affine : whether there are a weight (ones at first) and, unless bias=False, a bias (zeros).
    track_running_stats : if False, there are no running statistics, and both modes use the batch's.
    axis : the channel axis: 1 for (N, C, ...), -1 for (N, ..., C).
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
    affine, track_running_stats, training, reduce_grads = (_Checked(_flag) for _ in range(4))
    eps = _Checked(lambda layer, name, value: _checked_eps(value))
    momentum = _Checked(lambda layer, name, value: None if value is None else checked_number(value, name))
    axis = _Checked(lambda layer, name, value: checked_integer(value, name))
    activation = _Checked(lambda layer, name, value: checked_activation(value))
    on_nonfinite = _Checked(lambda layer, name, value: _checked_policy(value))
    frozen = _Checked(lambda layer, name, value: layer._checked_frozen(value))
    _group = None   # the ranks of comm

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, *, bias=True, axis=1,
                 activation=None, dtype=np.float32, stats_dtype=None, on_nonfinite="propagate", frozen=None, comm=None, reduce_grads=False):
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
        self.activation = activation
        self.on_nonfinite = on_nonfinite
        self.training = True
        with_bias = checked_flag(bias, "bias")
        self.weight = np.ones(channels, self.dtype) if self.affine else None
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
        return _LOCKS[id(self) // 16 % len(_LOCKS)] if self._group is None else self._group.lock

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
            self._changes[0] += 1
        try:
            y, stats = forward_training(x, *running, weight, bias, momentum, eps, axis, activation, residual, out, batches,
                                        None if policy == "propagate" else self._accept, policy == "raise", merge)
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
        names = ("axis", "eps", "activation", "on_nonfinite", "track_running_stats")
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
        self._changes[0] += 1
        try:
            store([(state[name], value) for name, value in values.items()])
        finally:
            self._changes[0] += 1

    def _state(self):
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def state_dict(self):
        """Copies of the parameters and running statistics, under PyTorch's names and in its order."""
        with self._lock:
            return {name: array.copy() for name, array in self._state().items()}

    def load_state_dict(self, state_dict, strict=True):
        """Copy parameters and running statistics from a mapping of names to array-likes.

        strict : whether to refuse missing and unexpected names. A state dict without num_batches_tracked (of old PyTorch) is accepted.
        Returns (missing_keys, unexpected_keys). Raises ValueError that names each key that doesn't fit, or TypeError, having changed nothing.
        """
        strict = checked_flag(strict, "strict")
        if not isinstance(state_dict, collections.abc.Mapping):
            raise TypeError(f"state_dict: expected a mapping of names to arrays, got {type(state_dict).__name__}")
        given = dict(state_dict)
        with self._lock:
            state = self._state()
            missing = [name for name in state if name not in given and name != "num_batches_tracked"]
            unexpected = [name for name in given if name not in state]
            problems = []
            if strict and missing:
                problems.append("Missing key(s) in state_dict: " + ", ".join(f'"{name}"' for name in missing))
            if strict and unexpected:
                names = (f'"{name}"' if isinstance(name, str) else show(name) for name in unexpected)
                problems.append("Unexpected key(s) in state_dict: " + ", ".join(names))
            loaded = {}
            for name in [name for name in state if name in given]:
                try:
                    loaded[name] = self._loaded(name, given[name])
                    check_writeable(state[name], name)
                except (TypeError, ValueError) as error:
                    problems.append(str(error))
            if problems:
                raise ValueError(f"Error(s) in loading state_dict for {type(self).__name__}:\n\t" + "\n\t".join(problems))
            if "running_var" in loaded and (loaded["running_var"] < 0).any():
                c = int(np.flatnonzero(loaded["running_var"] < 0)[0])
                warn(f"running_var: expected non-negative values, got {loaded['running_var'][c]} for channel {c}; computing with var + eps, "
                     "which is positive")
            self._write(loaded)
            if "running_mean" in loaded or "running_var" in loaded:
                self._may_be_untrained = False
        return IncompatibleKeys(missing, unexpected)

    def _loaded(self, name, value):
        """A copy of what is to be loaded, in the form of the state's array, or an error."""
        if name == "num_batches_tracked":
            if value is None:
                raise TypeError(f"{name}: expected an integer, got None")
            return _checked_count(self, name, value).copy()
        array = array_of(value, name)
        expected = (self.num_features,)
        if array.shape not in (expected, (1, *expected)):
            raise ValueError(f"size mismatch for {name}: expected shape {expected}, got {array.shape}")
        array = _converted(array, name, self._dtype_of(name)).reshape(expected).copy()
        _check_variance(self, name, array)
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

    def __repr__(self):
        axis = "" if self.axis == 1 else f", axis={self.axis}"
        dtype = "" if self.dtype == np.float32 else f", dtype={self.dtype.name!r}"
        dtype += "" if self.stats_dtype == self.dtype else f", stats_dtype={self.stats_dtype.name!r}"
        policy = "" if self.on_nonfinite == "propagate" else f", on_nonfinite={self.on_nonfinite!r}"
        frozen = "" if self.frozen is None else f", frozen={self.frozen!r}"
        bias = ", bias=False" if self.affine and self.bias is None else ""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        comm = "" if self._group is None else f", comm=<rank {self._group.rank} of {self._group.size}>"
        comm += ", reduce_grads=True" if self.reduce_grads else ""
        return (f"{type(self).__name__}({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
                f"track_running_stats={self.track_running_stats}{bias}{axis}{activation}{dtype}{policy}{frozen}{comm})")


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
