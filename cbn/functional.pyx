"""The public functions: check the arguments, see the arrays as (outer, channels, inner), allocate, call the kernels."""

import numbers
import operator
import sys
import warnings
from typing import NamedTuple

import numpy as np

from libc.string cimport memcpy, memset
from libc.float cimport DBL_MAX, FLT_MAX
from libc.math cimport INFINITY
cimport numpy as cnp

from .capi cimport CBN_CLIP, CBN_HARD_SWISH, CBN_LEAKY_RELU, CBN_NONE, CBN_RELU, CBN_RELU6, CBN_SIGMOID, CBN_SILU
from .kernels.job cimport (ARRAYS, BACKWARD, BFLOAT16, FLOAT16, FLOAT32, FLOAT64, FORWARD, FROZEN, GRADIENTS, INT8, INT16, MAX_AXES, MOMENTS, OF_DY,
                             OF_RESIDUAL, OF_RESIDUAL_GRAD, OF_X, OF_Y, UINT8, UINT16, Job, Place, Places, Vector, View)
from .kernels.order cimport cut_channels, fold_views
from .kernels.tuning cimport share_work
from . cimport dispatch
from .memory cimport copy_of, new_like
from .native cimport any_negative, conclude_empty, execute, set_activation, worth_threads
from .threads cimport limit

from .statistics import BatchStats, GradientSums
from .words import show, warn

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

    def __new__(cls, x, weight, bias, residual=None):
        gradients = super().__new__(cls, x, weight, bias)
        gradients.residual = residual
        return gradients

    def _replace(self, **changes):
        return type(self)(**(self._asdict() | changes))

    def _asdict(self):
        return super()._asdict() | {"residual": self.residual}


cdef object new_tuple = tuple.__new__       # of a NamedTuple, in a third of the time of its own one


def array_of(a, name):
    """`a` as a plain NumPy array of the same memory, where NumPy can see that: for layers, which need its shape."""
    return as_array(a, name)


def elements_of(a, name):
    """As array_of, of a type that there are loops for."""
    return as_elements(a, name)


def overlap(a, b):
    """Whether two arrays share elements."""
    return share_elements(a, b)


def checked_flag(value, name):
    """`value` as a bool, if it is one or NumPy's."""
    return flag(value, name)


def checked_number(value, name):
    """eps or momentum, as a layer keeps it: in its own type where Python prints that as it was given, or as a float."""
    number = checked_eps(value, False) if name == "eps" else checked_momentum(value)
    return value if type(value) in (int, float) else number


def checked_real(value, name):
    """`value` as a float, if it is a real number or an array of shape () of one."""
    return real_number(value, name)


def checked_integer(value, name):
    """`value` as an int, if it can stand for an index."""
    return integer(value, name)


def checked_activation(activation):
    """`activation`, if it is one."""
    cdef Job job
    memset(&job, 0, sizeof(job))
    set_fusion(&job, activation, None, np.empty(1, np.float32), False)
    return activation


def check_writeable(cnp.ndarray a, name):
    """That an array can be written, element by element."""
    if not PyArray_ISWRITEABLE(a):
        raise ValueError(f"{name}: expected a writeable array, got a read-only one")
    check_own_places(a, name)


def store(list pairs):
    """Write, for each (to, value) of arrays of one shape and type, without memory in common, value to `to`: all or, by a signal's handler, none."""
    for to, value in pairs:
        cnp.PyArray_CopyInto(to, value)


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


def plan_of(shape, dtype=np.float32, axis=1, threads=1, operation="training"):
    """How the kernels would cut a call on C-contiguous arrays of this shape: for tests, which find the borders by it, and for tuning.

    operation : "inference", "training" or "backward". Returns a dict. What fixes bits (kernels/order.pxd): the layout, "rows" or "columns"; how many rows
    of how many columns, a channel having `copies` of these; chunks, of so many rows and inner elements. What fixes only speed (kernels/tuning.pxd):
    columns to a group and to a window, pieces of a run, whether threads take groups from statistics to results, and whether stores bypass the caches.
    """
    cdef Job job
    cdef cnp.ndarray like = np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, contiguous_strides(tuple(shape), np.dtype(dtype).itemsize))
    cdef double elements = float(np.prod(shape))
    cdef int arrays_read = 2 if operation == "backward" else 1
    memset(&job, 0, sizeof(job))
    job.dtype = FLOAT64 if dtype_of(like) == FLOAT64 else FLOAT32
    job.reduction = {"inference": 0, "training": MOMENTS, "backward": GRADIENTS}[operation]
    view_together(&job, channel_axis(like, axis), like, None, None, NULL)
    cut_channels(&job)
    share_work(&job, threads, elements * like.itemsize * (arrays_read + 1) > dispatch.stream_bytes, elements * like.itemsize * arrays_read, dispatch.core_cache)
    return {
        "layout": "columns" if job.by_columns else "rows", "rows": job.rows, "columns": job.columns, "length": job.length, "copies": job.copies,
        "fold": job.fold, "tail": job.tail, "chunks": job.chunks, "chunk_rows": job.chunk_rows, "chunk_length": job.chunk_length,
        "group": job.group, "window": job.window, "pieces": job.pieces, "piece": job.piece, "by_channel": bool(job.by_channel),
        "stream": bool(job.stream), "far": bool(job.far), "beyond": bool(job.beyond),
    }  # fmt: skip


cdef int run(Job* job, int axis, cnp.ndarray x, cnp.ndarray dy, cnp.ndarray residual, cnp.ndarray y, cnp.ndarray residual_grad) except -1:
    """Complete the job, whose parameters and operation are set, by arrays and plan, and run it."""
    cdef Places places
    cdef int budget
    cdef bint done
    if cnp.PyArray_SIZE(x) == 0:
        conclude_empty(job, cnp.PyArray_DIM(x, axis))
        return 0
    job.dtype = FLOAT64 if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64 else FLOAT32
    job.stored = stored_as(x)
    if not prepare(job, axis, x, dy, y) or not alike(residual, x) or not alike(residual_grad, y):
        job.stored = job.dtype
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
    if not plain(x, job.stored) or not (dy is None or plain(dy, job.stored)) or not (y is None or plain(y, job.stored)) \
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


cdef inline cnp.ndarray running_copy(Vector* vector, cnp.ndarray a):
    """What the kernels update before it is stored: a copy in native byte order."""
    cdef cnp.ndarray copy = result(vector, cnp.PyArray_DIM(a, 0), cnp.PyArray_TYPE(a))
    copy_vector(copy, a)
    return copy


cdef inline void copy_vector(cnp.ndarray to, cnp.ndarray a):
    """Between arrays of one shape and type, but for the byte order."""
    if cnp.PyArray_IS_C_CONTIGUOUS(to) and cnp.PyArray_IS_C_CONTIGUOUS(a) and PyArray_ISNOTSWAPPED(to) and PyArray_ISNOTSWAPPED(a):
        memcpy(cnp.PyArray_DATA(to), cnp.PyArray_DATA(a), cnp.PyArray_NBYTES(a))
    else:
        cnp.PyArray_CopyInto(to, a)


cdef bint raised_warnings():
    """Whether a warning may be an error."""
    for entry in warnings.filters:
        if entry[0] == "error":
            return True
    return False


cdef object judge(stats, cnp.ndarray running_var, cnp.ndarray new_mean, cnp.ndarray new_var, accept):
    """Whether a batch counts; a warning where a finite variance leaves the range of the type that it is stored in."""
    cdef Py_ssize_t c
    cdef float* new
    cdef double* batch
    if accept is not None:
        return accept(stats, new_mean, new_var)
    if new_var is not None and cnp.PyArray_TYPE(new_var) == cnp.NPY_FLOAT32:
        new, batch = <float*>cnp.PyArray_DATA(new_var), <double*>cnp.PyArray_DATA(<cnp.ndarray>stats[2])
        for c in range(cnp.PyArray_DIM(new_var, 0)):
            if new[c] > FLT_MAX and batch[c] <= DBL_MAX and running_var[c] <= FLT_MAX:
                warn(f"running_var: expected variances within the range of float32, got {batch[c]} for channel {c}, which is stored as infinity: "
                     "keep running statistics in float64 [stats_dtype of a layer]")
                break
    return True


cdef inline Py_ssize_t values_per_channel(cnp.ndarray x, int axis) noexcept:
    cdef Py_ssize_t count = 1
    cdef int i
    for i in range(cnp.PyArray_NDIM(x)):
        if i != axis:
            count *= cnp.PyArray_DIM(x, i)
    return count


cdef object merged_stats(stats, cnp.ndarray x, int axis, double eps):
    """What `merge` returned, checked, with contiguous float64 arrays."""
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x, axis)
    cdef Vector vector
    count = count_of_all(stats, x, axis)
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got one in all parts of the batch {where(x, axis)}")
    mean, var = (np.ascontiguousarray(needed(&vector, a, name, channels, x, axis), np.float64)
                 for a, name in ((stats.mean, "stats.mean"), (stats.var, "stats.var")))
    see(&vector, var)
    check_variance(&vector, channels, "stats.var", eps)
    return new_tuple(BatchStats, (count, mean, var))


cdef int update_running(cnp.ndarray running, cnp.ndarray batch, double momentum) except -1:
    """As the kernels do: in float64, rounded once."""
    with np.errstate(all="ignore"):
        running[:] = (1 - momentum) * running.astype(np.float64) + momentum * batch
    return 0


def forward_training(x, running_mean, running_var, weight, bias, momentum, eps, axis, activation, residual, out,
                     cnp.ndarray batches=None, accept=None, bint foresee=False, unbiased=True, merge=None):
    """Training forward of functions and layers: returns (y, BatchStats); updates the running statistics unless they are None.

    batches : the number of batches so far, to be counted up, or None.
    accept : None, or called with the statistics and the new running ones, to change these, raise, or return whether the batch counts.
    foresee : whether accept may raise, so that it must be asked before `out` is written, at the cost of reading x once more.
    unbiased : as in batch_norm.
    merge : None, or called with the statistics of x, when all arguments have been checked, to return those of the batch of which x is a part.
    """
    cdef cnp.ndarray x_ = as_elements(x, "x"), y, mean, var, new_mean = None, new_var = None, counted = None
    cdef int axis_ = channel_axis(x_, axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_), count = values_per_channel(x_, axis_)
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.momentum = checked_momentum(momentum)
    job.unbiased = flag(unbiased, "unbiased")
    job.eps = checked_eps(eps, True, x_)
    check_running_pair(running_mean, running_var)
    if count == 1 and merge is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {np.shape(x_)}")
    if running_mean is not None:
        running_mean = check_running(running_mean, "running_mean", channels, x_, axis_)
        running_var = check_running(running_var, "running_var", channels, x_, axis_)
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
        new_mean = running_copy(&job.running_mean, running_mean)
        new_var = running_copy(&job.running_var, running_var)
    if batches is not None:
        if not PyArray_ISWRITEABLE(batches):
            raise ValueError("num_batches_tracked: expected a writeable array, which training updates in place, got a read-only one")
        counted = batches.copy()
        counted += 1
    stats = new_tuple(BatchStats, (count, mean, var))
    if merge is not None:
        job.running_mean.data = job.running_var.data = NULL
        job.apply = 0
        run(&job, axis_, x_, None, None, None, None)
        stats = merged_stats(merge(stats), x_, axis_, job.eps)
        see(&job.mean, stats.mean)
        see(&job.var, stats.var)
        if running_mean is not None and stats.count > 0:
            update_running(new_mean, stats.mean, job.momentum)
            update_running(new_var, stats.unbiased_var if job.unbiased else stats.var, job.momentum)
        counts = judge(stats, running_var, new_mean, new_var, accept)
        job.reduction = 0
        job.apply = FORWARD
        run(&job, axis_, x_, None, residual_, y, None)
    else:
        if out is not None and (foresee or running_mean is not None and raised_warnings()):
            job.apply = 0
            run(&job, axis_, x_, None, None, None, None)
            judge(stats, running_var, new_mean, new_var, accept)
            job.apply = FORWARD
            if running_mean is not None:
                copy_vector(new_mean, running_mean)
                copy_vector(new_var, running_var)
        run(&job, axis_, x_, None, residual_, y, None)
        counts = judge(stats, running_var, new_mean, new_var, accept)
    results = y, stats
    # From here on nothing fails, nor does Python code run, where a signal's handler could raise.
    if running_mean is not None:
        copy_vector(running_mean, new_mean)
        copy_vector(running_var, new_var)
    if batches is not None and counts:
        cnp.PyArray_CopyInto(batches, counted)
    return results


def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *, axis=1, unbiased=True,
               activation=None, residual=None, out=None):
    """Normalize each channel: y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual).

    With training=False, mean and var are running_mean and running_var. With training=True they are the batch's own (var the population
    variance), and the running statistics, unless None, are updated in place, with the unbiased variance of the m values of a channel:

        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var  = (1 - momentum) * running_var  + momentum * var * m / (m - 1)       unbiased=False: + momentum * var

    x : array of floats or small integers, rank >= 2, shape (N, C, ...) or with the channels on another `axis`.
    running_mean, running_var : shape (C,); float32 or float64 when training. Both may be None when training.
    weight, bias : shape (C,), or None for ones and zeros (gamma and beta of the paper).
    unbiased : whether running_var tracks the unbiased variance (PyTorch) or the population variance (Keras, TensorFlow, ONNX, Flax).
    activation : None, "relu", "relu6", ("clip", low, high), ("leaky_relu", slope), "hard_swish", "sigmoid" or "silu"; of the same bits as if
        applied to y.
    residual : array of x's shape and dtype to add before the activation, or None; `out` may be it.
    out : array of x's shape and dtype to write; may be x itself, otherwise must not overlap an argument. None: a new array.
    Returns y, of x's shape and dtype (float32 where x holds integers). An empty batch leaves the running statistics as they are.
    Raises ValueError or TypeError, having written nothing, for anything else; ValueError too for one value a channel when training.

    Ioffe & Szegedy 2015, algorithms 1 and 2. The call and its wording are those of PyTorch's `functional.batch_norm`.
    """
    if flag(training, "training"):
        return forward_training(x, running_mean, running_var, weight, bias, momentum, eps, axis, activation, residual, out, unbiased=unbiased)[0]
    cdef cnp.ndarray x_ = as_elements(x, "x"), y
    cdef int axis_ = channel_axis(x_, axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_)
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.eps = checked_eps(eps, False, x_)
    flag(unbiased, "unbiased")
    check_running_pair(running_mean, running_var)
    if running_mean is None:
        raise ValueError("running_mean must be defined in evaluation mode")
    mean = parameter(&job.mean, running_mean, "running_mean", channels, x_, axis_)
    var = parameter(&job.var, running_var, "running_var", channels, x_, axis_)
    weight_ = parameter(&job.weight, weight, "weight", channels, x_, axis_)
    bias_ = parameter(&job.bias, bias, "bias", channels, x_, axis_)
    residual_ = addend(residual, x_)
    set_fusion(&job, activation, residual_, x_, False)
    y = output(out, x_)
    if out is not None:
        check_outputs(y, x_, None, residual_, weight, bias, running_mean, running_var, "running_")
    check_variance(&job.var, channels, "running_var", job.eps)
    job.apply = FORWARD
    run(&job, axis_, x_, None, residual_, y, None)
    return y


cdef object count_of_all(stats, cnp.ndarray x, int axis):
    """stats.count, of a batch of which x is a part."""
    if not isinstance(stats, BatchStats):
        raise TypeError(f"stats: expected the BatchStats of all parts of the batch, got {type(stats).__name__}")
    count = integer(stats.count, "stats.count")
    if count < values_per_channel(x, axis):
        raise ValueError(f"stats.count: expected at least {values_per_channel(x, axis)}, the values per channel of x, which is a part of the batch, "
                         f"got {count} {where(x, axis)}")
    return count


cdef int check_sums(sums) except -1:
    if not isinstance(sums, GradientSums):
        raise TypeError(f"sums: expected GradientSums, got {type(sums).__name__}")
    return 0


def batch_norm_train(x, weight=None, bias=None, eps=1e-5, *, axis=1, activation=None, residual=None, stats=None, out=None):
    """Normalize each channel by the batch's own statistics; return them too.

    y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual), with mean and population variance over all axes but `axis`.

    x : array of floats or small integers, rank >= 2, shape (N, C, ...) or with the channels on another `axis`; at least 2 values a channel.
    weight, bias : shape (C,), or None for ones and zeros.
    eps : > 0, added to the variance.
    activation, residual : as in `batch_norm`.
    stats : None, or the BatchStats of a batch of which x is a part (`batch_stats` of each part, merged): x, which may have any number of values, is
        normalized by these. Or a function that makes them of x's own, called when all arguments have been checked.
    out : array of x's shape and dtype to write; may be x itself, otherwise must not overlap an argument. None: a new array.
    Returns (y, BatchStats(count, mean, var)); the latter, `stats` itself if given, is what `batch_norm_backward` needs.
    Raises ValueError or TypeError, having written nothing.

    Ioffe & Szegedy 2015, algorithm 1.
    """
    if callable(stats):
        return forward_training(x, None, None, weight, bias, 0.0, eps, axis, activation, residual, out, merge=stats)
    if stats is not None:
        x_ = as_elements(x, "x")
        count_of_all(stats, x_, channel_axis(x_, axis))
        checked_eps(eps, True, x_)
        for name in ("mean", "var"):
            if getattr(stats, name) is None:
                raise TypeError(f"stats.{name}: expected an array of shape (C,), got None")
        return batch_norm(x_, stats.mean, stats.var, weight, bias, False, 0.0, eps, axis=axis, activation=activation, residual=residual, out=out), stats
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


def gradient_sums(dy, x, stats, weight=None, bias=None, eps=1e-5, *, axis=1, activation=None, residual=None):
    """The sums that the gradients of a batch need, of a part of it: the first half of `batch_norm_backward`, which takes them as `sums`.

    dy, x : arrays of one shape and dtype, this part's; it may be empty.
    stats : BatchStats of the whole batch, by which x was normalized.
    weight, bias, eps, axis, activation, residual : as in the forward call. dy is first taken back through the activation.
    Returns GradientSums(dy, dy_xhat): sum(dy) and sum(dy * xhat) with xhat = (x - mean) / sqrt(var + eps), float64 arrays of shape (C,). Those of
        several parts are joined by their `merge`; those of all parts are the gradients of bias and weight.
    Raises ValueError or TypeError.

    Ioffe & Szegedy 2015, section 3.
    """
    cdef cnp.ndarray x_ = as_elements(x, "x"), dy_ = as_elements(dy, "dy"), sums, products
    cdef int axis_ = channel_axis(x_, axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_)
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.eps = checked_eps(eps, True, x_)
    check_like_x(dy_, x_)
    count_of_all(stats, x_, axis_)
    mean_ = needed(&job.mean, stats.mean, "stats.mean", channels, x_, axis_)
    var_ = needed(&job.var, stats.var, "stats.var", channels, x_, axis_)
    weight_ = parameter(&job.weight, weight, "weight", channels, x_, axis_)
    bias_ = parameter(&job.bias, bias, "bias", channels, x_, axis_)
    residual_ = addend(residual, x_)
    set_fusion(&job, activation, residual_, x_, True)
    check_variance(&job.var, channels, "stats.var", job.eps)
    job.reduction = GRADIENTS
    products = result(&job.weight_grad, channels, cnp.NPY_FLOAT64)
    sums = result(&job.bias_grad, channels, cnp.NPY_FLOAT64)
    run(&job, axis_, x_, dy_, residual_ if job.activation else None, None, None)
    return new_tuple(GradientSums, (sums, products))


cdef tuple gradient_types(object parameter, cnp.ndarray x):
    """Of the gradient of a parameter: the type that the kernels write, float32 or float64, and that which it is converted to afterwards, or None."""
    if isinstance(parameter, cnp.ndarray) and dtype_of(parameter) == FLOAT32:
        return cnp.NPY_FLOAT32, None
    if isinstance(parameter, cnp.ndarray) and (parameter.dtype.kind == "f" or is_bfloat16(parameter)):
        return cnp.NPY_FLOAT64, None if dtype_of(parameter) == FLOAT64 else parameter.dtype.newbyteorder("=")
    return cnp.NPY_FLOAT64 if dtype_of(x) == FLOAT64 else cnp.NPY_FLOAT32, None


def batch_norm_backward(dy, x, stats, weight=None, bias=None, eps=1e-5, *, axis=1, training=True, affine_grad=True, activation=None,
                        residual=None, sums=None, out=None):
    """Gradients of a loss with respect to x, weight and bias, from dy, that with respect to y.

    With invstd = 1 / sqrt(var + eps), xhat = (x - mean) * invstd and m values a channel:

        bias' = sum(dy)            weight' = sum(dy * xhat)
        x'    = weight * invstd * (dy - bias' / m - xhat * weight' / m)      training=True: the statistics are functions of x
        x'    = weight * invstd * dy                                         training=False: they are constants (running statistics)

    dy, x : arrays of one shape and dtype, as in the forward call.
    stats : BatchStats of the forward call, whose count must be x's with training=True, or a pair (mean, var) of arrays of shape (C,).
    weight, bias, eps, axis, activation, residual : as in the forward call. dy is first taken back through the activation, whose input is computed
        anew; at its corners the gradients are PyTorch's.
    sums : None, or the GradientSums of all parts of a batch of which x and dy are one (`gradient_sums` of each part, merged): x' is this part's, m
        is stats.count, that of all; weight' and bias' are those of all parts, which are the sums. Or a function that makes them of this part's,
        called when all arguments have been checked.
    affine_grad : whether weight' and bias' are wanted. If not, with training=False and no activation, of x only shape and dtype matter.
    out : array for x', of x's shape and dtype; may be dy or x itself, otherwise must not overlap an argument. None: a new array.
    Returns Gradients(x, weight, bias): x' of x's dtype; those of weight and bias of shape (C,), in the dtype of `weight` if it is a float array,
        else x's, or None without affine_grad. Its attribute `residual` is that of the residual, if there is one: a new array, or without an activation dy itself.
    Raises ValueError or TypeError, having written nothing.

    Ioffe & Szegedy 2015, section 3.
    """
    cdef cnp.ndarray x_ = as_elements(x, "x"), dy_ = as_elements(dy, "dy"), dx, weight_grad, bias_grad, new_grad = None
    cdef int axis_ = channel_axis(x_, axis)
    cdef bint train = flag(training, "training"), affine = flag(affine_grad, "affine_grad"), scaled
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_)
    cdef Job job
    memset(&job, 0, sizeof(job))
    job.eps = checked_eps(eps, train, x_)
    check_like_x(dy_, x_)
    if not isinstance(stats, tuple) or len(stats) not in (2, 3):
        raise TypeError(f"stats: expected BatchStats or a pair (mean, var), got {type(stats).__name__}")
    mean = stats[len(stats) - 2]
    var = stats[len(stats) - 1]
    if sums is not None:
        if not callable(sums):
            check_sums(sums)
        if not train:
            raise ValueError("sums: expected None with training=False, as gradients by constant statistics need no sums")
        job.count = count_of_all(stats, x_, axis_)
    elif len(stats) == 3 and train and integer(stats[0], "stats.count") != values_per_channel(x_, axis_):
        raise ValueError(f"stats.count: expected {values_per_channel(x_, axis_)}, the values per channel of x, as gradients of a part of a batch "
                         f"need the sums of all parts [sums], got {stats[0]} {where(x_, axis_)}")
    mean_ = needed(&job.mean, mean, "stats.mean", channels, x_, axis_)
    var_ = needed(&job.var, var, "stats.var", channels, x_, axis_)
    weight_ = parameter(&job.weight, weight, "weight", channels, x_, axis_)
    bias_ = parameter(&job.bias, bias, "bias", channels, x_, axis_)
    residual_ = addend(residual, x_)
    set_fusion(&job, activation, residual_, x_, True)
    scaled = not (train or affine or job.activation)
    dx = output(out, dy_ if scaled else x_)
    if out is not None:
        check_outputs(dx, x_, dy_, residual_, weight, bias, mean, var, "stats.")
        for name in ("dy", "dy_xhat") if isinstance(sums, GradientSums) else ():
            check_overlap(dx, "out", getattr(sums, name), "sums." + name, False)
    check_variance(&job.var, channels, "stats.var", job.eps)
    if residual_ is None:
        residual_grad = None
    elif job.activation:
        residual_grad = new_grad = new_like(dx, None)
    else:
        residual_grad = copy_of(dy_) if share_elements(dx, dy_) else dy_
        residual_ = None                # without an activation, nothing depends on it
    if scaled:                          # what inference makes of dy, with a mean and bias of 0
        job.mean.data = job.bias.data = NULL
        job.apply = FORWARD
        run(&job, axis_, dy_, None, None, dx, None)
        gradients = new_tuple(Gradients, (dx, None, None))
        gradients.residual = residual_grad
        return gradients
    if callable(sums):
        job.reduction = GRADIENTS
        products_ = result(&job.weight_grad, channels, cnp.NPY_FLOAT64)
        sums_ = result(&job.bias_grad, channels, cnp.NPY_FLOAT64)
        run(&job, axis_, x_, dy_, residual_ if job.activation else None, None, None)
        sums = sums(new_tuple(GradientSums, (sums_, products_)))
        check_sums(sums)
    kernel_type, grad_dtype = gradient_types(weight, x_)
    job.reduction = GRADIENTS if sums is None else 0
    job.apply = BACKWARD if train else FROZEN
    if sums is not None:
        products_ = needed(&job.weight_grad, sums.dy_xhat, "sums.dy_xhat", channels, x_, axis_)
        sums_ = needed(&job.bias_grad, sums.dy, "sums.dy", channels, x_, axis_)
        grad_dtype = grad_dtype or (np.float32 if kernel_type == cnp.NPY_FLOAT32 else np.float64)
        weight_grad, bias_grad = products_, sums_
    elif train or affine:
        weight_grad = result(&job.weight_grad, channels, kernel_type)
        bias_grad = result(&job.bias_grad, channels, kernel_type)
    run(&job, axis_, x_, dy_, residual_, dx, new_grad)
    if affine and grad_dtype is not None:
        with np.errstate(all="ignore"):
            weight_grad, bias_grad = weight_grad.astype(grad_dtype), bias_grad.astype(grad_dtype)
    gradients = new_tuple(Gradients, (dx, weight_grad, bias_grad) if affine else (dx, None, None))
    if residual_grad is not None:
        gradients.residual = residual_grad
    return gradients


def activate(x, activation, *, bias=None, residual=None, axis=1, out=None):
    """y = activation(x + bias + residual), in one pass: what follows a layer that batch normalization was folded into.

    x : array of floats or small integers, rank >= 2, shape (N, C, ...) or with the channels on another `axis`.
    activation : as in `batch_norm`, of the same bits.
    bias : shape (C,), any real dtype, or None.
    residual : array of x's shape and dtype to add before the activation, or None; `out` may be it.
    out : array of x's shape and dtype to write; may be x itself, otherwise must not overlap an argument. None: a new array.
    Returns y, of x's shape and dtype (float32 where x holds integers).
    Raises ValueError or TypeError, having written nothing.
    """
    cdef cnp.ndarray x_ = as_elements(x, "x"), y
    cdef int axis_ = channel_axis(x_, axis)
    cdef Job job
    memset(&job, 0, sizeof(job))            # a mean of 0 and a variance of 1
    bias_ = parameter(&job.bias, bias, "bias", cnp.PyArray_DIM(x_, axis_), x_, axis_)
    residual_ = addend(residual, x_)
    set_fusion(&job, activation, residual_, x_, False)
    y = output(out, x_)
    if out is not None:
        check_outputs(y, x_, None, residual_, None, bias, None, None, "")
    job.apply = FORWARD
    run(&job, axis_, x_, None, residual_, y, None)
    return y


def activate_backward(dy, x, activation, *, bias=None, residual=None, axis=1, out=None):
    """Gradients of a loss with respect to x, bias and residual, from dy, that with respect to y = activate(x, activation, ...).

    dy, x : arrays of one shape and dtype, as in the forward call; activation, bias, residual, axis as there.
    out : array for the gradient of x, of its shape and dtype; may be dy or x itself, otherwise must not overlap an argument. None: a new array.
    Returns Gradients(x, None, bias): that of x, which is the residual's, too (attribute `residual`, the same array, if there is one), and that of bias, of
        shape (C,) and its dtype if it is a float array, else x's, or None where there is none. At corners they are PyTorch's.
    Raises ValueError or TypeError, having written nothing.
    """
    cdef cnp.ndarray x_ = as_elements(x, "x"), dy_ = as_elements(dy, "dy"), dx, bias_grad = None, products
    cdef int axis_ = channel_axis(x_, axis)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x_, axis_)
    cdef Job job
    memset(&job, 0, sizeof(job))
    check_like_x(dy_, x_)
    bias_ = parameter(&job.bias, bias, "bias", channels, x_, axis_)
    residual_ = addend(residual, x_)
    set_fusion(&job, activation, residual_, x_, True)
    dx = output(out, x_)
    if out is not None:
        check_outputs(dx, x_, dy_, residual_, None, bias, None, None, "")
    job.apply = FROZEN
    if bias is not None:
        job.reduction = GRADIENTS
        kernel_type, grad_dtype = gradient_types(bias, x_)
        products = result(&job.weight_grad, channels, kernel_type)
        bias_grad = result(&job.bias_grad, channels, kernel_type)
    run(&job, axis_, x_, dy_, residual_ if job.activation else None, dx, None)
    if bias is not None and grad_dtype is not None:
        with np.errstate(all="ignore"):
            bias_grad = bias_grad.astype(grad_dtype)
    gradients = new_tuple(Gradients, (dx, None, bias_grad))
    if residual is not None:
        gradients.residual = dx
    return gradients
