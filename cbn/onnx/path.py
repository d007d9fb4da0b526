"""What may stand between a layer and a batch normalization: nodes that move a channel's values elsewhere, or add a constant to them."""

import math

import numpy as np

from .graph import Obstacle, attributes, label, op_type

RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def through(graph, node, axis, affine, back):
    """Take a batch normalization along the given axis from one side of a node to the other, back to its input or on to its output.

    Returns (axis, affine) there. Raises Obstacle where it is none on the other side.
    """
    kind = op_type(node)
    if kind == "Identity":
        return axis, affine
    if kind == "Transpose":
        order = attributes(node).get("perm") or range(len(_shape(graph, node.input[0], node)))[::-1]
        return (order[axis] if back else list(order).index(axis)), affine
    if kind in RESHAPES:
        near, far = (node.output[0], node.input[0]) if back else (node.input[0], node.output[0])
        axis, times = _refined(_shape(graph, near, node), axis, len(affine.scale), _shape(graph, far, node), node)
        return axis, affine.repeat(times)
    if kind == "Pad":
        _check_pad(graph, node, axis, affine)
        return axis, affine
    raise Obstacle(f"{label(node)} stands between")


def addend(graph, node, axis, channels):
    """(data input, constant of shape (channels,)) of an Add of a constant along the axis. Raises Obstacle for any other node."""
    obstacle = Obstacle(f"{label(node)} stands between")
    if op_type(node) != "Add" or graph.version < 7:
        raise obstacle
    for source, name in (node.input, node.input[::-1]):
        try:
            constant = graph.constant(name, "")
        except Obstacle:
            continue
        if constant.ndim:
            shape = _shape(graph, source, node)
            per_channel = tuple(channels if d == axis else 1 for d in range(len(shape)))
            wide = constant.size > 1 and (shape[axis] != channels or constant.shape not in (per_channel[d:] for d in range(len(shape))))
            if wide or constant.ndim > len(shape):      # it would make more of the other input than that is
                raise Obstacle(f"{label(node)} adds a constant of shape {constant.shape}, not one value a channel")
        return source, np.broadcast_to(constant.astype(np.float64).reshape(-1), channels)
    raise obstacle


def _shape(graph, name, node):
    shape = graph.shape(name)
    if shape is None:
        raise Obstacle(f"nothing says which shape {name!r} has, on one side of {label(node)}")
    return shape


def _refined(near, axis, channels, far, node):
    """(axis, times) after a reshape of near to far: that of far which has `times` neighbours for each channel along the axis of near."""
    if near[:axis] == far[:axis] and None not in far[:axis] and far[axis:axis + 1] == [channels]:
        return axis, 1
    inner = _size(near[axis + 1:])
    for a, size in enumerate(far):
        if inner and isinstance(size, int) and size % channels == 0:
            rest = _size(far[a + 1:])
            if rest and rest[0] * (size // channels) == inner[0] and rest[1] == inner[1]:
                return a, size // channels
    raise Obstacle(f"{label(node)} makes {_dims(near)} of {_dims(far)}, or the other way round, which are not known to keep the channels apart")


def _size(shape):
    """The product of dimensions as (number, names), or None where one is unknown."""
    if None in shape:
        return None
    return math.prod(d for d in shape if isinstance(d, int)), sorted(d for d in shape if isinstance(d, str))


def _dims(shape):
    return f"({', '.join('?' if d is None else str(d) for d in shape)})"


def _check_pad(graph, node, axis, affine):
    a = attributes(node)
    if graph.version >= 11:
        pads = graph.constant(node.input[1], "the padding")
        value = graph.constant(node.input[2], "the value that pads") if len(node.input) > 2 and node.input[2] else 0.0
        axes = graph.constant(node.input[3], "the padding's axes") if len(node.input) > 3 and node.input[3] else range(len(pads) // 2)
    else:
        pads, value = a.get("pads", a.get("paddings", ())), a.get("value", 0.0)
        axes = range(len(pads) // 2)
    rank = len(_shape(graph, node.input[0], node)) if min(axes, default=0) < 0 else 0
    along = [int(pad) for pad, d in zip(pads, [*axes, *axes], strict=True) if d % (rank or d + 1) == axis]
    if any(along):
        raise Obstacle(f"{label(node)} pads with channels")
    if a.get("mode", b"constant") != b"constant" or max(map(int, pads), default=0) <= 0:
        return
    value = float(np.asarray(value).reshape(()))
    with np.errstate(invalid="ignore"):
        if not ((value - affine.mean) * affine.scale + affine.bias == value).all():
            raise Obstacle(f"{label(node)} stands between and pads with {value:g}, of which it makes something else")
