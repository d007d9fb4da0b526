"""A graph of an ONNX model as folding sees it: which node makes a value, which use it, which values are constant, and what shapes they have."""

import math

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

OUTPUT = -1     # among the users of a value: the graph's outputs
CONSTANT = ("Constant", "ConstantOfShape", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose")    # where their inputs are
OF_SHAPE = ("Shape", "Size")    # use nothing of a value but its shape


class Obstacle(Exception):
    """Why something can't be folded, in words for the report."""


def op_type(node):
    """The operator's name, with its domain where that is not ONNX's own."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def label(node):
    return f"{op_type(node)} {node.name or next(filter(None, node.output), '')!r}"


def attributes(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}


def subgraphs(node):
    for a in node.attribute:
        if a.type == onnx.AttributeProto.GRAPH:
            yield a.g
        elif a.type == onnx.AttributeProto.GRAPHS:
            yield from a.graphs


def opset_of(versions):
    """The version of ONNX's own operators among {domain: version}."""
    return versions.get("", versions.get("ai.onnx", 1))


def is_inference(node, version):
    """Whether a BatchNormalization normalizes by the statistics that are its inputs, in the opset of that version."""
    a = attributes(node)
    if version >= 14:
        return not a.get("training_mode", 0)
    if version >= 7:
        return not any(node.output[1:])
    return bool(a.get("is_test", 0))


def used_outside(graph):
    """Names that a subgraph takes from the graphs around it, with repetitions."""
    own = {v.name for v in graph.input} | {t.name for t in graph.initializer} | {name for node in graph.node for name in node.output}
    for node in graph.node:
        yield from (name for name in inputs(node) if name not in own)
    yield from (v.name for v in graph.output if v.name not in own)


def inputs(node):
    """Names of all values that a node reads, with repetitions, its subgraphs included."""
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        yield from used_outside(graph)


def infer_shapes(model):
    """The graph with all shapes that onnx can infer. Large initializers become inputs for it, as it takes no message of more than 2 GB."""
    graph = onnx.GraphProto(name=model.graph.name, node=model.graph.node, output=model.graph.output, value_info=model.graph.value_info)
    known = {v.name for v in model.graph.input}
    graph.input.extend(model.graph.input)
    for t in model.graph.initializer:
        if math.prod(t.dims) <= 1024 and not onnx.external_data_helper.uses_external_data(t):
            graph.initializer.add().CopyFrom(t)
        elif t.name not in known:
            graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims))
    copy = onnx.ModelProto(ir_version=max(model.ir_version, 4), graph=graph, opset_import=model.opset_import, functions=model.functions)
    try:
        return onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except Exception:    # of any kind, such as for an operator whose inputs don't fit: shapes are then what the model says
        return graph


def shapes_of(graph):
    """{name: list of dimensions}, each a number, a name, or None where it's unknown."""
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    for v in (*graph.value_info, *graph.input, *graph.output):
        if v.type.HasField("tensor_type") and v.type.tensor_type.HasField("shape"):
            dims = v.type.tensor_type.shape.dim
            shapes[v.name] = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None for d in dims]
    return shapes


class Graph:
    """One graph, proto, within the graph `outer`, or the model's own.

    nodes : list of its NodeProtos; removed ones are None. Nodes are known by their index there.
    makers : {value: index of the node that makes it}
    users : {value: indices of the nodes that use it, once for each use, and OUTPUT}
    shapes : {value: dimensions}
    added : {index: node that is to follow that one}
    """

    def __init__(self, proto, inferred, model, outer=None):
        self.proto, self.outer = proto, outer
        self.version, self.ir_version = opset_of({i.domain: i.version for i in model.opset_import}), model.ir_version
        self.names = set() if outer is None else outer.names       # all that are taken, of the whole model
        self.shapes = shapes_of(inferred)
        self.added, self.constant_makers = {}, set()
        self.index()
        self.inner = [Graph(g, i, model, self) for node, n in zip(proto.node, inferred.node, strict=True)
                      for g, i in zip(subgraphs(node), subgraphs(n), strict=True)]

    def index(self):
        """Look at proto anew."""
        self.nodes = list(self.proto.node)
        self.initializers = {t.name: t for t in self.proto.initializer}
        self.inputs = {v.name for v in self.proto.input}
        self.makers = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.users = {}
        for i, node in enumerate(self.nodes):
            for name in inputs(node):
                self.users.setdefault(name, []).append(i)
        for v in self.proto.output:
            self.users.setdefault(v.name, []).append(OUTPUT)
        self.names |= {*self.makers, *self.users, *self.initializers, *self.inputs, *(node.name for node in self.nodes)}

    def fresh(self, name):
        """A name like this one that nothing has."""
        number = 2
        new = name
        while new in self.names:
            new, number = f"{name}_{number}", number + 1
        self.names.add(new)
        return new

    def shape(self, name):
        return self.shapes.get(name) or (self.outer.shape(name) if self.outer else None)

    def constant(self, name, what):
        """The value of `what` as an array. Raises Obstacle where it's none that is known."""
        if name in self.initializers:
            tensor = self.initializers[name]
            if name in self.inputs and self.ir_version >= 4:      # before, all initializers had to be inputs, which no runtime overrides
                raise Obstacle(f"{what} ({name}) is an input with a default, which a caller may override (take it off graph.input to fold)")
            if onnx.external_data_helper.uses_external_data(tensor):
                raise Obstacle(f"{what} ({name}) is in a file that was not loaded")
            return numpy_helper.to_array(tensor)
        if name in self.makers:
            node = self.nodes[self.makers[name]]
            if op_type(node) not in CONSTANT:
                raise Obstacle(f"{what} ({name}) is not constant, but made by {label(node)}")
            values = [self.constant(i, what) if i else None for i in node.input]
            self.constant_makers.add(name)
            feed = {i: v for i, v in zip(node.input, values, strict=True) if i}
            graph = onnx.GraphProto(node=[node], input=[onnx.ValueInfoProto(name=i) for i in feed], output=[onnx.ValueInfoProto(name=name)])
            graph.node[0].domain = ""
            return np.asarray(ReferenceEvaluator(graph, opsets={"": self.version}).run(None, feed)[0])
        if self.outer and name not in self.inputs:
            return self.outer.constant(name, what)
        raise Obstacle(f"{what} ({name}) is an input, not constant")

    def only_user(self, name, what):
        """The index of the one node that uses a value, but for its shape. Raises Obstacle where there are more, or none."""
        users = [i for i in self.users.get(name, ()) if i == OUTPUT or op_type(self.nodes[i]) not in OF_SHAPE]
        if OUTPUT in users:
            raise Obstacle(f"the output of {what} is an output of the graph{', too' * (len(users) > 1)}")
        if len(users) > 1:
            raise Obstacle(f"the output of {what} is used by {' and '.join(sorted({label(self.nodes[i]) for i in users}))}")
        if not users or name not in self.nodes[users[0]].input:
            raise Obstacle(f"the output of {what} is used in a subgraph" if users else f"the output of {what} is not used")
        return users[0]

    def remove_after(self, i, name):
        """Take out node i, the only user of its input of that name, whose maker now makes the node's output."""
        node = self._take(i)
        maker = self.makers.pop(name)
        outputs = self.nodes[maker].output
        outputs[list(outputs).index(name)] = node.output[0]
        self.makers[node.output[0]] = maker
        self._redirect(name, node.output[0])

    def remove_before(self, i):
        """Take out node i, whose output has one user, which now uses the node's first input."""
        node = self._take(i)
        del self.makers[node.output[0]]
        self._redirect(node.output[0], node.input[0])

    def _redirect(self, old, new):
        """Have the users of a value use another."""
        users = self.users.pop(old)
        for user in users:
            names = self.nodes[user].input
            names[list(names).index(old)] = new
        self.users.setdefault(new, []).extend(users)

    def _take(self, i):
        node, self.nodes[i] = self.nodes[i], None
        for name in inputs(node):
            self.users[name].remove(i)
        return node

    def write(self):
        """Bring proto up to date with nodes and added."""
        for i in reversed(range(len(self.nodes))):
            if i in self.added:
                self.proto.node.insert(i + 1, self.added[i])
            if self.nodes[i] is None:
                del self.proto.node[i]
        self.added.clear()
        self.index()

    def clean(self):
        """Remove what is not used any more: initializers, nodes that made constants, and what was known of such values."""
        for inner in self.inner:
            inner.clean()
        self.index()
        while idle := {self.makers[name] for name in self.constant_makers & {*self.makers} if not self.users.get(name)}:
            for i in sorted(idle, reverse=True):
                del self.proto.node[i]
            self.index()
        inputs_kept = self.inputs if self.ir_version >= 4 else ()
        idle = {name for name in self.initializers if name not in inputs_kept and not self.users.get(name)}
        gone = {v.name for v in self.proto.value_info} - {*self.makers, *self.inputs, *self.initializers}
        for field, names in (self.proto.initializer, idle), (self.proto.input, idle), (self.proto.value_info, idle | gone):
            for i in reversed(range(len(field))):
                if field[i].name in names:
                    del field[i]
        self.index()
