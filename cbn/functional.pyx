"""The public functions: check the arguments, see the arrays as (outer, channels, inner), allocate, call the kernels."""

import numbers
import operator
from typing import NamedTuple

import numpy as np

cimport cython
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.float cimport DBL_MAX
from libc.math cimport INFINITY, NAN
cimport numpy as cnp

from . cimport dispatch
from .kernels.plan cimport LANES, cut_channels, fold_views, share_work
from .kernels.table cimport BACKWARD, COEFFICIENTS, FLOAT32, FLOAT64, FORWARD, FROZEN, GRADIENTS, MOMENTS, Job, View
from .memory cimport new_like
from .threads cimport threads_for

from .statistics import BatchStats

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    bint PyArray_ISNOTSWAPPED(cnp.ndarray)
    bint PyArray_ISALIGNED(cnp.ndarray)
    bint PyArray_ISWRITEABLE(cnp.ndarray)

include "checks.pxi"
include "views.pxi"


class Gradients(NamedTuple):
    """Gradients of a loss with respect to the input, the weight and the bias of a batch normalization."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


cdef int run(Job* job, int axis, cnp.ndarray x, cnp.ndarray dy, cnp.ndarray y) except -1:
    """Complete the job, whose parameters and operation are set, by arrays and plan, and run it."""
    cdef cnp.ndarray target = y
    cdef Py_ssize_t coefficients, partials
    cdef double elements, bytes
    cdef int inputs
    cdef char* memory
    if cnp.PyArray_SIZE(x) == 0:
        return conclude_empty(job, cnp.PyArray_DIM(x, axis))
    if not prepare(job, axis, x, dy, y):
        x = np.array(x, x.dtype.newbyteorder("="), order="C")
        dy = None if dy is None else np.array(dy, dy.dtype.newbyteorder("="), order="C")
        target = None if y is None else np.empty_like(x)
        prepare(job, axis, x, dy, target)
    job.dtype = FLOAT32 if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32 else FLOAT64
    elements = <double>job.outer * job.channels * job.inner
    bytes = elements * cnp.PyArray_ITEMSIZE(x)
    inputs = 1 if dy is None else 2
    share_work(job, threads_for(elements), (inputs + 1) * bytes > dispatch.stream_bytes, inputs * bytes, dispatch.core_cache)
    partials = 2 * job.chunks * job.columns * sizeof(double) if job.reduction else 0
    coefficients = COEFFICIENTS * (job.columns + LANES) * cnp.PyArray_ITEMSIZE(x)
    memory = <char*>PyMem_RawMalloc(partials + coefficients + 1)
    if memory == NULL:
        raise MemoryError
    job.partials = <double*>memory
    job.coefficients = memory + partials
    with nogil:
        dispatch.table.run(job)
    PyMem_RawFree(memory)
    if target is not y:
        y[...] = target
    return 0


cdef int conclude_empty(Job* job, Py_ssize_t channels) noexcept:
    """Of no values, the statistics are NaN and the sums 0."""
    cdef Py_ssize_t c
    for c in range(channels):
        if job.reduction == MOMENTS:
            job.mean[c] = job.var[c] = NAN
        elif job.reduction == GRADIENTS:
            job.weight_grad[c] = job.bias_grad[c] = 0
    return 0


cdef bint prepare(Job* job, int axis, cnp.ndarray x, cnp.ndarray dy, cnp.ndarray y) noexcept:
    """See the arrays as (outer, channels, inner) and cut the work; False where they must be copied first."""
    if not plain(x) or not (dy is None or plain(dy)) or not (y is None or plain(y)) or not view_together(job, axis, x, dy, y):
        return False
    cut_channels(job)
    return fold_views(job)


@cython.freelist(4)
@cython.final
cdef class Parameters:
    """Working copies, in float64, of what a call takes and returns for each channel."""
    cdef double* data
    cdef double* mean
    cdef double* var
    cdef double* weight
    cdef double* bias

    def __cinit__(self, Py_ssize_t channels):
        self.data = <double*>PyMem_RawMalloc(4 * channels * sizeof(double) + 1)
        if self.data == NULL:
            raise MemoryError
        self.mean = self.data
        self.var = self.data + channels
        self.weight = self.data + 2 * channels
        self.bias = self.data + 3 * channels

    def __dealloc__(self):
        PyMem_RawFree(self.data)


cdef int load_affine(Job* job, Parameters parameters, object weight, object bias, Py_ssize_t channels, cnp.ndarray x, int axis) except -1:
    job.weight = job.bias = NULL
    if weight is not None:
        load(weight, "weight", parameters.weight, channels, x, axis)
        job.weight = parameters.weight
    if bias is not None:
        load(bias, "bias", parameters.bias, channels, x, axis)
        job.bias = parameters.bias
    return 0


cdef int update_running(cnp.ndarray running, const double* batch, double momentum, double factor) except -1:
    """running = (1 - momentum) * running + momentum * (batch * factor), in float64, rounded once."""
    cdef Py_ssize_t c
    if not plain(running):
        native = running.astype(running.dtype.newbyteorder("="))
        update_running(native, batch, momentum, factor)
        running[...] = native
        return 0
    cdef char* at = <char*>cnp.PyArray_DATA(running)
    cdef double kept = 1 - momentum
    for c in range(cnp.PyArray_DIM(running, 0)):
        if cnp.PyArray_TYPE(running) == cnp.NPY_FLOAT32:
            (<float*>at)[0] = <float>(kept * (<float*>at)[0] + momentum * (batch[c] * factor))
        else:
            (<double*>at)[0] = kept * (<double*>at)[0] + momentum * (batch[c] * factor)
        at += cnp.PyArray_STRIDE(running, 0)
    return 0


cdef inline cnp.ndarray per_channel(Py_ssize_t channels, int typenum):
    cdef cnp.npy_intp shape = channels
    return cnp.PyArray_EMPTY(1, &shape, typenum, 0)


cdef inline Py_ssize_t values_per_channel(cnp.ndarray x, int axis) noexcept:
    cdef Py_ssize_t count = 1
    cdef int i
    for i in range(cnp.PyArray_NDIM(x)):
        if i != axis:
            count *= cnp.PyArray_DIM(x, i)
    return count


def forward_training(x, running_mean, running_var, weight, bias, momentum, eps, axis, out):
    """Training forward of functions and layers: returns (y, BatchStats); updates the running statistics unless they are None."""
    cdef cnp.ndarray x_ = as_elements(x, "x"), y, mean, var
    cdef int axis_ = channel_axis(x_, axis)
    cdef double momentum_ = checked_momentum(momentum)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_), count = values_per_channel(x_, axis_)
    cdef Job job
    cdef Parameters parameters = Parameters.__new__(Parameters, channels)
    job.eps = checked_eps(eps, True)
    check_running_pair(running_mean, running_var)
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {np.shape(x_)}")
    if running_mean is not None:
        check_running(running_mean, "running_mean", channels, x_, axis_)
        check_running(running_var, "running_var", channels, x_, axis_)
        for name, a in (("x", x_), ("weight", weight), ("bias", bias), ("running_var", running_var)):
            check_overlap(running_mean, "running_mean", a, name, False)
        for name, a in (("x", x_), ("weight", weight), ("bias", bias)):
            check_overlap(running_var, "running_var", a, name, False)
    load_affine(&job, parameters, weight, bias, channels, x_, axis_)
    y = output(out, x_)
    if out is not None:
        check_outputs(y, x_, None, weight, bias, running_mean, running_var, "running_")
    mean = per_channel(channels, cnp.NPY_FLOAT64)
    var = per_channel(channels, cnp.NPY_FLOAT64)
    job.reduction = MOMENTS
    job.apply = FORWARD
    job.mean = <double*>cnp.PyArray_DATA(mean)
    job.var = <double*>cnp.PyArray_DATA(var)
    run(&job, axis_, x_, None, y)
    if running_mean is not None and count > 0:
        update_running(running_mean, job.mean, momentum_, 1)
        update_running(running_var, job.var, momentum_, count / (count - 1.0))
    return y, BatchStats(count, mean, var)


def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *, axis=1, out=None):
    """Normalize each channel: y = weight * (x - mean) / sqrt(var + eps) + bias.

    With training=False, mean and var are running_mean and running_var. With training=True they are the batch's own (var the population
    variance), and the running statistics, unless None, are updated in place with the unbiased variance of the m values of a channel:

        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var  = (1 - momentum) * running_var  + momentum * var * m / (m - 1)

    x : float32 or float64 array of rank >= 2, shape (N, C, ...) or with the channels on another `axis`.
    running_mean, running_var : shape (C,); float32 or float64 when training. Both may be None when training.
    weight, bias : shape (C,), or None for ones and zeros (gamma and beta of the paper).
    out : array of x's shape and dtype to write; may be x itself, otherwise must not overlap an argument. None: a new array.
    Returns y, of x's shape and dtype. An empty batch leaves the running statistics as they are.
    Raises ValueError or TypeError, having written nothing, for anything else; ValueError too for one value a channel when training.

    Ioffe & Szegedy 2015, algorithms 1 and 2. The call and its wording are those of PyTorch's `functional.batch_norm`.
    """
    if training:
        return forward_training(x, running_mean, running_var, weight, bias, momentum, eps, axis, out)[0]
    cdef cnp.ndarray x_ = as_elements(x, "x"), y
    cdef int axis_ = channel_axis(x_, axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_)
    cdef Job job
    cdef Parameters parameters = Parameters.__new__(Parameters, channels)
    job.eps = checked_eps(eps, False)
    check_running_pair(running_mean, running_var)
    if running_mean is None:
        raise ValueError("running_mean must be defined in evaluation mode")
    load(running_mean, "running_mean", parameters.mean, channels, x_, axis_)
    load(running_var, "running_var", parameters.var, channels, x_, axis_)
    check_non_negative(parameters.var, channels, "running_var")
    load_affine(&job, parameters, weight, bias, channels, x_, axis_)
    y = output(out, x_)
    if out is not None:
        check_outputs(y, x_, None, weight, bias, running_mean, running_var, "running_")
    job.reduction = 0
    job.apply = FORWARD
    job.mean = parameters.mean
    job.var = parameters.var
    run(&job, axis_, x_, None, y)
    return y


def batch_norm_train(x, weight=None, bias=None, eps=1e-5, *, axis=1, out=None):
    """Normalize each channel by the batch's own statistics; return them too.

    y = weight * (x - mean) / sqrt(var + eps) + bias, with mean and population variance taken over all axes but `axis`.

    x : float32 or float64 array of rank >= 2, shape (N, C, ...) or with the channels on another `axis`; at least 2 values a channel.
    weight, bias : shape (C,), or None for ones and zeros.
    eps : > 0, added to the variance.
    out : array of x's shape and dtype to write; may be x itself, otherwise must not overlap an argument. None: a new array.
    Returns (y, BatchStats(count, mean, var)); the latter is what `batch_norm_backward` needs.
    Raises ValueError or TypeError, having written nothing.

    Ioffe & Szegedy 2015, algorithm 1.
    """
    return forward_training(x, None, None, weight, bias, 0.0, eps, axis, out)


def batch_stats(x, *, axis=1):
    """The statistics of each channel of a batch: BatchStats(count, mean, var).

    x : float32 or float64 array of rank >= 2, shape (N, C, ...) or with the channels on another `axis`.
    Returns the number of values per channel, and their mean and population variance as float64 arrays of shape (C,): NaN for an empty batch.
    The sums are of shifted values (Chan, Golub & LeVeque 1983), so a large common offset costs no accuracy.
    """
    cdef cnp.ndarray x_ = as_elements(x, "x"), mean, var
    cdef int axis_ = channel_axis(x_, axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_)
    cdef Job job
    job.reduction = MOMENTS
    job.apply = 0
    job.weight = job.bias = NULL
    job.eps = 0
    mean = per_channel(channels, cnp.NPY_FLOAT64)
    var = per_channel(channels, cnp.NPY_FLOAT64)
    job.mean = <double*>cnp.PyArray_DATA(mean)
    job.var = <double*>cnp.PyArray_DATA(var)
    run(&job, axis_, x_, None, None)
    return BatchStats(values_per_channel(x_, axis_), mean, var)


def batch_norm_backward(dy, x, stats, weight=None, bias=None, eps=1e-5, *, axis=1, training=True, out=None):
    """Gradients of a loss with respect to x, weight and bias, from dy, that with respect to y.

    With invstd = 1 / sqrt(var + eps), xhat = (x - mean) * invstd and m values a channel:

        bias' = sum(dy)            weight' = sum(dy * xhat)
        x'    = weight * invstd * (dy - bias' / m - xhat * weight' / m)      training=True: the statistics are functions of x
        x'    = weight * invstd * dy                                         training=False: they are constants (running statistics)

    dy, x : arrays of one shape and dtype, as in the forward call.
    stats : BatchStats of the forward call, or a pair (mean, var) of arrays of shape (C,).
    weight, bias, eps, axis : as in the forward call.
    out : array for x', of x's shape and dtype; may be dy or x itself, otherwise must not overlap an argument. None: a new array.
    Returns Gradients(x, weight, bias): x' of x's dtype; the others of shape (C,), in the dtype of `weight` if it is a float array, else x's.
    Raises ValueError or TypeError, having written nothing.

    Ioffe & Szegedy 2015, section 3.
    """
    cdef cnp.ndarray x_ = as_elements(x, "x"), dy_ = as_elements(dy, "dy"), dx, weight_grad, bias_grad
    cdef int axis_ = channel_axis(x_, axis)
    cdef bint train = training
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_)
    cdef Job job
    cdef Parameters parameters = Parameters.__new__(Parameters, channels)
    job.eps = checked_eps(eps, train)
    if not same_shape(dy_, x_):
        raise ValueError(f"dy: expected shape {np.shape(x_)}, that of x, got {np.shape(dy_)}")
    if cnp.PyArray_TYPE(dy_) != cnp.PyArray_TYPE(x_):
        raise TypeError(f"dy: expected dtype {x_.dtype}, that of x, got {dy_.dtype}")
    if not isinstance(stats, tuple) or len(stats) not in (2, 3):
        raise TypeError(f"stats: expected BatchStats or a pair (mean, var), got {type(stats).__name__}")
    mean = stats[len(stats) - 2]
    var = stats[len(stats) - 1]
    load(mean, "stats.mean", parameters.mean, channels, x_, axis_)
    load(var, "stats.var", parameters.var, channels, x_, axis_)
    check_non_negative(parameters.var, channels, "stats.var")
    load_affine(&job, parameters, weight, bias, channels, x_, axis_)
    dx = output(out, x_)
    if out is not None:
        check_outputs(dx, x_, dy_, weight, bias, mean, var, "stats.")
    weight_grad = per_channel(channels, cnp.NPY_FLOAT64)
    bias_grad = per_channel(channels, cnp.NPY_FLOAT64)
    job.reduction = GRADIENTS
    job.apply = BACKWARD if train else FROZEN
    job.mean = parameters.mean
    job.var = parameters.var
    job.weight_grad = <double*>cnp.PyArray_DATA(weight_grad)
    job.bias_grad = <double*>cnp.PyArray_DATA(bias_grad)
    run(&job, axis_, x_, dy_, dx)
    dtype = weight.dtype if isinstance(weight, cnp.ndarray) and weight.dtype.kind == "f" else x_.dtype
    dtype = dtype.newbyteorder("=")
    return Gradients(dx, weight_grad.astype(dtype, copy=False), bias_grad.astype(dtype, copy=False))
