"""PyTorch's own kernels, called below autograd: native_batch_norm and native_batch_norm_backward, with and without out."""

import torch
from workloads import EPS

from . import aligned, aligned_elements, parameters


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
        names = {"inference": ("y",), "training": ("y", "mean"), "backward": ("dx", "dweight", "dbias")}[cell.op]
        return {name: (t.permute(0, 2, 3, 1) if t.dim() == 4 else t).numpy() for name, t in zip(names, tensors, strict=False)}

    weight, bias, mean, var = map(torch.from_numpy, parameters(cell))
    x = tensor(aligned_elements(cell, 0))
    given = cell.output == "given"
    y, a, b = (tensor(aligned(cell.shape)), torch.empty(cell.channels), torch.empty(cell.channels)) if given else (None, None, None)
    batch_norm = torch.native_batch_norm
    if cell.op == "inference":
        calls = [lambda: batch_norm(x, weight, bias, mean, var, False, 0.1, EPS)]
        none = torch.empty(0)
        with_out = lambda: batch_norm(x, weight, bias, mean, var, False, 0.1, EPS, out=(y, none, none))
    elif cell.op == "training":
        calls = [lambda: batch_norm(x, weight, bias, None, None, True, 0.1, EPS)]
        with_out = lambda: batch_norm(x, weight, bias, None, None, True, 0.1, EPS, out=(y, a, b))
    else:
        dy, invstd, mask = tensor(aligned_elements(cell, 1)), 1 / torch.sqrt(var + EPS), [True, True, True]
        backward = torch.ops.aten.native_batch_norm_backward
        calls = [lambda: backward.default(dy, x, weight, None, None, mean, invstd, True, EPS, mask)]
        with_out = lambda: backward.out(dy, x, weight, None, None, mean, invstd, True, EPS, mask, out0=y, out1=a, out2=b)
    return calls + [with_out] * given, results
