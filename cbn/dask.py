"""Statistics and normalization of Dask arrays, chunk by chunk, for data larger than memory."""

import functools
import math

import dask
import dask.array as da
import numpy as np
from dask.core import flatten
from dask.delayed import Delayed

from . import functional
from .functional import array_of
from .statistics import BatchStats

MERGED = 4      # statistics that meet in a task, along each axis; fixed, as the tree decides the last bits


def batch_stats(x, *, axis=1):
    """The statistics of each channel of a data set: those of its chunks, merged by a tree that the chunks alone decide.

    x : dask array as in `cbn.batch_stats`, chunked along any axes; chunks may be empty or of unknown size.
    Returns a Delayed, whose `compute()` gives BatchStats(count, mean, var), of the same bits with every scheduler. Its attributes and methods
        are lazy, too: `mean` and `var` go into `batch_norm` as they are, `unbiased_var` is what PyTorch tracks, `merge` joins two data sets'.
    Raises ValueError or TypeError, at once.
    """
    axis = _checked_axis(x, axis)
    others = tuple(a for a in range(x.ndim) if a != axis)
    parts = da.reduction(x, functools.partial(_of_chunk, channels=axis), _merged, axis=others, dtype=np.float64, meta=np.empty(0),
                         split_every=dict.fromkeys(others, MERGED), concatenate=False)
    return dask.delayed(_joined, pure=True, nout=len(BatchStats._fields))(list(parts.to_delayed()))


def batch_norm(x, running_mean, running_var, weight=None, bias=None, eps=1e-5, *, axis=1, activation=None, residual=None):
    """Normalize each chunk by given statistics: `cbn.batch_norm` at inference, to the bit, of the whole array.

    x : dask array as there, chunked along any axes.
    running_mean, running_var, weight, bias : shape (C,): arrays, dask arrays, or Delayed as `batch_stats(x).mean`; the latter two may be None.
    residual : None, or an array of x's shape and dtype; if a dask array, of x's chunks.
    eps, activation : as there.
    Returns y, a dask array of x's shape and chunks; of its dtype, or float32 where x holds integers.
    Raises ValueError or TypeError, at once; of what only computing shows (values, the shape of a Delayed), when it is computed.
    """
    axis = _checked_axis(x, axis)
    channels = x.shape[axis]
    if math.isnan(channels):
        raise ValueError(f"x: expected a known number of channels, got shape {x.shape} [axis={axis}]: see x.compute_chunk_sizes()")
    if residual is not None:
        residual = _like(residual, x)
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    shape = [channels if a == axis else 0 for a in range(x.ndim)]
    y = _checked(functional.batch_norm, x, shape, **{name: _stand_in(a, name, channels) for name, a in parameters.items()}, eps=eps, axis=axis,
                 activation=activation, residual=None if residual is None else np.empty_like(residual._meta, shape=shape))
    every = tuple(range(x.ndim))
    arguments = [x, every]
    for name, a in parameters.items():
        arguments += (None, None) if a is None else (_cut(a, name, x.chunks[axis]), (axis,))
    arguments += (None, None) if residual is None else (residual, every)
    return da.blockwise(_normalized, every, *arguments, eps=eps, channels=axis, activation=activation, meta=y, align_arrays=False)


def _checked_axis(x, axis):
    if not isinstance(x, da.Array):
        raise TypeError(f"x: expected a dask array, got {type(x).__name__}: see dask.array.from_array and, of an xarray, its .data")
    _checked(functional.batch_stats, x, [0] * x.ndim, axis=axis)
    return axis % x.ndim


def _checked(function, x, shape, **arguments):
    """What a function of cbn makes of an array of x's kind and dtype, and of a shape without elements: its checks are those of all chunks."""
    outline = np.empty_like(x._meta, shape=shape)
    try:
        return function(outline, **arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(str(outline.shape), str(x.shape))) from None


def _stand_in(a, name, channels):
    """What is known of a parameter before it is computed."""
    if isinstance(a, Delayed):
        return np.ones(channels)
    if not isinstance(a, da.Array):
        return a
    if any(map(math.isnan, a.shape)):
        raise ValueError(f"{name}: expected shape ({channels},), got {a.shape}: see {name}.compute_chunk_sizes()")
    return np.ones_like(a._meta, shape=a.shape)


def _cut(a, name, chunks):
    """A parameter as a dask array of shape (C,), in the chunks of x's channels."""
    channels = sum(chunks)
    if isinstance(a, Delayed):
        a = da.from_delayed(dask.delayed(_row, pure=True)(a, name, channels), (channels,), meta=np.empty(0))
    elif isinstance(a, da.Array):
        a = a[0] if a.ndim == 2 else a
    else:
        a = da.from_array(_row(a, name, channels))
    return a.rechunk((chunks,))


def _like(residual, x):
    """The residual as a dask array, having checked that its chunks are x's, as far as their sizes are known."""
    same = lambda a, b: len(a) == len(b) and all(m == n or math.isnan(m) or math.isnan(n) for m, n in zip(a, b, strict=True))
    if not isinstance(residual, da.Array):
        residual = array_of(residual, "residual")
    if not same(residual.shape, x.shape):
        raise ValueError(f"residual: expected shape {x.shape}, that of x, got {residual.shape}")
    if not isinstance(residual, da.Array):
        if any(map(math.isnan, x.shape)):
            raise ValueError(f"residual: expected a dask array, as x has chunks of unknown size, got shape {residual.shape}")
        return da.from_array(residual, x.chunks)
    differing = [a for a in range(x.ndim) if not same(residual.chunks[a], x.chunks[a])]
    if differing:
        raise ValueError(f"residual: expected the chunks of x, got others on axes {differing}: see residual.rechunk(x.chunks)")
    return residual


# What the tasks do.

def _row(a, name, channels):
    """A parameter in the shape (C,)."""
    a = array_of(a, name)
    if a.shape not in ((channels,), (1, channels)):
        raise ValueError(f"{name}: expected shape ({channels},), got {a.shape}")
    return a.reshape(channels)


def _of_chunk(x, channels, axis, keepdims, computing_meta=False):
    if computing_meta:      # Dask takes statistics for arrays, so as to reduce them
        return x
    # The order of memory, which may change when a chunk moves to another process, decides the order of sums.
    return functional.batch_stats(np.asanyarray(x, order="C"), axis=channels)


def _merged(parts, axis, keepdims):
    return functools.reduce(BatchStats.merge, flatten(parts, container=list))


def _joined(parts):
    """The statistics of all channels, from those of blocks of them."""
    counts, means, variances = zip(*parts, strict=True)
    return BatchStats(counts[0], np.concatenate(means), np.concatenate(variances))


def _normalized(x, mean, var, weight, bias, residual, *, eps, channels, activation):
    return functional.batch_norm(x, mean, var, weight, bias, eps=eps, axis=channels, activation=activation, residual=residual)
