"""Keras 3's layer BatchNormalization, computed by cbn: for Keras' NumPy and torch backends."""

import keras
import numpy as np

from .functional import array_of, batch_norm, batch_norm_backward, batch_norm_train, batch_stats
from .statistics import GradientSums

if keras.backend.backend() not in ("numpy", "torch"):
    raise ImportError(f'cbn.keras: expected Keras with the backend "numpy" or "torch", got "{keras.backend.backend()}"; set the environment variable '
                      "KERAS_BACKEND before Keras is imported")


def _forward(x, gamma, beta, moving, mask, eps, axis):
    """y, and the mean and variance that it is normalized by: `moving`, or if that is None those of x or x[mask]."""
    if moving is not None:
        return batch_norm(x, *moving, gamma, beta, eps=eps, axis=axis), *moving
    stats = None
    if mask is not None or x.size == x.shape[axis]:     # one value a channel is an error in PyTorch and cbn; in Keras its variance is 0
        stats = batch_stats(x if mask is None else x[mask], axis=axis)
    y, stats = batch_norm_train(x, gamma, beta, eps, axis=axis, stats=stats)
    return y, stats.mean, stats.var


def _backward(dy, x, mean, var, gamma, beta, training, mask, eps, axis):
    """The gradients of x, gamma and beta. What a mask leaves out is normalized by statistics that don't depend on it."""
    gradients = batch_norm_backward(dy, x, (mean, var), gamma, beta, eps, axis=axis, training=training and mask is None)
    if training and mask is not None:
        inside = x[mask]
        sums = GradientSums(gradients.bias, gradients.weight)
        of_inside = batch_norm_backward(dy[mask], inside, batch_stats(inside, axis=axis), gamma, beta, eps, axis=axis, sums=sums)
        gradients.x[mask] = of_inside.x
    return gradients


if keras.backend.backend() == "numpy":
    apply = _forward
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

    Weights go from one layer to the other by get_weights and set_weights; a saved model is loaded where cbn.keras has been imported. By Keras' meaning,
    momentum is the weight of the old moving statistics (0.99), the moving variance that of the population, epsilon 1e-3, the channel axis the last,
    and with trainable=False the layer normalizes by its moving statistics. float16 and bfloat16 inputs are computed with in float32, and rounded once.

    mask : boolean array of inputs' shape without the last axis, which is the channel axis; in training, values where it is False are left out of
        the statistics. (Keras divides by their number + 1e-7; here it is their number.)
    A batch without values is normalized by the moving statistics, and leaves them as they are.

    With the NumPy backend, as Keras itself there, it gives no gradients. With the torch backend it has autograd's, once; tensors are on the CPU.
    Raises ValueError or TypeError for what cbn.batch_norm does.
    """

    def call(self, inputs, training=None, mask=None):
        if mask is not None:
            mask = self._checked_mask(inputs, mask)
        count = np.prod(inputs.shape) // max(inputs.shape[self.axis], 1) if mask is None else mask.sum()
        gamma, beta, *moving = (
            None if v is None else keras.ops.convert_to_tensor(v)
            for v in (self.gamma if self.scale else None, self.beta if self.center else None, self.moving_mean, self.moving_variance)
        )
        if not training or not self.trainable or not count:
            return apply(inputs, gamma, beta, moving, None, self.epsilon, self.axis)[0]
        y, *batch = apply(inputs, gamma, beta, None, mask, self.epsilon, self.axis)
        for variable, old, new in zip((self.moving_mean, self.moving_variance), moving, batch, strict=True):
            variable.assign(keras.ops.cast(old, new.dtype) * self.momentum + new * (1 - self.momentum))
        return y

    def _checked_mask(self, inputs, mask):
        mask = np.asarray(keras.ops.convert_to_numpy(mask), bool)
        if self.axis not in (-1, inputs.ndim - 1):
            raise ValueError(f"mask: expected None where the channels aren't the last axis, got an array [inputs have shape {tuple(inputs.shape)}, "
                             f"axis={self.axis}]")
        if mask.shape != tuple(inputs.shape[:-1]):
            raise ValueError(f"mask: expected shape {tuple(inputs.shape[:-1])}, that of inputs without the channels, got {mask.shape}")
        return mask
