"""The public functions: check the arguments, see the arrays as (outer, channels, inner), allocate, call the kernels."""

import numbers
import operator
from typing import NamedTuple

import numpy as np

from libc.string cimport memcpy, memset
from libc.float cimport DBL_MAX
from libc.math cimport INFINITY
cimport numpy as cnp

from .capi cimport CBN_CLIP, CBN_HARD_SWISH, CBN_LEAKY_RELU, CBN_NONE, CBN_RELU, CBN_RELU6
from .kernels.plan cimport cut_channels, fold_views
from .kernels.table cimport (ARRAYS, BACKWARD, BFLOAT16, FLOAT16, FLOAT32, FLOAT64, FORWARD, FROZEN, GRADIENTS, INT8, INT16, MAX_AXES, MOMENTS, OF_DY,
                             OF_RESIDUAL, OF_RESIDUAL_GRAD, OF_X, OF_Y, PIECEWISE, UINT8, UINT16, Job, Place, Places, Vector, View)
from .memory cimport new_like
from .native cimport any_negative, conclude_empty, execute, set_activation, worth_threads
from .threads cimport limit

from .statistics import BatchStats

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    bint PyArray_ISNOTSWAPPED(cnp.ndarray)
    bint PyArray_ISALIGNED(cnp.ndarray)
    bint PyArray_ISWRITEABLE(cnp.ndarray)
    int NPY_USERDEF

include "checks.pxi"
include "views.pxi"


class _Gradients(NamedTuple):
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


class Gradients(_Gradients):
    """Gradients of a loss with respect to the input, the weight and the bias of a batch normalization: (x, weight, bias).

    residual : attribute, the gradient with respect to the residual, or None where there was none.
    """

    residual = None


cdef object new_tuple = tuple.__new__       # of a NamedTuple, in a third of the time of its own one


def array_of(a, name):
    """`a` as a plain NumPy array of the same memory, where NumPy can see that: for layers, which need its shape."""
    return as_array(a, name)


def elements_of(a, name):
    """As array_of, of a type that there are loops for."""
    return as_elements(a, name)


def new_output(shape, dtype, out, read, name):
    """`out`, having checked that it can be written and doesn't overlap the array `read`, or a new array."""
    like = np.broadcast_to(np.float32(0), shape)
    if out is None:
        return new_like(like, dtype)
    check_written(out, "out", like)
    if out.dtype != dtype:
        raise TypeError(f"out: expected dtype {dtype}, got {out.dtype}")
    check_overlap(out, "out", read, name, False)
    return out


def normalize_into(y, x, mean, var):
    """y = (x - mean) / sqrt(var), of arrays of shape (N, C, H, W), any types but float64, and float64 ones of shape (C,); all checked."""
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.apply = FORWARD
    see(&job.mean, mean)
    see(&job.var, var)
    run(&job, 1, x, None, None, y, None)


cdef int run(Job* job, int axis, cnp.ndarray x, cnp.ndarray dy, cnp.ndarray residual, cnp.ndarray y, cnp.ndarray residual_grad) except -1:
    """Complete the job, whose parameters and operation are set, by arrays and plan, and run it."""
    cdef Places places
    cdef int budget
    cdef bint done
    if cnp.PyArray_SIZE(x) == 0:
        conclude_empty(job, cnp.PyArray_DIM(x, axis))
        return 0
    job.dtype = FLOAT64 if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64 else FLOAT32
    if not prepare(job, axis, x, dy, y) or not alike(residual, x) or not alike(residual_grad, y):
        place_arrays(job, &places, axis, x, dy, residual, y, residual_grad)
    if residual is not None:
        job.with_residual = True
        job.residual = <char*>cnp.PyArray_DATA(residual) - <char*>cnp.PyArray_DATA(x)
    if residual_grad is not None:
        job.with_residual_grad = True
        job.residual_grad = <char*>cnp.PyArray_DATA(residual_grad) - <char*>cnp.PyArray_DATA(y)
    job.bytes_read = bytes_of(x) + bytes_of(dy) + bytes_of(residual)
    job.bytes_written = bytes_of(y) + bytes_of(residual_grad)
    budget = limit() if worth_threads(job) else 1
    with nogil:
        done = execute(job, budget)
    if not done:
        raise MemoryError
    return 0


cdef inline int bytes_of(cnp.ndarray a) noexcept:
    """Of an element."""
    return 0 if a is None else <int>cnp.PyArray_ITEMSIZE(a)


cdef bint prepare(Job* job, int axis, cnp.ndarray x, cnp.ndarray dy, cnp.ndarray y) noexcept:
    """See the arrays as (outer, channels, inner) and cut the work; False where they aren't used as they are."""
    if not plain(x, job.dtype) or not (dy is None or plain(dy, job.dtype)) or not (y is None or plain(y, job.dtype)) \
            or not view_together(job, axis, x, dy, y, NULL):
        return False
    cut_channels(job)
    return fold_views(job)


cdef inline void see(Vector* vector, cnp.ndarray a) noexcept:
    """Let the kernels use an array of shape (channels,), plain float32 or float64."""
    vector.data = cnp.PyArray_DATA(a)
    vector.stride = cnp.PyArray_STRIDE(a, 0) // cnp.PyArray_ITEMSIZE(a)
    vector.dtype = FLOAT32 if cnp.PyArray_TYPE(a) == cnp.NPY_FLOAT32 else FLOAT64


cdef inline cnp.ndarray result(Vector* vector, Py_ssize_t channels, int typenum):
    """A new array for the kernels to write, of shape (channels,)."""
    cdef cnp.npy_intp shape = channels
    cdef cnp.ndarray a = cnp.PyArray_EMPTY(1, &shape, typenum, 0)
    see(vector, a)
    return a


cdef inline cnp.ndarray updated(Vector* vector, cnp.ndarray a, bint copy):
    """What the kernels update in the place of `a`: itself, or a copy in native byte order."""
    native = a if usable(a) and not copy else a.astype(a.dtype.newbyteorder("="))
    see(vector, native)
    return native


cdef inline Py_ssize_t values_per_channel(cnp.ndarray x, int axis) noexcept:
    cdef Py_ssize_t count = 1
    cdef int i
    for i in range(cnp.PyArray_NDIM(x)):
        if i != axis:
            count *= cnp.PyArray_DIM(x, i)
    return count


def forward_training(x, running_mean, running_var, weight, bias, momentum, eps, axis, activation, residual, out,
                     cnp.ndarray batches=None, accept=None):
    """Training forward of functions and layers: returns (y, BatchStats); updates the running statistics unless they are None.

    batches : the number of batches so far, to be counted up, or None.
    accept : None, or called with the statistics and the new running ones, to change these, raise, or return whether the batch counts.
    """
    cdef cnp.ndarray x_ = as_elements(x, "x"), y, mean, var, new_mean = None, new_var = None, counted = None
    cdef int axis_ = channel_axis(x_, axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_), count = values_per_channel(x_, axis_)
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.momentum = checked_momentum(momentum)
    job.eps = checked_eps(eps, True)
    check_running_pair(running_mean, running_var)
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {np.shape(x_)}")
    if running_mean is not None:
        check_running(running_mean, "running_mean", channels, x_, axis_)
        check_running(running_var, "running_var", channels, x_, axis_)
        for name, a in (("x", x_), ("weight", weight), ("bias", bias), ("residual", residual), ("running_var", running_var)):
            check_overlap(running_mean, "running_mean", a, name, False)
        for name, a in (("x", x_), ("weight", weight), ("bias", bias), ("residual", residual)):
            check_overlap(running_var, "running_var", a, name, False)
    weight_ = parameter(&job.weight, weight, "weight", channels, x_, axis_)
    bias_ = parameter(&job.bias, bias, "bias", channels, x_, axis_)
    residual_ = addend(residual, x_)
    set_fusion(&job, activation, residual_, x_, False)
    y = output(out, x_)
    if out is not None:
        check_outputs(y, x_, None, residual_, weight, bias, running_mean, running_var, "running_")
    job.reduction = MOMENTS
    job.apply = FORWARD
    mean = result(&job.mean, channels, cnp.NPY_FLOAT64)
    var = result(&job.var, channels, cnp.NPY_FLOAT64)
    if running_mean is not None:
        new_mean = updated(&job.running_mean, running_mean, accept is not None)
        new_var = updated(&job.running_var, running_var, accept is not None)
    if batches is not None:
        if not PyArray_ISWRITEABLE(batches):
            raise ValueError("num_batches_tracked: expected a writeable array, which training updates in place, got a read-only one")
        counted = batches.copy()
        counted += 1
    results = y, new_tuple(BatchStats, (count, mean, var))
    # From the first change of the running statistics to the last nothing fails, nor does Python code run, where a signal's handler could raise.
    run(&job, axis_, x_, None, residual_, y, None)
    counts = accept is None or accept(results[1], new_mean, new_var)
    if new_mean is not running_mean:
        cnp.PyArray_CopyInto(running_mean, new_mean)
    if new_var is not running_var:
        cnp.PyArray_CopyInto(running_var, new_var)
    if batches is not None and counts:
        memcpy(cnp.PyArray_DATA(batches), cnp.PyArray_DATA(counted), cnp.PyArray_NBYTES(batches))
    return results


def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *, axis=1, activation=None,
               residual=None, out=None):
    """Normalize each channel: y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual).

    With training=False, mean and var are running_mean and running_var. With training=True they are the batch's own (var the population
    variance), and the running statistics, unless None, are updated in place with the unbiased variance of the m values of a channel:

        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var  = (1 - momentum) * running_var  + momentum * var * m / (m - 1)

    x : array of floats or small integers, rank >= 2, shape (N, C, ...) or with the channels on another `axis`.
    running_mean, running_var : shape (C,); float32 or float64 when training. Both may be None when training.
    weight, bias : shape (C,), or None for ones and zeros (gamma and beta of the paper).
    activation : None, "relu", "relu6", ("clip", low, high), ("leaky_relu", slope) or "hard_swish"; of the same bits as if applied to y.
    residual : array of x's shape and dtype to add before the activation, or None; `out` may be it.
    out : array of x's shape and dtype to write; may be x itself, otherwise must not overlap an argument. None: a new array.
    Returns y, of x's shape and dtype. An empty batch leaves the running statistics as they are.
    Raises ValueError or TypeError, having written nothing, for anything else; ValueError too for one value a channel when training.

    Ioffe & Szegedy 2015, algorithms 1 and 2. The call and its wording are those of PyTorch's `functional.batch_norm`.
    """
    if training:
        return forward_training(x, running_mean, running_var, weight, bias, momentum, eps, axis, activation, residual, out)[0]
    cdef cnp.ndarray x_ = as_elements(x, "x"), y
    cdef int axis_ = channel_axis(x_, axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_)
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.eps = checked_eps(eps, False)
    check_running_pair(running_mean, running_var)
    if running_mean is None:
        raise ValueError("running_mean must be defined in evaluation mode")
    mean = parameter(&job.mean, running_mean, "running_mean", channels, x_, axis_)
    var = parameter(&job.var, running_var, "running_var", channels, x_, axis_)
    check_non_negative(&job.var, channels, "running_var")
    weight_ = parameter(&job.weight, weight, "weight", channels, x_, axis_)
    bias_ = parameter(&job.bias, bias, "bias", channels, x_, axis_)
    residual_ = addend(residual, x_)
    set_fusion(&job, activation, residual_, x_, False)
    y = output(out, x_)
    if out is not None:
        check_outputs(y, x_, None, residual_, weight, bias, running_mean, running_var, "running_")
    job.apply = FORWARD
    run(&job, axis_, x_, None, residual_, y, None)
    return y


def batch_norm_train(x, weight=None, bias=None, eps=1e-5, *, axis=1, activation=None, residual=None, out=None):
    """Normalize each channel by the batch's own statistics; return them too.

    y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual), with mean and population variance over all axes but `axis`.

    x : array of floats or small integers, rank >= 2, shape (N, C, ...) or with the channels on another `axis`; at least 2 values a channel.
    weight, bias : shape (C,), or None for ones and zeros.
    eps : > 0, added to the variance.
    activation, residual : as in `batch_norm`.
    out : array of x's shape and dtype to write; may be x itself, otherwise must not overlap an argument. None: a new array.
    Returns (y, BatchStats(count, mean, var)); the latter is what `batch_norm_backward` needs.
    Raises ValueError or TypeError, having written nothing.

    Ioffe & Szegedy 2015, algorithm 1.
    """
    return forward_training(x, None, None, weight, bias, 0.0, eps, axis, activation, residual, out)


def batch_stats(x, *, axis=1):
    """The statistics of each channel of a batch: BatchStats(count, mean, var).

    x : array of floats or small integers, rank >= 2, shape (N, C, ...) or with the channels on another `axis`.
    Returns the number of values per channel, and their mean and population variance as float64 arrays of shape (C,): NaN for an empty batch.
    The sums are of shifted values (Chan, Golub & LeVeque 1983), so a large common offset costs no accuracy.
    """
    cdef cnp.ndarray x_ = as_elements(x, "x"), mean, var
    cdef int axis_ = channel_axis(x_, axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_)
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.reduction = MOMENTS
    mean = result(&job.mean, channels, cnp.NPY_FLOAT64)
    var = result(&job.var, channels, cnp.NPY_FLOAT64)
    run(&job, axis_, x_, None, None, None, None)
    return new_tuple(BatchStats, (values_per_channel(x_, axis_), mean, var))


def batch_norm_backward(dy, x, stats, weight=None, bias=None, eps=1e-5, *, axis=1, training=True, affine_grad=True, activation=None,
                        residual=None, out=None):
    """Gradients of a loss with respect to x, weight and bias, from dy, that with respect to y.

    With invstd = 1 / sqrt(var + eps), xhat = (x - mean) * invstd and m values a channel:

        bias' = sum(dy)            weight' = sum(dy * xhat)
        x'    = weight * invstd * (dy - bias' / m - xhat * weight' / m)      training=True: the statistics are functions of x
        x'    = weight * invstd * dy                                         training=False: they are constants (running statistics)

    dy, x : arrays of one shape and dtype, as in the forward call.
    stats : BatchStats of the forward call, or a pair (mean, var) of arrays of shape (C,).
    weight, bias, eps, axis, activation, residual : as in the forward call. dy is first taken back through the activation, whose input is computed
        anew; at its corners the gradients are PyTorch's.
    affine_grad : whether weight' and bias' are wanted. If not, with training=False and no activation, of x only shape and dtype matter.
    out : array for x', of x's shape and dtype; may be dy or x itself, otherwise must not overlap an argument. None: a new array.
    Returns Gradients(x, weight, bias): x' of x's dtype; those of weight and bias of shape (C,), in the dtype of `weight` if it is a float array,
        else x's, or None without affine_grad. Its attribute `residual` is that of the residual, if there is one: a new array, or without an activation dy itself.
    Raises ValueError or TypeError, having written nothing.

    Ioffe & Szegedy 2015, section 3.
    """
    cdef cnp.ndarray x_ = as_elements(x, "x"), dy_ = as_elements(dy, "dy"), dx, weight_grad, bias_grad, new_grad = None
    cdef int axis_ = channel_axis(x_, axis)
    cdef bint train = training, affine = affine_grad, scaled
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_)
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.eps = checked_eps(eps, train)
    if not same_shape(dy_, x_):
        raise ValueError(f"dy: expected shape {np.shape(x_)}, that of x, got {np.shape(dy_)}")
    check_type(dy_, "dy", x_)
    if not isinstance(stats, tuple) or len(stats) not in (2, 3):
        raise TypeError(f"stats: expected BatchStats or a pair (mean, var), got {type(stats).__name__}")
    mean = stats[len(stats) - 2]
    var = stats[len(stats) - 1]
    mean_ = parameter(&job.mean, mean, "stats.mean", channels, x_, axis_)
    var_ = parameter(&job.var, var, "stats.var", channels, x_, axis_)
    check_non_negative(&job.var, channels, "stats.var")
    weight_ = parameter(&job.weight, weight, "weight", channels, x_, axis_)
    bias_ = parameter(&job.bias, bias, "bias", channels, x_, axis_)
    residual_ = addend(residual, x_)
    set_fusion(&job, activation, residual_, x_, True)
    scaled = not (train or affine or job.fusion)
    dx = output(out, dy_ if scaled else x_)
    if out is not None:
        check_outputs(dx, x_, dy_, residual_, weight, bias, mean, var, "stats.")
    if residual_ is None:
        residual_grad = None
    elif job.fusion:
        residual_grad = new_grad = new_like(dx, None)
    else:
        residual_grad = dy_.copy() if bounds_overlap(dx, dy_) else dy_
        residual_ = None                # without an activation, nothing depends on it
    if scaled:                          # what inference makes of dy, with a mean and bias of 0
        job.mean.data = job.bias.data = NULL
        job.apply = FORWARD
        run(&job, axis_, dy_, None, None, dx, None)
        gradients = new_tuple(Gradients, (dx, None, None))
        gradients.residual = residual_grad
        return gradients
    # float32 and float64 are written by the kernels, anything else is converted afterwards.
    kernel_type, grad_dtype = cnp.NPY_FLOAT64 if dtype_of(x_) == FLOAT64 else cnp.NPY_FLOAT32, None
    if isinstance(weight, cnp.ndarray) and dtype_of(weight) == FLOAT32:
        kernel_type = cnp.NPY_FLOAT32
    elif isinstance(weight, cnp.ndarray) and (weight.dtype.kind == "f" or is_bfloat16(weight)):
        kernel_type = cnp.NPY_FLOAT64
        if dtype_of(weight) != FLOAT64:
            grad_dtype = weight.dtype.newbyteorder("=")
    job.reduction = GRADIENTS
    job.apply = BACKWARD if train else FROZEN
    if train or affine:
        weight_grad = result(&job.weight_grad, channels, kernel_type)
        bias_grad = result(&job.bias_grad, channels, kernel_type)
    run(&job, axis_, x_, dy_, residual_, dx, new_grad)
    if affine and grad_dtype is not None:
        weight_grad, bias_grad = weight_grad.astype(grad_dtype), bias_grad.astype(grad_dtype)
    gradients = new_tuple(Gradients, (dx, weight_grad, bias_grad) if affine else (dx, None, None))
    if residual_grad is not None:
        gradients.residual = residual_grad
    return gradients
