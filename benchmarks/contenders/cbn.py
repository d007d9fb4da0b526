"""cbn, on ordinary NumPy arrays as its users have them."""

import numpy as np
from workloads import EPS

import cbn

from . import IMAGE_MEAN, IMAGE_STD, Cannot, elements, parameters, pixels


def versions():
    from cbn import dispatch

    return f"{cbn.__version__}, CPU level {dispatch.get_isa()}"


def prepare(cell):
    cbn.set_num_threads(cell.threads)
    weight, bias, mean, var = parameters(cell)
    axis, x = cell.axis, elements(cell, 0)
    out = np.zeros_like(x) if cell.output == "given" else None
    options = {"axis": axis, "out": out}
    if cell.relu:
        options |= {"activation": "relu", "residual": elements(cell, 3) if cell.add else None}
    if cell.kind == "inference":
        call = lambda: cbn.batch_norm(x, mean, var, weight, bias, eps=EPS, **options)
        return [call], lambda y: {"y": y}
    if cell.kind == "training":
        call = lambda: cbn.batch_norm_train(x, weight, bias, EPS, **options)
        return [call], lambda r: {"y": r[0], "mean": r[1].mean, "var": r[1].var}
    dy, stats = elements(cell, 1), cbn.BatchStats(cell.batch * cell.spatial, mean.astype(np.float64), var.astype(np.float64))
    call = lambda: cbn.batch_norm_backward(dy, x, stats, weight, bias, EPS, **options)
    return [call], lambda g: {"dx": g.x, "dweight": g.weight, "dbias": g.bias} | ({"dresidual": g.residual} if cell.add else {})


def prepare_images(cell):
    if not hasattr(cbn, "normalize_images"):
        raise Cannot("has no normalize_images")
    cbn.set_num_threads(cell.threads)
    images = pixels(cell)
    out = np.zeros(cell.shape, np.float32) if cell.output == "given" else None
    return [lambda: cbn.normalize_images(images, IMAGE_MEAN, IMAGE_STD, layout=f"channels_{cell.layout}", out=out)], lambda y: {"y": y}
