"""The layers: a batch normalization with its parameters, running statistics and modes, behaving as PyTorch's of the same name."""

import contextlib
import os
import threading
import warnings
import weakref
from typing import NamedTuple

import numpy as np

from .functional import array_of, batch_norm, batch_norm_backward, batch_stats, forward_training


class IncompatibleKeys(NamedTuple):
    """What load_state_dict(strict=False) passed over."""

    missing_keys: list
    unexpected_keys: list


# What changes a layer's state, or takes several parts of it, holds one of these, chosen by the layer's address: a lock of its own could be
# neither copied nor pickled. Reentrant, as a signal's handler may save the layer that a call is training.
_LOCKS = tuple(threading.RLock() for _ in range(61))
_locks_held = contextlib.ExitStack()


def _hold_all():
    for lock in _LOCKS:
        _locks_held.enter_context(lock)


def _release_all():
    _locks_held.pop_all().close()     # detached first: with the first lock, the next to fork may come


# A forked child finds each layer as between two calls, and no lock held by a thread that it doesn't have.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_all, after_in_parent=_release_all, after_in_child=_release_all)


def _checked_policy(value):
    if not isinstance(value, str) or value not in ("propagate", "skip", "raise"):
        raise ValueError(f'on_nonfinite: expected "propagate", "skip" or "raise", got {value!r}')
    return value


def _finite(stats):
    """Which channels' statistics are finite; of no values, all count as such."""
    return (np.isfinite(stats.mean) & np.isfinite(stats.var)) | (stats.count == 0)


def _refuse_nonfinite(stats):
    bad = np.flatnonzero(~_finite(stats))
    if bad.size:
        c = bad[0]
        raise FloatingPointError(f'x: expected a finite mean and variance of each channel [on_nonfinite="raise"], got mean {stats.mean[c]} '
                                 f"and variance {stats.var[c]} for channel {c}" + (f" ({bad.size} channels in all)" if bad.size > 1 else ""))


def _weak(a):
    """A weak reference; of what allows none (a list), one that is dead."""
    try:
        return weakref.ref(a)
    except TypeError:
        return lambda: None


def _held(a):
    """What was kept of a call: an array itself, or what is left behind a weak reference."""
    return a() if callable(a) else a


def _outline(a):
    """An array of a's shape and dtype in next to no memory, where a gradient needs no more than those."""
    return np.ndarray(a.shape, a.dtype, np.zeros(1, a.dtype), strides=(0,) * a.ndim)


def overwritten(out, *arrays):
    """Whether writing `out` changes one of the arrays."""
    return out is not None and any(a is not None and np.may_share_memory(a, out) for a in arrays)


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
    activation : None, "relu", "relu6", ("clip", low, high), ("leaky_relu", slope) or "hard_swish": what follows, in the same pass over memory.
    dtype : of weight, bias and the running statistics, float32 or float64.
    on_nonfinite : what a batch does whose mean or variance of some channel is NaN or infinite, while training:
        "propagate": it makes that channel's running statistics so, too;
        "skip": that channel's running statistics stay as they were; num_batches_tracked counts the batch unless it skips every channel;
        "raise": the call raises FloatingPointError, having changed nothing. Costs nothing more, unless `out` is given: then x is read
        once more beforehand, as its statistics must be known before anything is written.

    Attributes: weight, bias, running_mean, running_var: arrays of shape (C,) or None; num_batches_tracked: int64 array of shape () or None;
    weight_grad, bias_grad, residual_grad: gradients of the last `backward`, or None; training: the mode. Failing calls change
    none of them.

    From many threads at once, calls in eval mode or frozen run together; those that train, `backward` and all other methods one after the
    other. Ioffe & Szegedy 2015, algorithms 1 and 2.
    """

    _ranks = None   # the ranks of input that are accepted, and how an error calls them
    _expected = ""

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, *, bias=True, axis=1,
                 activation=None, dtype=np.float32, on_nonfinite="propagate", frozen=None):
        if isinstance(num_features, bool) or not hasattr(num_features, "__index__"):
            raise TypeError(f"num_features: expected an integer, got {num_features!r}")
        if num_features < 0:
            raise ValueError(f"num_features: expected a number of channels, got {num_features}")
        dtype = np.dtype(dtype)
        if dtype not in (np.float32, np.float64):
            raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
        self.num_features = num_features.__index__()
        self.eps = eps
        self.momentum = momentum
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.axis = axis
        self.activation = activation
        self.dtype = dtype
        self.on_nonfinite = _checked_policy(on_nonfinite)
        self.training = True
        self.weight = np.ones(self.num_features, dtype) if affine else None
        self.bias = np.zeros(self.num_features, dtype) if affine and bias else None
        self.running_mean = np.zeros(self.num_features, dtype) if track_running_stats else None
        self.running_var = np.ones(self.num_features, dtype) if track_running_stats else None
        self.num_batches_tracked = np.zeros((), np.int64) if track_running_stats else None
        self.weight_grad = None
        self.bias_grad = None
        self.residual_grad = None
        self._may_be_untrained = self.track_running_stats
        self.frozen = self._checked_frozen(frozen)
        # Of the last call: x and the residual (in eval mode, weak references to them), the statistics, or None for the running ones, and whether
        # there are gradients of weight and bias.
        self._forward = None

    def __call__(self, x, *, residual=None, out=None):
        """Normalize x, of shape (N, C, ...), by the batch's statistics (training) or the running ones (eval).

        residual : array of x's shape and dtype to add before the activation, or None.
        out : array of x's shape and dtype to write; may be x or the residual itself, at the cost of `backward`. None: a new array.
        Raises ValueError, TypeError or (on_nonfinite="raise") FloatingPointError, having changed neither `out` nor the layer.
        """
        given, given_residual = x, residual
        if type(x) is not np.ndarray:
            x = array_of(x, "x")
        if residual is not None and type(residual) is not np.ndarray:
            residual = array_of(residual, "residual")
        if self._ranks is not None and x.ndim not in self._ranks:
            raise ValueError(f"expected {self._expected} input (got {x.ndim}D input)")
        frozen = self.frozen if self.frozen is None else self._checked_frozen(self.frozen)
        if self.running_mean is None:
            return self._call_training(x, residual, out)
        if self.training and frozen is None:
            with self._lock:
                if self.training and self.frozen is None:       # still, after other threads' calls
                    return self._call_training(x, residual, out)
        if self._may_be_untrained:
            self._warn_if_untrained()
        y = batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps, axis=self.axis,
                       activation=self.activation, residual=residual, out=out)
        self._may_be_untrained = False      # only now: the warning of a call that fails is not the last one
        affine = frozen != "all" and (self.weight is not None or self.bias is not None)
        if not affine and self.activation is None:
            x = _outline(x)
            self._forward = x, None if residual is None else x, None, affine
        elif out is not None and overwritten(out, x, residual):
            self._forward = None
        elif self.training:
            self._forward = x, residual, None, affine
        else:   # weak, so that a network at inference doesn't keep its layers' inputs alive
            self._forward = _weak(given), None if residual is None else _weak(given_residual), None, affine
        return y

    @property
    def _lock(self):
        return _LOCKS[id(self) // 16 % len(_LOCKS)]

    def _call_training(self, x, residual, out):
        if self.running_mean is None:
            self._check_channels(x)
        tracked = self.training and self.running_mean is not None
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / (int(self.num_batches_tracked) + 1) if tracked else 0.0
        running = (self.running_mean, self.running_var) if tracked else (None, None)
        guarded = self.on_nonfinite != "propagate"
        if guarded and _checked_policy(self.on_nonfinite) == "raise" and out is not None:
            _refuse_nonfinite(batch_stats(x, axis=self.axis))
        y, stats = forward_training(x, *running, self.weight, self.bias, momentum, self.eps, self.axis, self.activation, residual, out,
                                    self.num_batches_tracked if tracked else None, self._accept if guarded else None)
        if tracked:
            self._may_be_untrained = False
        self._forward = None if overwritten(out, x, residual) else (x, residual, stats, True)
        return y

    def _accept(self, stats, mean, var):
        """What on_nonfinite "skip" or "raise" makes of new running statistics (or None); returns whether the batch counts."""
        if self.on_nonfinite == "raise":
            _refuse_nonfinite(stats)
        fine = _finite(stats)
        if mean is not None:
            np.copyto(mean, self.running_mean, where=~fine)
            np.copyto(var, self.running_var, where=~fine)
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
        if self.num_batches_tracked == 0 and not self.running_mean.any() and (self.running_var == 1).all():
            state = "in eval mode" if self.frozen is None else "frozen"
            warnings.warn(
                f"{type(self).__name__} {state} uses running statistics that were never updated (mean 0, variance 1), so it does not "
                "normalize: run batches in training mode first, or load trained statistics",
                stacklevel=3,
            )

    def backward(self, dy, *, out=None):
        """The gradient with respect to the input of the last call (of any thread), from that with respect to its output.

        dy : array of the shape and dtype of that input, which must not have been changed since (and, after a call in eval mode, still exist).
        out : array to write, may be dy itself; None: a new array.
        Sets weight_grad and bias_grad, shape (C,), of the parameters that there are (None after a call with frozen="all"), and residual_grad,
        of x's shape, if there was one. Raises RuntimeError where there is no call to go back through.
        """
        with self._lock:
            return self._backward(dy, out)

    def _backward(self, dy, out):
        kept_x, kept_residual, stats, affine = self._forward or (None, None, None, None)
        x, residual = _held(kept_x), _held(kept_residual)
        if x is None or residual is None and kept_residual is not None:
            raise RuntimeError("backward: expected a call of the layer before, whose input still exists and was not overwritten (out=x); "
                               "in eval mode a layer keeps no reference to its input, so keep one yourself")
        gradients = batch_norm_backward(dy, x, (self.running_mean, self.running_var) if stats is None else stats, self.weight, self.bias,
                                        self.eps, axis=self.axis, training=stats is not None, affine_grad=affine, activation=self.activation,
                                        residual=residual, out=out)
        self.weight_grad = gradients.weight if self.weight is not None else None
        self.bias_grad = gradients.bias if self.bias is not None else None
        self.residual_grad = gradients.residual
        return gradients.x

    def _checked_frozen(self, value):
        if value is not None and (not isinstance(value, str) or value not in ("statistics", "all")):
            raise ValueError(f'frozen: expected None, "statistics" or "all", got {value!r}')
        if value is not None and self.running_mean is None:
            raise ValueError(f"frozen: expected None where there are no running statistics [track_running_stats=False], got {value!r}")
        return value

    def freeze(self, affine=True):
        """Keep the running statistics as they are, and normalize by them in either mode, until unfreeze(); returns the layer.

        affine : whether weight and bias are fixed, too, and `backward` gives the gradient of the input alone (FrozenBatchNorm2d; Keras'
            `trainable = False`). Without an activation it then needs no input: none is kept alive, and `out` may be x. affine=False is
            PyTorch's `bn.eval()`, but not undone by train().
        `backward` goes by what was frozen at the call. Raises ValueError where there are no running statistics.
        """
        self.frozen = self._checked_frozen("all" if affine else "statistics")
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
            self.training = bool(mode)
        return self

    def eval(self):
        """Set the eval mode; returns the layer."""
        return self.train(False)

    def reset_running_stats(self):
        """Set the running statistics to mean 0 and variance 1, seen in no batch."""
        if self.track_running_stats:
            with self._lock:
                self.running_mean[...] = 0
                self.running_var[...] = 1
                self.num_batches_tracked[...] = 0
                self._may_be_untrained = True

    def reset_parameters(self):
        """Set the weight to ones and the bias to zeros, and reset the running statistics."""
        with self._lock:
            self.reset_running_stats()
            if self.weight is not None:
                self.weight[...] = 1
            if self.bias is not None:
                self.bias[...] = 0

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
        Returns (missing_keys, unexpected_keys). Raises ValueError that names each key that doesn't fit, having changed nothing.
        """
        state = self._state()
        missing = [name for name in state if name not in state_dict and name != "num_batches_tracked"]
        unexpected = [name for name in state_dict if name not in state]
        problems = []
        if strict and missing:
            problems.append("Missing key(s) in state_dict: " + ", ".join(f'"{name}"' for name in missing))
        if strict and unexpected:
            problems.append("Unexpected key(s) in state_dict: " + ", ".join(f'"{name}"' for name in unexpected))
        loaded = {}
        for name in [name for name in state if name in state_dict]:
            try:
                loaded[name] = array_of(state_dict[name], name)
            except TypeError as error:
                problems.append(str(error))
        for name, array in loaded.items():
            if array.shape != state[name].shape:
                problems.append(f"size mismatch for {name}: expected shape {state[name].shape}, got {array.shape}")
            elif array.dtype.kind not in "fiu":
                problems.append(f"{name}: expected an array of real numbers, got {array.dtype}")
            elif name == "running_var" and (array < 0).any():
                problems.append(f"{name}: expected non-negative values, got {array.min()}")
        if problems:
            raise ValueError(f"Error(s) in loading state_dict for {type(self).__name__}:\n\t" + "\n\t".join(problems))
        with self._lock:
            for name, array in loaded.items():
                state[name][...] = array
            if "running_mean" in loaded or "running_var" in loaded:
                self._may_be_untrained = False
        return IncompatibleKeys(missing, unexpected)

    def __getstate__(self):
        return {**self.__dict__, "_forward": None}

    def __repr__(self):
        axis = "" if self.axis == 1 else f", axis={self.axis}"
        dtype = "" if self.dtype == np.float32 else f", dtype={self.dtype.name!r}"
        policy = "" if self.on_nonfinite == "propagate" else f", on_nonfinite={self.on_nonfinite!r}"
        frozen = "" if self.frozen is None else f", frozen={self.frozen!r}"
        bias = ", bias=False" if self.affine and self.bias is None else ""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return (f"{type(self).__name__}({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
                f"track_running_stats={self.track_running_stats}{bias}{axis}{activation}{dtype}{policy}{frozen})")


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
