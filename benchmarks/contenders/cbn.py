"""cbn, on ordinary NumPy arrays as its users have them."""

import numpy as np
from workloads import EPS

import cbn

from . import elements, parameters


def versions():
    from cbn import dispatch

    return f"{cbn.__version__}, CPU level {dispatch.get_isa()}"


def prepare(cell):
    cbn.set_num_threads(cell.threads)
    weight, bias, mean, var = parameters(cell)
    axis, x = cell.axis, elements(cell, 0)
    out = np.zeros_like(x) if cell.output == "given" else None
    if cell.op == "inference":
        call = lambda: cbn.batch_norm(x, mean, var, weight, bias, eps=EPS, axis=axis, out=out)
        return [call], lambda y: {"y": y}
    if cell.op == "training":
        call = lambda: cbn.batch_norm_train(x, weight, bias, EPS, axis=axis, out=out)
        return [call], lambda r: {"y": r[0], "mean": r[1].mean, "var": r[1].var}
    dy, stats = elements(cell, 1), cbn.BatchStats(cell.batch * cell.spatial, mean.astype(np.float64), var.astype(np.float64))
    call = lambda: cbn.batch_norm_backward(dy, x, stats, weight, eps=EPS, axis=axis, out=out)
    return [call], lambda g: {"dx": g.x, "dweight": g.weight, "dbias": g.bias}
