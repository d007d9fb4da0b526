"""Recognizes the activation that follows a value of an ONNX graph, also in the pieces in which exporters write hard-swish and swish."""

import numpy as np

from .graph import OUTPUT, Obstacle, attributes, op_type

SIMPLE = {"Relu": "relu", "Sigmoid": "sigmoid", "HardSwish": "hard_swish"}


def activation_after(graph, name):
    """In the words of cbn's `activation=`, or None where none follows that cbn has."""
    users = sorted(set(graph.users.get(name, ())))
    if not users or OUTPUT in users or len(users) > 2:
        return None
    first, *second = [graph.nodes[i] for i in users]
    return _gated(graph, name, first, *second) if second else _of_one(graph, first)


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
    """What x times a gate of x is: x * sigmoid(x), x * hardsigmoid(x), or x * clip(x + 3, 0, 6) / 6 with the division anywhere."""
    if op_type(product) != "Mul" or list(product.input).count(name) != 1:
        return None
    kind, a, after = op_type(gate), attributes(gate), _next(graph, gate.output[0])
    if kind == "Sigmoid" and after is product:
        return "silu"
    if kind == "HardSigmoid" and after is product:
        return "hard_swish" if _is_sixth(a.get("alpha", 0.2)) and a.get("beta", 0.5) == 0.5 else None
    if kind != "Add" or _constant(graph, gate, name) != 3 or after is None or op_type(after) != "Clip" or _clip(graph, after) != (0, 6):
        return None
    value, factor = after.output[0], 1.0
    if _next(graph, value) is not product:
        factor, value = _scaling(graph, value)
    if _next(graph, value) is not product:
        return None
    if factor == 1.0:
        factor, _ = _scaling(graph, product.output[0])
    return "hard_swish" if _is_sixth(factor) else None


def _is_sixth(number):
    """As float16 has it, too."""
    return abs(number - 1 / 6) < 1e-3


def _next(graph, name):
    """The only user of a value, or None."""
    users = graph.users.get(name, [])
    return graph.nodes[users[0]] if len(users) == 1 and users[0] != OUTPUT else None


def _scaling(graph, name):
    """(factor, output) of the node that multiplies or divides a value by a constant; (0, None) where another or none follows."""
    node = _next(graph, name)
    c = _constant(graph, node, name) if node is not None and op_type(node) in ("Mul", "Div") else None
    if c and op_type(node) == "Mul":
        return c, node.output[0]
    if c and node.input[0] == name:
        return 1 / c, node.output[0]
    return 0.0, None


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
