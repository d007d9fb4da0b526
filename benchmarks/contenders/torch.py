"""PyTorch's own kernels, called below autograd: native_batch_norm and native_batch_norm_backward, with and without out.

What follows a normalization is done in its place: add_ and relu_. Backward has the output at hand, as autograd does.
"""

import numpy as np
import torch
from workloads import EPS

from . import IMAGE_MEAN, IMAGE_STD, aligned, aligned_elements, parameters, pixels


def versions():
    return f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def prepare(cell):
    torch.set_num_threads(cell.threads)
    torch.set_grad_enabled(False)

    def tensor(array):
        """The array as (N, C), as (N, C, S), or as (N, C, S, 1) in the memory format channels_last."""
        t = torch.from_numpy(array)
        if cell.spatial == 1:
            return t.reshape(cell.batch, cell.channels)
        if cell.layout == "first":
            return t.reshape(cell.batch, cell.channels, cell.spatial)
        return t.reshape(cell.batch, cell.spatial, 1, cell.channels).permute(0, 3, 1, 2)

    def results(tensors):
        names = {"inference": ("y",), "training": ("y", "mean"), "backward": ("dx", "dweight", "dbias", "dresidual")[: 3 + cell.add]}
        names = names[cell.kind]
        return {name: (t.permute(0, 2, 3, 1) if t.dim() == 4 else t).numpy() for name, t in zip(names, tensors, strict=False)}

    weight, bias, mean, var = map(torch.from_numpy, parameters(cell))
    x = tensor(aligned_elements(cell, 0))
    given = cell.output == "given"
    y, a, b = (tensor(aligned(cell.shape)), torch.empty(cell.channels), torch.empty(cell.channels)) if given else (None, None, None)
    batch_norm = torch.native_batch_norm
    residual = tensor(aligned_elements(cell, 3)) if cell.add else None

    def finished(call):
        """The call, and what follows it, in its place."""

        def call_and_finish():
            tensors = call()
            if cell.add:
                tensors[0].add_(residual)
            tensors[0].relu_()
            return tensors

        return call_and_finish if cell.relu else call

    if cell.kind == "inference":
        calls = [lambda: batch_norm(x, weight, bias, mean, var, False, 0.1, EPS)]
        none = torch.empty(0)
        with_out = lambda: batch_norm(x, weight, bias, mean, var, False, 0.1, EPS, out=(y, none, none))
    elif cell.kind == "training":
        calls = [lambda: batch_norm(x, weight, bias, None, None, True, 0.1, EPS)]
        with_out = lambda: batch_norm(x, weight, bias, None, None, True, 0.1, EPS, out=(y, a, b))
    else:
        dy, invstd, mask = tensor(aligned_elements(cell, 1)), 1 / torch.sqrt(var + EPS), [True, True, True]
        backward = torch.ops.aten.native_batch_norm_backward
        arguments = x, weight, None, None, mean, invstd, True, EPS, mask
        if not cell.relu:
            calls = [lambda: backward.default(dy, *arguments)]
            with_out = lambda: backward.out(dy, *arguments, out0=y, out1=a, out2=b)
        else:
            (forward, *_) = finished(lambda: batch_norm(x, weight, bias, mean, var, False, 0.1, EPS))()
            g = torch.empty_like(dy)
            through_relu = torch.ops.aten.threshold_backward

            def default():
                g = through_relu.default(dy, forward, 0)
                return *backward.default(g, *arguments), g

            def with_out():
                through_relu.grad_input(dy, forward, 0, grad_input=g)
                return *backward.out(g, *arguments, out0=y, out1=a, out2=b), g

            calls = [default]
    calls += [with_out] * given
    return (calls if cell.kind == "backward" else [finished(call) for call in calls]), results


def prepare_images(cell):
    torch.set_num_threads(cell.threads)
    torch.set_grad_enabled(False)
    x = torch.from_numpy(pixels(cell)).permute(0, 3, 1, 2)
    scale, shift = (torch.from_numpy(a).reshape(3, 1, 1) for a in (1 / (255 * IMAGE_STD), -IMAGE_MEAN / IMAGE_STD))
    memory_format = torch.contiguous_format if cell.layout == "first" else torch.channels_last
    out = torch.empty(x.shape).contiguous(memory_format=memory_format)
    calls = [
        lambda: x.to(torch.float32, memory_format=memory_format).mul_(scale).add_(shift),
        lambda: torch.addcmul(shift, x.to(torch.float32, memory_format=memory_format), scale),
    ]
    if cell.output == "given":
        calls.append(lambda: out.copy_(x).mul_(scale).add_(shift))
    return calls, lambda y: {"y": np.ascontiguousarray(y.permute(0, 2, 3, 1) if cell.layout == "last" else y)}
