"""Folds the batch normalizations of an ONNX model into the layers beside them."""

import os

import numpy as np
import onnx
from onnx import numpy_helper

from ..folding import at_inference
from .activations import activation_after
from .compare import difference, draw
from .graph import Graph, Obstacle, attributes, infer_shapes, is_inference, label, op_type
from .layers import LAYERS, Affine
from .path import addend, through
from .report import Node, Report

EPSILON = float(np.float32(1e-5))       # ONNX's default, as runtimes have it


def fold(model, *, inputs=None, compare=True):
    """Fold the batch normalizations of an ONNX model into the layers beside them, where outputs stay the same to rounding.

    Layers are Conv, ConvTranspose, Gemm and MatMul, with an Add of a constant or without. A batch normalization is folded into the layer (or
    batch normalization) before it, also past Identity, Transpose, reshapes that keep channels apart, and Pads whose values it would leave as
    they are; else into the layer after it. Arithmetic is float64, rounded once. Subgraphs of If, Loop and Scan are folded, too. A layer
    whose weight another node uses as well gets a copy of its own.

    model : onnx.ModelProto (unchanged), or the path of a file, whose external data are loaded too.
    inputs : {name: array} to compare outputs with; None draws such, of 2 where the first dimension has no number, and 64 for others.
    compare : False does without running either model, by ONNX Runtime (optimizations off) where it is installed, else by onnx.reference.
    Returns (model, report): a new ModelProto with the same inputs, outputs, opsets and metadata, and a Report, which prints what was done
        to each batch normalization or why it was left.
    Raises TypeError for another model, ValueError for inputs that the model doesn't have, and what onnx.load raises.
    """
    loaded = isinstance(model, (str, os.PathLike))
    if not loaded and not isinstance(model, onnx.ModelProto):
        raise TypeError(f"model: expected an onnx.ModelProto or a path, got {type(model).__name__}")
    original = onnx.load(model) if loaded else model
    if inputs is not None:
        _check_inputs(original, inputs)
    if compare or not loaded:
        model = onnx.ModelProto()
        model.CopyFrom(original)
    else:       # nobody else has it, and it may be large
        model = original
    graph = Graph(model.graph, infer_shapes(model), model)
    copies = []
    nodes = _fold_graph(graph, copies)
    graph.clean()
    report = Report([*nodes, *_in_functions(model)], copies)
    if compare:
        try:
            report.difference, runner = difference(original, model, draw(original) if inputs is None else inputs)
            report.compared = f"by {runner} on {'drawn' if inputs is None else 'the given'} inputs"
        except Exception as error:      # whatever keeps a model from running, such as drawn inputs that it has no use for
            if inputs is not None:
                raise
            what, *_ = str(error).splitlines() or [""]
            report.compared = f"not compared, as it doesn't run on drawn inputs: {type(error).__name__}: {what}"
    return model, report


def _check_inputs(model, inputs):
    initialized = {t.name for t in model.graph.initializer}
    known = {v.name for v in model.graph.input}
    if known - initialized - set(inputs) or set(inputs) - known:
        raise ValueError(f"inputs: expected values for {sorted(known - initialized)}, got them for {sorted(inputs)}")


def _in_functions(model):
    for f in model.functions:
        yield from (Node(_name(node), reason=f"it is in the function {f.name!r} (onnx.inliner.inline_local_functions opens it)")
                    for node in f.node if op_type(node) == "BatchNormalization")


def _name(node):
    return node.name or node.output[0]


def _fold_graph(graph, copies):
    """The Nodes of a graph's batch normalizations, and those of its subgraphs, after folding them."""
    layers, entries = {}, []
    for i, node in enumerate(graph.nodes):
        if op_type(node) == "BatchNormalization":
            entry = Node(_name(node))
            entries.append((i, node.output[0], entry))
            _attempt(graph, layers, i, entry, _into_before, "before")
    for i, _, entry in entries:
        if not entry.into:
            _attempt(graph, layers, i, entry, _into_after, "after")
    _finish(graph, layers, copies)
    graph.write()
    for _, output, entry in entries:
        entry.activation = activation_after(graph, output)
    return [entry for *_, entry in entries] + [node for inner in graph.inner for node in _fold_graph(inner, copies)]


def _attempt(graph, layers, i, entry, into, where):
    try:
        affine = _affine(graph, layers, i, entry)
    except Obstacle as obstacle:
        entry.reason = str(obstacle)
        return
    try:
        entry.into = f"{into(graph, layers, i, affine).label}, {where} it"
        entry.reason = None
    except (Obstacle, ValueError, TypeError) as obstacle:       # the latter two of fold_conv and fold_linear, for shapes that don't fit
        entry.reason = f"{entry.reason}; {where} it: {obstacle}" if entry.reason else f"{where} it: {obstacle}"


def _affine(graph, layers, i, entry):
    """The batch normalization at i as an Affine; entry learns of its scale."""
    node, a = graph.nodes[i], attributes(graph.nodes[i])
    if not is_inference(node, graph.version):
        raise Obstacle("it is in training mode: it normalizes by each batch" + " (its is_test is 0)" * (graph.version < 7))
    parameters = zip(node.input[1:], ("scale", "bias", "mean", "variance"), strict=True)
    weight, bias, mean, var = (graph.constant(name, f"its {what}") for name, what in parameters)
    if i in layers:
        weight, bias = layers[i].weight, layers[i].bias
    if not mean.size:
        raise Obstacle("it has no channels")
    eps = a.get("epsilon", EPSILON)
    if graph.version < 9 and not a.get("spatial", 1) and mean.ndim > 1:
        raise Obstacle("it has statistics for each element (spatial=0), not for each channel")
    try:
        affine = Affine(*at_inference((mean, var, weight, bias, eps), mean.size, ""))
    except ValueError as error:
        raise Obstacle(str(error).strip()) from None
    entry.change = float(abs(affine.scale - 1).max(initial=0))
    entry.quiet = np.flatnonzero(var.astype(np.float64) < eps).tolist()
    return affine


def _into_before(graph, layers, i, affine):
    """Fold the batch normalization at i into the layer before it, and return that."""
    value, axis, added = graph.nodes[i].input[0], 1, []
    while value in graph.makers:
        k = graph.makers[value]
        node = graph.nodes[k]
        if op_type(node) in LAYERS:
            graph.only_user(value, label(node))
            layer = layers[k] if k in layers else LAYERS[op_type(node)](graph, k)
            if layer.axis != axis:
                raise Obstacle(f"the channels of {label(node)} are along another axis")
            layer.take(affine, before=False)
            layers[k] = layer
            for j, source in added:
                graph.remove_after(j, source)
            graph.remove_after(i, graph.nodes[i].input[0])
            return layer
        if op_type(node) == "Add":
            source, constant = addend(graph, node, axis, len(affine.mean))
            affine = affine._replace(mean=affine.mean - constant)
            added.insert(0, (k, source))
        else:
            axis, affine = through(graph, node, axis, affine, back=True)
            source = node.input[0]
        graph.only_user(value, label(node))
        value = source
    origin = "an input" if value in graph.inputs else "a constant" if value in graph.initializers else "from outside its subgraph"
    raise Obstacle(f"no layer, but {value!r}, {origin}")


def _into_after(graph, layers, i, affine):
    """Fold the batch normalization at i into the layer after it, and return that."""
    value, axis, what = graph.nodes[i].output[0], 1, label(graph.nodes[i])
    while True:
        k = graph.only_user(value, what)
        node = graph.nodes[k]
        if node.input[0] != value:
            raise Obstacle(f"{label(node)} takes it as another input than the first")
        if op_type(node) in LAYERS and op_type(node) != "BatchNormalization":
            layer = layers[k] if k in layers else LAYERS[op_type(node)](graph, k)
            if layer.input_axis != axis:
                raise Obstacle(f"the input channels of {label(node)} are along another axis")
            layer.take(affine, before=True)
            layers[k] = layer
            graph.remove_before(i)
            return layer
        axis, affine = through(graph, node, axis, affine, back=False)
        value, what = node.output[0], label(node)


def _finish(graph, layers, copies):
    """Make the initializers of the folded layers: under the old name where nothing else uses it, and one for layers that share equal ones."""
    slots = {}      # {name of an initializer: (layer, number of its input) for each folded layer that used it}
    for layer in layers.values():
        for k in layer.inputs:
            if k < len(layer.node.input) and layer.node.input[k]:
                slots.setdefault(layer.node.input[k], []).append((layer, k))
    made = {}       # {old name: [(array, new name)]}
    for layer in layers.values():
        names = {}
        for k, array in layer.arrays().items():
            old = layer.node.input[k] if k < len(layer.node.input) else ""
            known = made.setdefault(old, []) if old else []
            same = (name for a, name in known if (a.dtype, a.shape, a.tobytes()) == (array.dtype, array.shape, array.tobytes()))
            names[k] = next(same, None)
            if names[k] is None:
                names[k] = _initializer(graph, layer, k, old, array, slots, known, copies)
                known.append((array, names[k]))
        layer.finish(names)


def _initializer(graph, layer, k, old, array, slots, known, copies):
    """The name of an initializer of this value: the old one, replaced, where only folded layers used it and its shape stays; or a new one."""
    tensor = numpy_helper.from_array(array)
    others = sorted(graph.users.get(old, [])) != sorted(other.i for other, _ in slots.get(old, []))
    kept = graph.initializers.get(old)
    if kept and not known and not others and (kept.dims, kept.data_type) == (tensor.dims, tensor.data_type):
        tensor.name, tensor.doc_string = old, kept.doc_string
        kept.CopyFrom(tensor)
        return old
    tensor.name = graph.fresh(f"{old}_folded" if old else f"{layer.node.name or layer.node.output[0]}_bias")
    graph.proto.initializer.append(tensor)
    if graph.outer is None and graph.ir_version < 4:
        graph.proto.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    if k == layer.weight_input and (known or others):
        copies.append(f"{layer.label} has a weight of its own now, {array.nbytes} bytes, as others use {old!r} too")
    return tensor.name
