"""The oracle: batch normalization as the paper writes it, in NumPy's widest floating point type, and how far a result is from it."""

import numpy as np

wide = np.longdouble  # float64 or wider


def per_channel(a, x, axis):
    """A parameter of shape (C,), or a number, in the shape that broadcasts along the channel axis of x."""
    a = np.asarray(a, wide)
    return np.expand_dims(a, other_axes(x, axis)) if a.ndim else a


def other_axes(x, axis):
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def batch_stats(x, axis=1):
    x = x.astype(wide)
    mean = x.mean(other_axes(x, axis))
    return mean, ((x - per_channel(mean, x, axis)) ** 2).mean(other_axes(x, axis))


def batch_norm(x, mean, var, weight=None, bias=None, eps=1e-5, axis=1):
    mean, var = per_channel(mean, x, axis), per_channel(var, x, axis)
    weight = per_channel(1 if weight is None else weight, x, axis)
    bias = per_channel(0 if bias is None else bias, x, axis)
    return weight * (x - mean) / np.sqrt(var + eps) + bias


def batch_norm_train(x, weight=None, bias=None, eps=1e-5, axis=1):
    mean, var = batch_stats(x, axis)
    return batch_norm(x, mean, var, weight, bias, eps, axis), mean, var


def updated(running, batch, momentum):
    return (1 - wide(momentum)) * running + wide(momentum) * batch


def batch_norm_backward(dy, x, mean, var, weight=None, eps=1e-5, axis=1, training=True):
    axes = other_axes(x, axis)
    m = x.size // x.shape[axis]
    xhat = batch_norm(x, mean, var, eps=eps, axis=axis)
    scale = per_channel((1 if weight is None else weight) / np.sqrt(np.asarray(var, wide) + eps), x, axis)
    dy = dy.astype(wide)
    dbeta, dgamma = dy.sum(axes), (dy * xhat).sum(axes)
    dx = scale * (dy - per_channel(dbeta, x, axis) / m - xhat * per_channel(dgamma, x, axis) / m) if training else scale * dy
    return dx, dgamma, dbeta


CORNERS = {None: (), "relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hard_swish": (-3, 3), "sigmoid": (), "silu": ()}
SMOOTH = "hard_swish", "sigmoid", "silu"  # whose slopes are as exact as the activation's input


def corners(activation):
    """Where the gradient of an activation jumps."""
    return activation[1:] if activation is not None and activation[0] == "clip" else CORNERS[activation if isinstance(activation, str | None) else activation[0]]


def logistic(v):
    v = np.asarray(v, wide)
    e = np.exp(-abs(v))
    return np.where(v < 0, e, 1) / (1 + e)


def activate(v, activation):
    """NaN stays NaN."""
    kind, *numbers = activation if isinstance(activation, tuple) else (activation,)
    if kind == "leaky_relu":
        return np.where(v < 0, v * wide(numbers[0]), v)
    if kind == "hard_swish":
        return v * np.clip(v + 3, 0, 6) / 6
    if kind == "sigmoid":
        return logistic(v)
    if kind == "silu":
        return np.maximum(v, -1e5) * logistic(v)
    low, high = {None: (-np.inf, np.inf), "relu": (0, np.inf), "relu6": (0, 6), "clip": numbers}[kind]
    return np.where(v < low, low, np.where(v > high, high, v))


def slope(v, activation):
    """The gradient of an activation, away from its corners."""
    kind, *numbers = activation if isinstance(activation, tuple) else (activation,)
    if kind == "leaky_relu":
        return np.where(v < 0, wide(numbers[0]), 1)
    if kind == "hard_swish":
        return np.where(v < -3, 0, np.where(v > 3, 1, v / 3 + wide(0.5)))
    if kind == "sigmoid":
        return logistic(v) * logistic(-v)
    if kind == "silu":
        return logistic(v) * (1 + np.clip(v, -1e5, 1e5) * logistic(-v))
    low, high = {None: (-np.inf, np.inf), "relu": (0, np.inf), "relu6": (0, 6), "clip": numbers}[kind]
    return np.where((v < low) | (v > high), 0, wide(1))


def largest(a, axis=1):
    """The largest |a| of each channel, in a shape that broadcasts."""
    return abs(a).max(other_axes(a, axis), keepdims=True, initial=0)


def check(actual, expected, scale, ulps):
    """The error is at most `ulps` units in the last place that numbers of the size of `scale` have in actual's type."""
    errors = abs(actual - expected) / np.spacing(np.asarray(scale, actual.dtype))
    assert (errors <= ulps).all(), f"error of {errors.max():.3g} ulp, expected at most {ulps}"
