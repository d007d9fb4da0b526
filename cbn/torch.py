"""PyTorch's batch normalization layers, computed on the CPU by cbn, as operators that autograd and torch.compile know."""

from collections import Counter
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from . import functional
from .statistics import BatchStats
from .synchronize import Group

_ACTIVATIONS = {     # PyTorch's, where it has to compute them
    "relu": F.relu, "relu6": F.relu6, "clip": torch.clamp, "leaky_relu": F.leaky_relu, "hard_swish": F.hardswish, "sigmoid": torch.sigmoid,
    "silu": F.silu,
}  # fmt: skip

# An activation is its name and its numbers, as schemas know no tuples of both.
_library = torch.library.Library("cbn", "FRAGMENT")
for _schema in (
    "batch_norm(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    "str? activation, float[] numbers) -> Tensor",
    "batch_norm_train(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? weight, "
    "Tensor? bias, Tensor? residual, float? momentum, float eps, str? activation, float[] numbers) -> (Tensor, Tensor mean, Tensor var)",
    "batch_norm_backward(Tensor dy, Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, bool training, "
    "bool affine_grad, float eps, str? activation, float[] numbers) -> (Tensor input, Tensor weight, Tensor bias, Tensor residual)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_batch_norm, _batch_norm_train, _batch_norm_backward = (
    getattr(torch.ops.cbn, name).default for name in ("batch_norm", "batch_norm_train", "batch_norm_backward")
)


def _array(tensor):
    """The tensor's memory as an array."""
    if tensor is None:
        return None
    if tensor.dtype is torch.bfloat16:
        from ml_dtypes import bfloat16

        return tensor.detach().view(torch.int16).numpy().view(bfloat16)
    return tensor.detach().numpy()


def _tensor(array):
    """The array's memory as a tensor. Large arrays are made by cbn, which reuses the memory of freed ones; PyTorch takes fresh pages."""
    if array.dtype.kind == "V":     # ml_dtypes' bfloat16, which PyTorch doesn't know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _activation(name, numbers):
    return (name, *numbers) if numbers else name


def _name_and_numbers(activation):
    return (activation[0], list(activation[1:])) if isinstance(activation, tuple) else (activation, [])


def _like(x):
    """A tensor as the outputs for x are."""
    return torch.empty_like(x, dtype=x.dtype if x.is_floating_point() else torch.float32)


def _out(x, dy=None):
    """An output of PyTorch's where cbn would order the memory of a new one otherwise than the fake kernels say."""
    return _array(_like(x)) if 0 in x.stride() or dy is not None and dy.stride() != x.stride() else None


def _infer_cpu(x, mean, var, weight, bias, residual, eps, name, numbers):
    return _tensor(functional.batch_norm(_array(x), _array(mean), _array(var), _array(weight), _array(bias), False, 0.0, eps,
                                         activation=_activation(name, numbers), residual=_array(residual), out=_out(x)))


def _train_cpu(x, running_mean, running_var, batches, weight, bias, residual, momentum, eps, name, numbers, merge=None):
    updated_mean, updated_var = running_mean, running_var
    halves = running_mean is not None and running_mean.dtype in (torch.float16, torch.bfloat16)
    if halves:
        updated_mean, updated_var = running_mean.float(), running_var.float()
    if momentum is None:
        momentum = 0.0 if batches is None else 1 / (int(batches) + 1)
    y, stats = functional.forward_training(
        _array(x), _array(updated_mean), _array(updated_var), _array(weight), _array(bias), momentum, eps, 1, _activation(name, numbers),
        _array(residual), _out(x), _array(batches), merge=merge,
    )  # fmt: skip
    if halves:
        running_mean.copy_(updated_mean), running_var.copy_(updated_var)
    torch.autograd.graph.increment_version([t for t in (running_mean, running_var, batches) if t is not None])
    return _tensor(y), torch.from_numpy(stats.mean), torch.from_numpy(stats.var)


def _backward_cpu(dy, x, mean, var, weight, bias, residual, training, affine_grad, eps, name, numbers, count=None, sums=None):
    stats = _array(mean), _array(var)
    gradients = functional.batch_norm_backward(
        _array(dy), _array(x), stats if count is None else BatchStats(count, *stats), _array(weight), _array(bias), eps, training=training,
        affine_grad=affine_grad, activation=_activation(name, numbers), residual=None if name is None else _array(residual), sums=sums,
        out=_out(x, dy),
    )  # fmt: skip
    return tuple(x.new_empty(0) if array is None else _tensor(array) for array in (*gradients, gradients.residual))


def _infer_fake(x, *_):
    return _like(x)


def _train_fake(x, *_):
    return _like(x), *(x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))


def _backward_fake(dy, x, mean, var, weight, bias, residual, training, affine_grad, eps, name, numbers):
    dtype = weight.dtype if weight is not None else torch.float64 if x.dtype is torch.float64 else torch.float32
    weight_grad, bias_grad = (x.new_empty(x.shape[1] if affine_grad else 0, dtype=dtype if affine_grad else x.dtype) for _ in range(2))
    return _like(x), weight_grad, bias_grad, x.new_empty(0) if name is None or residual is None else _like(x)


def _keep(ctx, training, x, mean, var, weight, bias, residual, eps, name, numbers):
    ctx.training, ctx.eps, ctx.name, ctx.numbers, ctx.added = training, eps, name, numbers, residual is not None
    ctx.save_for_backward(x, mean, var, weight, bias, None if name is None else residual)


def _go_back(ctx, dy, affine_grad, backward=_batch_norm_backward):
    """The gradients of weight, bias, residual and input, those that there are."""
    x, mean, var, weight, bias, residual = ctx.saved_tensors
    with nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd():
        dx, weight_grad, bias_grad, residual_grad = backward(
            dy, dy if x is None else x, mean, var, weight, bias, residual, ctx.training, affine_grad, ctx.eps, ctx.name, ctx.numbers
        )
    if ctx.name is None:
        residual_grad = dy
    return (weight_grad if affine_grad and weight is not None else None, bias_grad if affine_grad and bias is not None else None,
            residual_grad if ctx.added else None, dx)


# The kernels for autograd: a function's forward is the operator without it.
class _Infer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            y = _batch_norm(*inputs)
        x, mean, var, weight, bias, residual, eps, name, numbers = inputs
        if name is None and not any(ctx.needs_input_grad[3:5]):
            x = None        # of which the gradient is the same whatever it is
        # Copies, as a call that trains may update them before backward.
        _keep(ctx, False, x, mean.clone(), var.clone(), weight, bias, residual, eps, name, numbers)
        return y

    @staticmethod
    def backward(ctx, dy):
        *gradients, dx = _go_back(ctx, dy, any(ctx.needs_input_grad[3:5]))
        return dx, None, None, *gradients, None, None, None


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, var = _batch_norm_train(*inputs)
        x, _, _, _, weight, bias, residual, _, eps, name, numbers = inputs
        _keep(ctx, True, x, mean, var, weight, bias, residual, eps, name, numbers)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        *gradients, dx = _go_back(ctx, dy, True)
        return dx, None, None, None, *gradients, None, None, None, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return _batch_norm_backward(*inputs)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("cbn::batch_norm_backward: expected to be differentiated once, got a second derivative (double backward), which "
                           "torch.nn's batch normalization has and cbn's has not")


for _name, _cpu, _fake, _function in (
    ("batch_norm", _infer_cpu, _infer_fake, _Infer),
    ("batch_norm_train", _train_cpu, _train_fake, _Train),
    ("batch_norm_backward", _backward_cpu, _backward_fake, _Backward),
):
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake("cbn::" + _name, _fake, lib=_library)
    _library.impl(_name, _function.apply, "Autograd")


class Gloo:
    """The ranks of a torch.distributed process group, as `comm=` of cbn.BatchNorm takes them.

    group : one with a backend for tensors on the CPU, such as gloo, or None for all processes.
    """

    def __init__(self, group=None):
        self.group = group

    def Get_rank(self):
        return torch.distributed.get_rank(self.group)

    def Get_size(self):
        return torch.distributed.get_world_size(self.group)

    def Allgather(self, message, everyone):
        torch.distributed.all_gather(list(torch.from_numpy(everyone)), torch.from_numpy(message), self.group)


# A batch that lies on the ranks of a Group: no operators, as schemas know no groups.
class _TrainTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, *inputs):
        x, _, _, _, weight, bias, residual, momentum, eps, name, numbers = inputs
        agreed = [f"input of {x.dtype}", f"momentum={momentum}", f"eps={eps}", f"activation={_activation(name, numbers)}",
                  f"residual={'None' if residual is None else 'a tensor'}"]

        def merge(own):
            stats = group.statistics(own, agreed)
            ctx.count = stats.count
            return stats

        y, mean, var = _train_cpu(*inputs, merge)
        ctx.group = group
        _keep(ctx, True, x, mean, var, weight, bias, residual, eps, name, numbers)
        return y

    @staticmethod
    def backward(ctx, dy):
        with ctx.group.together():
            *gradients, dx = _go_back(ctx, dy, True, partial(_BackwardTogether.apply, ctx.group, ctx.count))
        return None, dx, None, None, None, *gradients, None, None, None, None


class _BackwardTogether(_Backward):
    @staticmethod
    def forward(ctx, group, count, *inputs):
        dx, weight_grad, bias_grad, residual_grad = _backward_cpu(*inputs, count, group.sums)
        own = group.own     # those of weight and bias, as of all other parameters, are of this rank's part
        return dx, torch.from_numpy(own.dy_xhat).to(weight_grad.dtype), torch.from_numpy(own.dy).to(bias_grad.dtype), residual_grad


class _Layer:
    """What is cbn's in a layer of torch.nn."""

    activation = None

    def __init__(self, *args, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.activation = functional.checked_activation(activation)

    def forward(self, input, residual=None):
        """activation(normalized input + residual), of tensors of one shape and type.

        On other devices than the CPU, and where a network is exported, PyTorch computes it.
        """
        self._check_input_dim(input)
        name, numbers = _name_and_numbers(self.activation)
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        if self._is_elsewhere(input):
            y = super().forward(input)
            y = y if residual is None else y + residual
            return y if name is None else _ACTIVATIONS[name](y, *numbers)
        if self.training or mean is None and var is None:
            return _batch_norm_train(*self._training_inputs(input, residual))[0]
        return _batch_norm(input, mean, var, weight, bias, residual, self.eps, name, numbers)

    def _is_elsewhere(self, input):
        """Whether PyTorch computes it."""
        tensors = (t for t in (input, self.weight, self.running_mean) if isinstance(t, torch.Tensor))
        return torch.compiler.is_exporting() or any(t.device.type != "cpu" for t in tensors)

    def _training_inputs(self, input, residual):
        tracked = self.training and self.track_running_stats
        running = (self.running_mean, self.running_var, self.num_batches_tracked) if tracked else (None, None, None)
        return input, *running, self.weight, self.bias, residual, self.momentum, self.eps, *_name_and_numbers(self.activation)

    def extra_repr(self):
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation!r}")


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, computed by cbn; `activation=` as cbn.BatchNorm takes it."""


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, computed by cbn; `activation=` as cbn.BatchNorm takes it."""


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, computed by cbn; `activation=` as cbn.BatchNorm takes it."""


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch.nn.SyncBatchNorm, but not derived from it, as DistributedDataParallel refuses it on the CPU."""

    forward = nn.SyncBatchNorm.forward
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, process_group=None, device=None,
                 dtype=None, **bias):       # which not every PyTorch has
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **bias)
        self.process_group = process_group

    def _check_input_dim(self, input):
        nn.SyncBatchNorm._check_input_dim(self, input)
        self._check_non_zero_input_channels(input)


class SyncBatchNorm(_Layer, _SyncBatchNorm):
    """torch.nn.SyncBatchNorm, computed by cbn, on the CPU too, where PyTorch refuses it; `activation=` as cbn.BatchNorm takes it.

    In training, where torch.distributed is initialized and process_group (None: all processes) has several ranks, the statistics are of the
    batches of all of them, any of which may be empty: all ranks make the same calls in the same order, as with any collectives. Otherwise it
    is as cbn.torch.BatchNorm1d, for inputs of shape (N, C, ...) of any rank >= 2. Gradients of weight and bias are of this rank's batch, for
    DistributedDataParallel to average.
    What is wrong on one rank is raised on all, as ValueError, TypeError or RuntimeError, having changed nothing on any.
    """

    _group = None       # made in the first call that needs it, which is as collective as this is

    def forward(self, input, residual=None):
        """activation(normalized input + residual), of tensors of one shape and type.

        Calls that other ranks take part in are not compiled: torch.compile breaks the graph there, or refuses with fullgraph=True.
        """
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized() and not self._is_elsewhere(input):
            process_group = self.process_group or torch.distributed.group.WORLD
            if torch.distributed.get_world_size(process_group) > 1:
                return self._forward_together(process_group, input, residual)
        return super().forward(input, residual)

    @torch._disable_dynamo      # torch.compiler.disable, which would import the compiler with this module
    def _forward_together(self, process_group, input, residual):
        if self._group is None or self._group.comm.group is not process_group:
            self._group = Group(Gloo(process_group), self.num_features)
        with self._group.together():
            self._check_input_dim(input)
            if input.shape[1] != self.num_features:
                raise ValueError(f"input: expected {self.num_features} channels, got {input.shape[1]} [input has shape {tuple(input.shape)}]")
            return _TrainTogether.apply(self._group, *self._training_inputs(input, residual))


_SWAPPED = {
    nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d, nn.SyncBatchNorm: SyncBatchNorm,
}  # fmt: skip
_JOINED = {
    nn.ReLU: lambda m: "relu", nn.ReLU6: lambda m: "relu6", nn.Hardtanh: lambda m: ("clip", m.min_val, m.max_val),
    nn.LeakyReLU: lambda m: ("leaky_relu", m.negative_slope), nn.Hardswish: lambda m: "hard_swish", nn.Sigmoid: lambda m: "sigmoid",
    nn.SiLU: lambda m: "silu",
}  # fmt: skip


def convert(module, *, join=True):
    """Let cbn compute the batch normalizations in a network, in place; returns the network.

    module : torch.nn.Module. Each in it that is a torch.nn.BatchNorm1d, 2d, 3d or SyncBatchNorm, and of no class derived from these, becomes
        one of cbn.torch's of the same name, and stays the object that it is, with its parameters, buffers, hooks and mode: optimizers made
        before go on, and state dicts are the same.
    join : whether it takes over the activation after it: a ReLU, ReLU6, Hardtanh, LeakyReLU, Hardswish, Sigmoid or SiLU that follows it in a
        torch.nn.Sequential, and in whose place a torch.nn.Identity comes. It is left where the normalization has another place in the network,
        or either of them hooks. That a Sequential is called as a whole, and not taken apart for what is between, can't be seen: say join=False
        where it isn't so.
    Raises TypeError for anything else.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    join = functional.checked_flag(join, "join")
    places = Counter(child for _, child in module.named_modules(remove_duplicate=False))
    for child in places:
        if type(child) in _SWAPPED and "forward" not in child.__dict__:
            child.__class__ = _SWAPPED[type(child)]     # as torch.nn's lazy modules become what they stand for
    for child in places if join else ():
        if type(child).forward is nn.Sequential.forward:
            for name, after in pairwise(child._modules):
                norm, activation = child._modules[name], child._modules[after]
                if isinstance(norm, _Layer) and norm.activation is None and places[norm] == 1 and type(activation) in _JOINED \
                        and not _altered(norm) and not _altered(activation):
                    norm.activation = _JOINED[type(activation)](activation)
                    child._modules[after] = nn.Identity()
    return module


def _altered(module):
    """Whether something else than its class decides what a call of it does."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__
