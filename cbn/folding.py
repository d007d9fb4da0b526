"""Folding: a batch normalization at inference is one multiply-add per channel, which a convolution or linear layer beside it can take over."""

from typing import NamedTuple

import numpy as np

from .functional import array_of, checked_flag, checked_integer, checked_number
from .layers import BatchNorm
from .words import show, warn

DEPTHWISE = "tensorflow_depthwise"


class Folded(NamedTuple):
    """The weight and bias of a layer that took over a batch normalization.

    weight : array of the shape and dtype of the layer's weight.
    bias : array of shape (out,) and that dtype.
    change : float, the largest |scale - 1| of a channel, where scale = bn.weight / sqrt(running_var + eps) is what its weights were multiplied
        with. 0: the weights are as they were. In the hundreds: a channel has next to no variance, and what noise it has is amplified; look
        at it before rounding the weights to 8 bits.
    """

    weight: np.ndarray
    bias: np.ndarray
    change: float


def fold_conv(weight, bias, bn, *, order="torch", groups=1, transposed=False, before=False, padding=None):
    """Fold a batch normalization at inference into the convolution before it (or, with before=True, after it).

    bn after it:   weight' = weight * scale[out], bias' = (bias - running_mean) * scale + bn.bias
    bn before it:  weight' = weight * scale[in],  bias' = bias + sum(weight * shift[in]), shift = bn.bias - running_mean * scale
    where scale = bn.weight / sqrt(running_var + eps), all in float64 and rounded once.

    weight : array or nested lists, of float16, bfloat16, float32 or float64, with a kernel of 1 to 3 dimensions and its axes as `order` says:
        "torch"                 (out, in/groups, *kernel); transposed: (in, out/groups, *kernel)
        "tensorflow"            (*kernel, in/groups, out); transposed: (*kernel, out, in), without groups
        "tensorflow_depthwise"  (*kernel, in, multiplier)
    bias : array of shape (out,), or None for zeros.
    bn : BatchNorm layer with running statistics, in either mode, or a tuple (running_mean, running_var, weight, bias, eps), where weight and bias
        may be None; of as many channels as the convolution puts out (before: takes in). Its activation, if any, is left for you to apply.
    padding : needed with before=True only: how many zeros the convolution adds to its input, an integer or a sequence of them, or "valid",
        "same" or "causal". Padding by reflection or the like gives the same before and after bn: pass 0.
    Returns Folded(weight, bias, change): new arrays of weight's dtype, infinity where that overflows.
    Raises TypeError or ValueError that names the argument; ValueError with before=True where no bias does what shift does: the convolution is
    transposed or pads with zeros, and shift is not 0. Jacob et al. 2018 (CVPR), section 3.2.
    """
    weight = _checked_layer(weight, order, ("torch", "tensorflow", DEPTHWISE))
    transposed, before, groups = checked_flag(transposed, "transposed"), checked_flag(before, "before"), checked_integer(groups, "groups")
    if not 3 <= weight.ndim <= 5:
        raise ValueError(f"weight: expected 3 to 5 dimensions, of which the kernel has 1 to 3, got shape {weight.shape}")
    where = f"[weight has shape {weight.shape}, order={order!r}, groups={groups}, transposed={transposed}]"
    if groups != 1 and (order == DEPTHWISE or order == "tensorflow" and transposed):
        raise ValueError(f"groups: expected 1, as such a layer has no such argument, got {groups} {where}")
    if transposed and order == DEPTHWISE:
        raise ValueError(f"transposed: expected False, as no depthwise layer is, got {transposed} {where}")
    kernel = weight.shape[2:] if order == "torch" else weight.shape[:-2]
    return _fold(weight, bias, bn, order, groups, transposed, before, _obstacle(transposed, padding, kernel) if before else None, where)


def fold_linear(weight, bias, bn, *, order="torch", before=False):
    """Fold a batch normalization at inference into the linear layer before it (or, with before=True, after it).

    As fold_conv, for weight of shape (out, in) with order="torch", or (in, out) with order="tensorflow".
    """
    weight, before = _checked_layer(weight, order, ("torch", "tensorflow")), checked_flag(before, "before")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected 2 dimensions, got shape {weight.shape}")
    return _fold(weight, bias, bn, order, 1, False, before, None, f"[weight has shape {weight.shape}, order={order!r}]")


def _fold(weight, bias, bn, order, groups, transposed, before, obstacle, where):
    """The folding itself, in which what overflows is infinity and a warning. obstacle : why a shift before the layer cannot be folded, or None."""
    with np.errstate(all="warn"):
        return _folded(weight, bias, bn, order, groups, transposed, before, obstacle, where)


def _folded(weight, bias, bn, order, groups, transposed, before, obstacle, where):
    folded = weight.astype(np.float64, order="C", subok=False)
    w__giok = _by_group(folded, order, groups, transposed, where)
    g, i, o, *kernel = w__giok.shape
    old_bias = np.zeros(g * o) if bias is None else _vector(bias, "bias", g * o, where)
    scale, mean, bn_bias = at_inference(bn, g * i if before else g * o, where)
    if before and getattr(bn, "activation", None) is not None:
        raise ValueError(f"bn: expected a layer without an activation before another layer, got activation={bn.activation!r}")
    if before:
        shift = bn_bias - mean * scale
        if obstacle and (shift != 0).any():
            raise ValueError(obstacle)
        w__gio = w__giok.sum(tuple(range(3, w__giok.ndim)))
        new_bias = old_bias + (w__gio * shift.reshape(g, i, 1)).sum(1).reshape(g * o)
    else:
        new_bias = (old_bias - mean) * scale + bn_bias
    w__giok *= scale.reshape(g, i if before else 1, 1 if before else o, *[1] * len(kernel))
    dtype = weight.dtype.newbyteorder("=")
    return Folded(rounded(folded, dtype), rounded(new_bias, dtype), float(abs(scale - 1).max(initial=0)))


def rounded(a, dtype):
    """An array of float64 in another type, rounded once: on the way to bfloat16, in float32, of the two beside a number the odd one is taken."""
    if dtype.name == "bfloat16":
        near = a.astype(np.float32)
        bits = near.view(np.int32)
        a = np.where(near == a, bits, (bits - (abs(near) > abs(a))) | 1).view(np.float32)
    return a.astype(dtype, copy=False)


def _by_group(weight, order, groups, transposed, where):
    """A view of shape (groups, in/groups, out/groups, *kernel), whose channels, in and out, count through a group and then on to the next."""
    if order == DEPTHWISE:
        return np.moveaxis(weight, (-2, -1), (0, 1))[:, np.newaxis]
    if order == "tensorflow":       # the last two axes are PyTorch's first two, exchanged, in both kinds of convolution
        weight = np.moveaxis(weight, (-1, -2), (0, 1))
    channels = weight.shape[0]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of the number of {'input' if transposed else 'output'} channels, {channels}, "
                         f"got {groups} {where}")
    w = weight.reshape(groups, channels // groups, *weight.shape[1:])      # one axis in two is a view in any memory order
    return w if transposed else w.swapaxes(1, 2)


def at_inference(bn, channels, where):
    """scale, mean and bias, float64 arrays of shape (channels,): at inference bn is (x - mean) * scale + bias."""
    if isinstance(bn, BatchNorm):
        bn = bn._at_inference()
    if not isinstance(bn, tuple):
        raise TypeError(f"bn: expected a cbn.BatchNorm layer or a tuple (running_mean, running_var, weight, bias, eps), got {type(bn).__name__}")
    if len(bn) != 5:
        raise ValueError(f"bn: expected a tuple (running_mean, running_var, weight, bias, eps), got one of length {len(bn)}")
    mean, var, weight, bias, eps = bn
    if mean is None or var is None:
        raise ValueError("bn: expected running statistics, got None for them: such a layer normalizes by each batch, which no weight can")
    try:
        eps = float(checked_number(eps, "eps"))
    except (TypeError, ValueError) as error:
        raise type(error)(f"bn.eps: {str(error).removeprefix('eps: ')}") from None
    mean = _vector(mean, "bn.running_mean", channels, where)
    var = _vector(var, "bn.running_var", channels, where)
    weight = np.ones(channels) if weight is None else _vector(weight, "bn.weight", channels, where)
    bias = np.zeros(channels) if bias is None else _vector(bias, "bn.bias", channels, where)
    for bad, expected in ((var < 0) & ~(var + eps > 0), "non-negative values"), (var + eps == 0, "running_var + eps > 0"):
        if bad.any():
            c = int(np.flatnonzero(bad)[0])
            raise ValueError(f"bn.running_var: expected {expected}, got {var[c]} for channel {c} [eps={eps}]")
    if (var < 0).any():
        c = int(np.flatnonzero(var < 0)[0])
        warn(f"bn.running_var: expected non-negative values, got {var[c]} for channel {c}; computing with var + eps, which is positive")
    return weight / np.sqrt(var + eps), mean, bias


def _obstacle(transposed, padding, kernel):
    """Why a convolution, with a bn before it that shifts its input, has no bias that does the same; None where it has."""
    if transposed:
        return ("before: expected a bn whose shift, bias - running_mean * scale, is 0 in all channels, as each output of a transposed convolution "
                "is the sum over another part of the kernel, for which one bias per channel cannot make up: leave this bn a layer of its own")
    if padding is None:
        raise TypeError("padding: expected that of the convolution, which decides whether a bn before it can be folded, got None")
    if isinstance(padding, str):
        if padding not in ("valid", "same", "causal"):
            raise ValueError(f"padding: expected 'valid', 'same', 'causal' or numbers of zeros, got {show(padding)}")
        padded = padding != "valid" and max(kernel) > 1
    else:
        try:
            zeros = array_of(padding, "padding")
        except TypeError as error:
            ragged = isinstance(error.__cause__, ValueError)          # sequences of different lengths
            raise (ValueError if ragged else TypeError)(f"padding: expected an integer or a sequence of them, got {show(padding)}") from None
        if zeros.dtype.kind not in "iu":
            raise TypeError(f"padding: expected an integer or a sequence of them, got {show(padding)}")
        if (zeros < 0).any():
            raise ValueError(f"padding: expected numbers of zeros >= 0, got {show(padding)}")
        padded = zeros.any()
    if padded:
        return (f"before: expected a bn whose shift, bias - running_mean * scale, is 0 in all channels, or a convolution without padding, got "
                f"padding={padding!r}: its zeros, which bn does not see, would be shifted too. Pad the convolution's input yourself, channel "
                "by channel with running_mean - bias / scale, which bn makes 0 of, and fold with padding=0")
    return None


def _checked_layer(weight, order, orders):
    weight = array_of(weight, "weight")
    if weight.dtype.type not in (np.float16, np.float32, np.float64) and weight.dtype.name != "bfloat16":
        raise TypeError(f"weight: expected an array of float16, bfloat16, float32 or float64, got {weight.dtype}")
    if not isinstance(order, str) or order not in orders:
        raise ValueError(f"order: expected {' or '.join(map(repr, orders))}, got {show(order)}")
    return weight


def _vector(a, name, channels, where):
    """A parameter of shape (channels,) or (1, channels) as a float64 array of shape (channels,)."""
    a = array_of(a, name)
    if a.dtype.kind not in "fiu" and a.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected an array of real numbers, got {a.dtype}")
    if a.shape not in ((channels,), (1, channels)):
        raise ValueError(f"{name}: expected shape ({channels},), got {a.shape} {where}")
    return a.astype(np.float64, subok=False).reshape(channels)
