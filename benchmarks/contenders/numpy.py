"""The plain NumPy expression, into a given array where there is one."""

import numpy as np
from workloads import EPS

from . import IMAGE_MEAN, IMAGE_STD, elements, parameters, pixels


def versions():
    return f"{np.__version__}"


def prepare(cell):
    x = elements(cell, 0)
    dy = elements(cell, 1) if cell.kind == "backward" else None
    residual = elements(cell, 3) if cell.add else None
    out = np.zeros_like(x) if cell.output == "given" else None
    channel_axis = cell.axis % x.ndim
    axes = tuple(i for i in range(x.ndim) if i != channel_axis)
    count = cell.batch * cell.spatial
    weight, bias, mean, var = (a.reshape([-1 if i == channel_axis else 1 for i in range(x.ndim)]) for a in parameters(cell))

    def normalize(mean, var):
        scale = weight / np.sqrt(var + EPS)
        y = np.multiply(x, scale, out=out)
        np.add(y, bias - mean * scale, out=y)
        if cell.add:
            np.add(y, residual, out=y)
        return np.maximum(y, 0, out=y) if cell.relu else y

    def inference():
        return {"y": normalize(mean, var)}

    def training():
        mean = x.mean(axes, keepdims=True)
        var = x.var(axes, keepdims=True, mean=mean)
        return {"y": normalize(mean, var), "mean": mean, "var": var}

    passed = normalize(mean, var) > 0 if cell.relu and cell.kind == "backward" else None  # what the forward call would keep

    def backward():
        g = dy * passed if cell.relu else dy
        invstd = 1 / np.sqrt(var + EPS)
        xhat = np.subtract(x, mean, out=out)
        xhat *= invstd
        dbias = g.sum(axes, keepdims=True)
        dweight = (g * xhat).sum(axes, keepdims=True)
        # dx = weight * invstd * (dy - dbias / m - xhat * dweight / m), in the memory of xhat
        dx = np.multiply(xhat, -dweight / count, out=xhat)
        dx += g
        dx -= dbias / count
        dx *= weight * invstd
        return {"dx": dx, "dweight": dweight, "dbias": dbias} | ({"dresidual": g} if cell.add else {})

    return [{"inference": inference, "training": training, "backward": backward}[cell.kind]], dict


def prepare_images(cell):
    images = pixels(cell)
    out = np.zeros(cell.shape, np.float32) if cell.output == "given" else None
    channel = (3, 1, 1) if cell.layout == "first" else (3,)
    scale, shift = (1 / (255 * IMAGE_STD)).reshape(channel), (-IMAGE_MEAN / IMAGE_STD).reshape(channel)
    seen, y = images.transpose(0, 3, 1, 2) if cell.layout == "first" else images, out
    if cell.layout == "last":  # rows of pixels in one piece, as three numbers at a time are slow
        width = cell.shape[2]
        scale, shift, seen = np.tile(scale, width), np.tile(shift, width), images.reshape(-1, width * 3)
        y = None if out is None else out.reshape(seen.shape)

    def call():
        result = np.multiply(seen, scale, out=y, order="C")
        return np.add(result, shift, out=result)

    return [call], lambda y: {"y": y.reshape(cell.shape)}
