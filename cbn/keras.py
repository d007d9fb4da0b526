"""Keras 3's layer BatchNormalization, computed by cbn: for Keras' NumPy, torch and JAX backends."""

import keras
import numpy as np

from .functional import array_of, batch_norm, batch_norm_backward, batch_norm_train, batch_stats
from .statistics import GradientSums

BACKEND = keras.backend.backend()
if BACKEND not in ("numpy", "torch", "jax"):
    raise ImportError(f'cbn.keras: expected Keras with the backend "numpy", "torch" or "jax", got "{BACKEND}"; set the environment variable '
                      "KERAS_BACKEND before Keras is imported")


def _forward(x, gamma, beta, moving, mask, eps, axis):
    """y, and the mean and variance that it is normalized by: `moving`, or if that is None those of x or x[mask]."""
    if moving is not None:
        return batch_norm(x, *moving, gamma, beta, eps=eps, axis=axis), *moving
    if mask is None and x.size != x.shape[axis]:
        y, (_, *statistics) = batch_norm_train(x, gamma, beta, eps, axis=axis)
        return y, *statistics
    _, *statistics = batch_stats(x if mask is None else x[mask], axis=axis)     # of one value a channel, too: the variance is 0
    return _forward(x, gamma, beta, statistics, None, eps, axis)


def _backward(dy, x, mean, var, gamma, beta, training, mask, eps, axis):
    """The gradients of x, gamma and beta. What a mask leaves out is normalized by statistics that don't depend on it."""
    gradients = batch_norm_backward(dy, x, (mean, var), gamma, beta, eps, axis=axis, training=training and mask is None)
    if training and mask is not None:
        inside = x[mask]
        sums = GradientSums(gradients.bias, gradients.weight)
        of_inside = batch_norm_backward(dy[mask], inside, batch_stats(inside, axis=axis), gamma, beta, eps, axis=axis, sums=sums)
        gradients.x[mask] = of_inside.x
    return gradients


if BACKEND == "numpy":
    apply = _forward

elif BACKEND == "jax":
    from . import jax

    def apply(x, gamma, beta, moving, mask, eps, axis):
        if moving is not None:
            return jax.batch_norm(x, *moving, gamma, beta, eps, axis=axis), *moving
        return jax.batch_norm_train(x, gamma, beta, eps, axis=axis)

else:
    import torch
    from torch.autograd.function import once_differentiable

    def _arrays(*tensors):
        """Of the same memory."""
        return [None if t is None else array_of(t.detach(), "inputs") for t in tensors]

    def _tensor(array):
        """Of the same memory; from_numpy takes no bfloat16."""
        return torch.from_numpy(array) if array.dtype.name != "bfloat16" else torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)

    class _Apply(torch.autograd.Function):
        """_forward and _backward of tensors."""

        @staticmethod
        def forward(ctx, x, gamma, beta, moving_mean, moving_variance, mask, eps, axis):
            training = moving_mean is None
            moving = None if training else _arrays(moving_mean, moving_variance)
            y, mean, var = _forward(*_arrays(x, gamma, beta), moving, mask, eps, axis)
            ctx.save_for_backward(x, gamma, beta)
            ctx.of_call = mean, var, training, mask, eps, axis
            y, mean, var = results = tuple(_tensor(a) for a in (y, mean, var))
            ctx.mark_non_differentiable(mean, var)
            return results

        @staticmethod
        @once_differentiable
        def backward(ctx, dy, *_):
            mean, var, *how = ctx.of_call
            x, gamma, beta = _arrays(*ctx.saved_tensors)
            gradients = _backward(*_arrays(dy), x, mean, var, gamma, beta, *how)
            return (*(_tensor(a) if needed else None for a, needed in zip(gradients, ctx.needs_input_grad)), *[None] * 5)

    @torch.compiler.disable
    def apply(x, gamma, beta, moving, mask, eps, axis):
        return _Apply.apply(x, gamma, beta, *(moving or (None, None)), mask, eps, axis)


@keras.saving.register_keras_serializable(package="cbn")
class BatchNormalization(keras.layers.BatchNormalization):
    """keras.layers.BatchNormalization, computed by cbn: arguments, weights and config are Keras'.

    Weights go from one layer to the other by get_weights and set_weights; a saved model is loaded where cbn.keras has been imported. As Keras
    means them, momentum is the weight of the old moving statistics (0.99), the moving variance is that of the population, epsilon is 1e-3, the
    channel axis the last, and with trainable=False the layer normalizes by its moving statistics. float16 and bfloat16 inputs are computed with
    in float32, float64 ones in float64 (where Keras' own layer takes float32). synchronized and renorm are refused.

    mask : in training, booleans of inputs' shape but for the last axis, that of the channels: where False, values are normalized, but left out
        of the statistics. Keras divides by the number of the others + 1e-7, cbn by their number. Not with the JAX backend.
    A batch without values is normalized by the moving statistics, and leaves them as they are. One with a single value a channel has variance
    0, as in Keras; with the JAX backend it is an error.

    Tensors are on the CPU, and differentiable once; with the NumPy backend Keras has no gradients. Raises ValueError or TypeError as
    cbn.batch_norm does.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if getattr(self, "renorm", False):
            raise ValueError("renorm: expected False, as cbn has no batch renormalization, got True")

    def call(self, inputs, training=None, mask=None):
        inputs = keras.ops.cast(inputs, self.compute_dtype)
        training = training and self.trainable
        mask = self._checked_mask(inputs, mask) if training and mask is not None else None
        gamma, beta = self.gamma.value if self.scale else None, self.beta.value if self.center else None
        moving = self.moving_mean.value, self.moving_variance.value
        if not training or 0 in inputs.shape or mask is not None and not mask.any():
            return apply(inputs, gamma, beta, moving, None, self.epsilon, self.axis)[0]
        y, *batch = apply(inputs, gamma, beta, None, mask, self.epsilon, self.axis)
        for variable, old, new in zip((self.moving_mean, self.moving_variance), moving, batch, strict=True):
            variable.assign(keras.ops.cast(old, new.dtype) * self.momentum + new * (1 - self.momentum))
        return y

    def _checked_mask(self, inputs, mask):
        shape = tuple(inputs.shape)
        if BACKEND == "jax" or self.axis not in (-1, len(shape) - 1):
            raise ValueError("mask: expected None with the JAX backend and where the channels aren't the last axis, got one of shape "
                             f"{tuple(mask.shape)} [inputs have shape {shape}, axis={self.axis}, backend {BACKEND}]")
        if tuple(mask.shape) != shape[:-1]:
            raise ValueError(f"mask: expected shape {shape[:-1]}, that of inputs without the channels, got {tuple(mask.shape)}")
        return keras.ops.convert_to_numpy(mask).astype(bool)
