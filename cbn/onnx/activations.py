"""Recognizes the activation that follows a value of an ONNX graph, also in the pieces in which exporters write hard-swish and swish."""

import numpy as np

from .graph import OUTPUT, Obstacle, attributes, op_type

SIMPLE = {"Relu": "relu", "Sigmoid": "sigmoid", "HardSwish": "hard_swish"}


def activation_after(graph, name):
    """In the words of cbn's `activation=`, or None where none follows that cbn has."""
    users = sorted(set(graph.users.get(name, ())))
    if not users or OUTPUT in users or len(users) > 2:
        return None
    nodes = [graph.nodes[i] for i in users]
    if len(nodes) == 1:
        return _of_one(graph, nodes[0])
    gate, scale = (nodes[0], nodes[1]) if op_type(nodes[1]) in ("Mul", "Div") and name in nodes[1].input else nodes[::-1]
    return _gated(graph, name, gate, scale)


def _of_one(graph, node):
    kind, a = op_type(node), attributes(node)
    if kind in SIMPLE:
        return SIMPLE[kind]
    if kind == "Swish" and a.get("alpha", 1.0) == 1:
        return "silu"
    if kind == "LeakyRelu":
        return "leaky_relu", a.get("alpha", float(np.float32(0.01)))
    if kind == "Clip":
        bounds = _clip(graph, node)
        return {(0, 6): "relu6", (0, np.inf): "relu", None: None}.get(bounds, bounds and ("clip", *bounds))
    return None


def _gated(graph, name, gate, product):
    """x * sigmoid(x), x * hardsigmoid(x), x * clip(x + 3, 0, 6) / 6 with the division anywhere: what x times a gate of x is."""
    if op_type(product) != "Mul" or sorted(product.input).count(name) != 1:
        return None
    factor = 1.0
    kind, a = op_type(gate), attributes(gate)
    if kind == "Sigmoid" and gate.output[0] in product.input:
        return "silu"
    if kind == "HardSigmoid" and gate.output[0] in product.input:
        return "hard_swish" if abs(a.get("alpha", 0.2) - 1 / 6) < 1e-3 and a.get("beta", 0.5) == 0.5 else None
    if kind != "Add" or _constant(graph, gate, name) != 3:
        return None
    clip = _next(graph, gate.output[0])
    if clip is None or op_type(clip) != "Clip" or _clip(graph, clip) != (0, 6):
        return None
    value = clip.output[0]
    if value not in product.input:                                  # x * (clip(x + 3, 0, 6) / 6)
        factor, value = _scaling(graph, _next(graph, value), value)
    if value not in product.input:
        return None
    if factor == 1.0:                                               # (x * clip(x + 3, 0, 6)) / 6
        factor, _ = _scaling(graph, _next(graph, product.output[0]), product.output[0])
    return "hard_swish" if abs(factor - 1 / 6) < 1e-3 else None


def _next(graph, name):
    users = graph.users.get(name, [])
    return graph.nodes[users[0]] if len(users) == 1 and users[0] != OUTPUT else None


def _scaling(graph, node, name):
    """(factor, output) of a node that multiplies or divides a value by a constant; (0, None) for another."""
    if node is None or op_type(node) not in ("Mul", "Div"):
        return 0.0, None
    c = _constant(graph, node, name)
    if c is None or op_type(node) == "Div" and (node.input[0] != name or c == 0):
        return 0.0, None
    return (1 / c if op_type(node) == "Div" else c), node.output[0]


def _constant(graph, node, name):
    """The number that is a node's other input than name, or None."""
    others = [i for i in node.input if i != name]
    try:
        (value,) = [graph.constant(i, "") for i in others]
    except (Obstacle, ValueError):
        return None
    return float(value.reshape(-1)[0]) if value.size == 1 else None


def _clip(graph, node):
    """(low, high) of a Clip with constant bounds, or None."""
    a = attributes(node)
    bounds = [a.get("min", -np.inf), a.get("max", np.inf)]
    try:
        for k, name in enumerate(node.input[1:3]):
            if name:
                bounds[k] = float(graph.constant(name, "").reshape(()))
    except Obstacle:
        return None
    return tuple(np.inf if b > 3e38 else -np.inf if b < -3e38 else b for b in bounds)
