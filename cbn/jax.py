"""Batch normalization of JAX arrays on the CPU, under jit, grad and vmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from . import functional, xla


def batch_norm(x, mean, var, weight=None, bias=None, eps=1e-5, *, axis=1, activation=None):
    """Inference: y = activation(weight * (x - mean) / sqrt(var + eps) + bias), as cbn.batch_norm of the same arguments.

    x : array of floats or small integers, rank >= 2, shape (N, C, ...) or with the channels on another `axis`.
    mean, var, weight, bias : of shape (C,); weight and bias may be None.
    eps, axis, activation : as in cbn.batch_norm; Python values, which are not traced.
    Returns y, of x's shape and dtype (float32 where x holds integers), with gradients of the first order, in reverse mode, by every array of
    floats. Under vmap the calls are made one after the other. Raises ValueError or TypeError while tracing; for a variance of -eps or less, a
    JaxRuntimeError when it runs.
    """
    how = {"eps": eps, "axis": axis, "activation": activation}
    y, operands = _checked(functional.batch_norm, how, x, weight, bias, mean, var)
    return _inference(tuple(how.items()), y.dtype, *operands)


def batch_norm_train(x, weight=None, bias=None, eps=1e-5, *, axis=1, activation=None):
    """Training: y by the batch's own mean and population variance, as cbn.batch_norm_train of the same arguments.

    The arguments are those of `batch_norm`. Returns (y, mean, var). mean and var, of shape (C,), are float32 (float64 for x in float64); they
    are for running statistics, and constants to gradients. y has gradients of the first order, in reverse mode, by x, weight and bias.
    """
    how = {"eps": eps, "axis": axis, "activation": activation}
    (y, _), operands = _checked(functional.batch_norm_train, how, x, weight, bias)
    x = operands[0]
    if x.size == x.shape[axis]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    y, mean, _, var = _training(tuple(how.items()), y.dtype, *operands)
    return y, mean, var


def _checked(function, how, x, weight, bias, *statistics):
    """What `function` of cbn makes of x without its elements, so that it checks all but values, and the operands, parameters of shape (C,)."""
    x, *vectors = (None if a is None else jnp.asarray(a) for a in (x, *statistics, weight, bias))
    empty = np.empty([n if how["axis"] in (i, i - x.ndim) else 0 for i, n in enumerate(x.shape)], x.dtype)
    try:
        result = function(empty, *(None if a is None else np.ones(a.shape, a.dtype) for a in vectors), **how)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(str(empty.shape), str(x.shape))) from None
    *statistics, weight, bias = vectors
    ones = jnp.ones(x.shape[how["axis"]], jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    vectors = *statistics, ones if weight is None else weight, 0 * ones if bias is None else bias
    return result, (x, *(a.reshape(-1).astype(jnp.promote_types(a.dtype, jnp.float32)) for a in vectors))


def _gradients(function, how, dtype, operands, dy):
    """The gradients of x (which JAX passes over where that holds integers), weight and bias."""
    x, *_, weight, bias = operands
    results = [(x.shape, dtype), (weight.shape, weight.dtype), (bias.shape, weight.dtype)]
    dx, dweight, dbias = xla.call(function, results, dy, *operands, **dict(how))
    return dx, dweight, dbias.astype(bias.dtype)


def _store(results, arrays):
    for result, array in zip(results, arrays, strict=True):
        result[...] = array


# Inference


def _infer(results, x, mean, var, weight, bias, **how):
    functional.batch_norm(x, mean, var, weight, bias, **how, out=results[0])


def _infer_backward(results, dy, x, mean, var, weight, bias, **how):
    gradients = functional.batch_norm_backward(dy, x, (mean, var), weight, bias, **how, training=False, out=results[0])
    _store(results[1:], gradients[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _inference(how, dtype, x, *vectors):
    return xla.call(_infer, [(x.shape, dtype)], x, *vectors, **dict(how))[0]


def _inference_forward(how, dtype, *operands):
    return _inference(how, dtype, *operands), operands


def _inference_backward(how, dtype, operands, dy):
    dx, dweight, dbias = _gradients(_infer_backward, how, dtype, operands, dy)
    _, mean, var, weight, _ = operands
    shifted = var + dict(how)["eps"]
    dmean = -dbias * weight / jnp.sqrt(shifted)             # of y = weight * (x - mean) / sqrt(var + eps) + bias
    dvar = -dweight * weight / (2 * shifted)
    return dx, dmean.astype(mean.dtype), dvar.astype(var.dtype), dweight, dbias


_inference.defvjp(_inference_forward, _inference_backward)


# Training: backward gets the float64 mean as the sum of two numbers of JAX's precision, without which an offset would cost digits.


def _train(results, x, weight, bias, **how):
    y, mean, rest, var = results
    _, stats = functional.batch_norm_train(x, weight, bias, **how, out=y)
    mean[...] = stats.mean
    rest[...] = stats.mean - mean
    var[...] = stats.var


def _train_backward(results, dy, x, mean, rest, var, weight, bias, **how):
    gradients = functional.batch_norm_backward(dy, x, (np.add(mean, rest, dtype=np.float64), var), weight, bias, **how, out=results[0])
    _store(results[1:], gradients[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _training(how, dtype, x, weight, bias):
    statistic = weight.shape, jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return xla.call(_train, [(x.shape, dtype), statistic, statistic, statistic], x, weight, bias, **dict(how))


def _training_forward(how, dtype, x, weight, bias):
    results = _training(how, dtype, x, weight, bias)
    return results, (x, *results[1:], weight, bias)


def _training_backward(how, dtype, operands, cotangents):
    return _gradients(_train_backward, how, dtype, operands, cotangents[0])


_training.defvjp(_training_forward, _training_backward)
