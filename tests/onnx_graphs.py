"""Draws ONNX graphs with batch normalizations, and knows of each whether folding may take it."""

import numpy as np
from onnx import helper, numpy_helper

ACTIVATIONS = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSwish", "swish", "hard_swish_pieces", "Tanh")


class Builder:
    """Nodes and constants of a graph as they come; names are given."""

    def __init__(self, rng, dtype=np.float32, opset=17, constant_nodes=False):
        self.rng, self.dtype, self.opset, self.constant_nodes = rng, np.dtype(dtype), opset, constant_nodes
        self.nodes, self.initializers, self.inputs, self.outputs, self.number = [], [], [], [], 0
        self.folds = {}     # {name of a batch normalization: whether it is to be folded}

    def name(self, kind):
        self.number += 1
        return f"{kind}{self.number}"

    def input(self, shape, dtype=None):
        name = self.name("x")
        self.inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype)), shape))
        return name

    def output(self, name, rank):
        self.outputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.dtype), [None] * rank))

    def constant(self, array, dtype=None):
        name = self.name("c")
        tensor = numpy_helper.from_array(np.ascontiguousarray(np.asarray(array), dtype or self.dtype), name)
        if self.constant_nodes and self.rng.random() < 0.5:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def normal(self, shape, scale=1.0):
        return self.constant(self.rng.normal(0, scale, shape))

    def node(self, kind, *inputs, outputs=1, **attributes):
        names = [self.name("v") for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=self.name(kind), **attributes))
        return names[0] if outputs == 1 else names

    def bn(self, x, channels, folds=True, shift=True, parameters=None, **attributes):
        """A batch normalization, of which folding is known to be possible or not. parameters : names, instead of drawn ones."""
        rng = self.rng
        mean, bias = (rng.normal(0, shift, channels) for _ in range(2))
        parameters = parameters or [self.constant(a) for a in (rng.uniform(0.5, 1.5, channels), bias, mean, rng.uniform(0.5, 2, channels))]
        y = self.node("BatchNormalization", x, *parameters, epsilon=float(rng.choice([1e-5, 1e-3])), **attributes)
        self.folds[self.nodes[-1].name] = folds
        return y

    def activation(self, x, kind=None):
        kind = kind or self.rng.choice([a for a in ACTIVATIONS if a != "HardSwish" or self.opset >= 14])
        c = lambda value: self.constant(np.float64(value))
        if kind == "swish":
            return self.node("Mul", x, self.node("Sigmoid", x))
        if kind == "hard_swish_pieces":
            gate = self.node("Clip", self.node("Add", x, c(3)), c(0), c(6))
            if self.rng.random() < 0.5:
                return self.node("Div", self.node("Mul", x, gate), c(6))
            return self.node("Mul", x, self.node("Mul", gate, c(1 / 6)))
        return self.node("Clip", x, c(-1), c(2)) if kind == "Clip" else self.node(kind, x)

    def model(self, **fields):
        graph = helper.make_graph(self.nodes, "drawn", self.inputs, self.outputs, self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8, **fields)


class Drawn(Builder):
    """A graph of some blocks on an input of 1 to 3 dimensions in space."""

    def draw(self):
        rng = self.rng
        self.space = int(rng.choice([1, 2, 2, 2, 3]))
        self.channels = int(rng.choice([4, 6, 8]))
        sizes = [int(n) for n in rng.integers(7, 10, self.space)]
        self.size = min(sizes)      # the least in space
        x = self.input([2, self.channels, *sizes])
        blocks = [self.after, self.after_transposed, self.behind_activation, self.before, self.before_padded, self.used_twice, self.shared,
                  self.in_a_row, self.residual, self.not_constant, self.also_an_output, self.behind_pad, self.behind_reshape, self.bare]
        for _ in range(int(rng.integers(1, 5))):
            x = rng.choice(blocks)(x)
        x = self.node("GlobalAveragePool", x)
        x = self.node("Reshape", x, self.constant([-1, self.channels], np.int64))
        x = rng.choice([self.gemm, self.matmul, self.before_gemm])(x)
        self.output(x, 2)
        return self.model()

    def conv(self, x, padded=None, transposed=False):
        """A convolution of any kind."""
        rng, c = self.rng, self.channels
        groups = int(rng.choice([1, 1, 2, c]))
        out = groups * int(rng.choice([1, 2])) if groups > 1 else int(rng.choice([4, 6]))
        kernel = int(rng.choice([1, 3])) if self.size >= 5 else 1
        padded = bool(rng.integers(2)) if padded is None else padded
        stride = int(rng.choice([1, 2])) if self.size >= 6 or transposed and self.size <= 4 else 1
        attributes = {"group": groups, "kernel_shape": [kernel] * self.space, "strides": [stride] * self.space}
        if padded and kernel > 1:
            attributes |= {"auto_pad": str(rng.choice(["SAME_UPPER", "SAME_LOWER"]))} if rng.random() < 0.3 else {"pads": [1] * 2 * self.space}
        elif rng.random() < 0.3:
            attributes |= {"auto_pad": "VALID"} if not transposed else {"output_padding": [stride - 1] * self.space}
        elif self.size >= 7 and rng.random() < 0.3:
            attributes["dilations"] = [2] * self.space
        shape = (c, out // groups) if transposed else (out, c // groups)
        fan = shape[0 if transposed else 1] * kernel**self.space
        weight = self.normal((*shape, *[kernel] * self.space), fan**-0.5)
        bias = [self.normal(out)] if rng.random() < 0.5 else []
        self.channels, self.last = out, (weight, bias, attributes)
        reach = (kernel - 1) * attributes.get("dilations", [1])[0]
        self.size = (self.size - 1) * stride + reach + 1 if transposed else (self.size - (0 if padded else reach) - 1) // stride + 1
        return self.node("ConvTranspose" if transposed else "Conv", x, weight, *bias, **attributes)

    def after(self, x):
        return self.maybe_activation(self.bn(self.maybe_identity(self.conv(x)), self.channels))

    def after_transposed(self, x):
        return self.maybe_activation(self.bn(self.maybe_identity(self.conv(x, padded=False, transposed=True)), self.channels))

    def maybe_activation(self, x):
        return self.activation(x) if self.rng.random() < 0.7 else self.node("Tanh", x)

    def maybe_identity(self, x):
        return self.node("Identity", x) if self.rng.random() < 0.2 else x

    def behind_activation(self, x):
        return self.activation(self.bn(self.activation(self.conv(x)), self.channels, folds=False))

    def before(self, x):
        x = self.bn(self.node("Tanh", x), self.channels)
        return self.activation(self.conv(self.maybe_identity(x), padded=False))

    def before_padded(self, x):
        """A batch normalization that shifts nothing is folded into the layer after it, whatever the padding."""
        shift = bool(self.rng.integers(2))
        x = self.bn(self.node("Tanh", x), self.channels, shift=shift)
        name = self.nodes[-1].name
        x = self.conv(x, padded=True)
        self.folds[name] = not shift or self.last[2]["kernel_shape"][0] == 1
        return self.activation(x)

    def used_twice(self, x):
        y = self.conv(x)
        return self.node("Add", self.activation(self.bn(y, self.channels, folds=False)), self.activation(y))

    def shared(self, x):
        """Two convolutions of the same weight: one normalized, the other not, or normalized too, in the same way or another."""
        y = self.conv(x)
        weight, bias, attributes = self.last
        other = self.node("Conv", self.node("Tanh", x), weight, *bias, **attributes)
        y = self.bn(y, self.channels)
        kind = self.rng.integers(3)
        if kind == 1:
            other = self.bn(other, self.channels)
        elif kind == 2:
            other = self.bn(other, self.channels, parameters=list(self.nodes[-1].input)[1:])
        return self.node("Add", self.activation(y), self.activation(other))

    def in_a_row(self, x):
        x = self.conv(x)
        for _ in range(self.rng.integers(2, 4)):
            x = self.bn(x, self.channels)
        return self.activation(x)

    def residual(self, x):
        c = self.channels
        y = self.node("Conv", x, self.normal((c, c, *[1] * self.space), c**-0.5))
        return self.activation(self.node("Add", x, self.bn(y, c)))

    def not_constant(self, x):
        """A weight that is made of an input."""
        c = self.channels
        weight = self.node("Mul", self.normal((c, c, *[1] * self.space), c**-0.5), self.input([]))
        return self.activation(self.bn(self.node("Conv", x, weight), c, folds=False))

    def also_an_output(self, x):
        y = self.conv(x)
        self.output(y, 2 + self.space)
        return self.activation(self.bn(y, self.channels, folds=False))

    def behind_pad(self, x):
        mode = self.rng.choice(["constant", "reflect", "edge"])
        pads = [0, 0, *self.rng.integers(0, 2, self.space)] * 2
        y = self.node("Pad", self.conv(x), self.constant(pads, np.int64), mode=str(mode))
        return self.activation(self.bn(y, self.channels, folds=mode != "constant" or not any(pads)))

    def behind_reshape(self, x):
        """(N, C, ...) to (N, C, -1), or to (N, C/2, -1), of which each channel is two of the layer's."""
        y = self.conv(x)
        parts = int(self.rng.choice([1, 2])) if self.channels % 2 == 0 else 1
        before = self.node("Shape", y)
        y = self.node("Reshape", y, self.constant([0, self.channels // parts, -1], np.int64))
        y = self.bn(y, self.channels // parts)
        return self.activation(self.node("Reshape", y, before))

    def bare(self, x):
        return self.activation(self.bn(self.activation(x), self.channels, folds=False))

    def gemm(self, x, normalize=True):
        rng, c, out = self.rng, self.channels, 5
        transposed = int(rng.integers(2))
        weight = self.normal((out, c) if transposed else (c, out), c**-0.5)
        bias = [self.constant(rng.normal(0, 1, [(out,), (1, out), (1,), ()][rng.integers(4)]))] if rng.random() < 0.7 else []
        attributes = {"alpha": float(rng.choice([1, 0.5])), "beta": float(rng.choice([1, 2]))} if rng.random() < 0.5 else {}
        y = self.node("Gemm", x, weight, *bias, transB=transposed, **attributes)
        return self.bn(y, out) if normalize else y

    def matmul(self, x):
        y = self.node("MatMul", x, self.normal((self.channels, 5), self.channels**-0.5))
        if self.rng.random() < 0.6:
            pair = [y, self.constant(self.rng.normal(0, 1, [(5,), (1, 5), ()][self.rng.integers(3)]))]
            y = self.node("Add", *pair[::self.rng.choice([1, -1])])
        return self.bn(y, 5)

    def before_gemm(self, x):
        return self.gemm(self.bn(self.activation(x), self.channels), normalize=False)


class Paths(Builder):
    """A layer and a batch normalization, in either order, with nodes between them that move, add or pad. All dimensions are alike, so that one
    that is taken for another is not noticed by its size. What may be folded is not known: outputs tell."""

    def draw(self):
        rng = self.rng
        rank = int(rng.choice([2, 3, 4]))
        self.shape = [4] * rank
        x = self.input(self.shape)
        if rng.random() < 0.6:
            x = self.normalization(self.between(self.layer(x)))
        else:
            x = self.layer(self.between(self.normalization(x)))
        self.output(x, len(self.shape))
        return self.model()

    def layer(self, x):
        rank, channels = len(self.shape), self.shape
        kinds = ["MatMul"] + ["Gemm", "Gemm"] * (rank == 2) + ["Conv", "ConvTranspose", "Conv"] * (rank > 2)
        kind = str(self.rng.choice(kinds))
        c, bias = channels[1] if kind.startswith("Conv") else channels[-1], self.rng.random() < 0.5
        weight = self.normal((c, c, *[1] * (rank - 2)) if kind.startswith("Conv") else (c, c))
        flags = {"transA": int(self.shape[0] == c and self.rng.integers(2)), "transB": int(self.rng.integers(2))} if kind == "Gemm" else {}
        return self.node(kind, x, weight, *[self.normal(c)] * (bias and kind != "MatMul"), **flags)

    def normalization(self, x):
        return self.bn(x, self.shape[1], shift=bool(self.rng.random() < 0.8))

    def between(self, x):
        for _ in range(self.rng.integers(0, 4)):
            x = self.rng.choice([self.transposed, self.reshaped, self.padded, self.added, self.expanded])(x)
        return x

    def transposed(self, x):
        order = self.rng.permutation(len(self.shape))
        self.shape = [self.shape[d] for d in order]
        return self.node("Transpose", x, perm=[int(d) for d in order])

    def reshaped(self, x):
        """To factors of the size in any order."""
        rest, shape = int(np.prod(self.shape)), []
        for _ in range(self.rng.integers(1, 4)):
            shape.append(int(self.rng.choice([f for f in (1, 2, 4, 8, 16) if rest % f == 0])))
            rest //= shape[-1]
        shape.append(rest)
        if len(shape) < 2 or shape[1] > 64:
            return x
        self.shape = shape
        return self.node("Reshape", x, self.constant(shape, np.int64))

    def padded(self, x):
        mode, value = str(self.rng.choice(["constant", "edge"])), float(self.rng.choice([0, 1]))
        pads = [[int(n) for n in self.rng.choice([0, 0, 0, 1], len(self.shape))] for _ in range(2)]
        self.shape = [n + a + b for n, a, b in zip(self.shape, *pads, strict=True)]
        return self.node("Pad", x, self.constant([*pads[0], *pads[1]], np.int64), self.constant(value), mode=mode)

    def added(self, x):
        """A constant that spans some of the dimensions, and may have one more."""
        shape = [n if self.rng.random() < 0.3 else 1 for n in self.shape][self.rng.integers(0, len(self.shape)):]
        if self.rng.random() < 0.1:
            shape = [1] * (len(self.shape) + 1)
            self.shape = [1, *self.shape]
        return self.node("Add", *[x, self.normal(shape)][::self.rng.choice([1, -1])])

    def expanded(self, x):
        """One of the dimensions that are 1 grows by what is added."""
        ones = [d for d, n in enumerate(self.shape) if n == 1]
        if not ones:
            return self.node("Identity", x)
        self.shape[self.rng.choice(ones)] = 4
        return self.node("Add", x, self.normal(self.shape))
