"""The layers of an ONNX graph that can take over a batch normalization, each with its weight and bias in float64 until all has been folded."""

from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx

from ..folding import fold_conv, fold_linear, rounded
from .graph import Obstacle, attributes, is_inference, label, op_type


class Affine(NamedTuple):
    """A batch normalization at inference, (x - mean) * scale + bias, as float64 arrays, one value a channel."""

    scale: np.ndarray
    mean: np.ndarray
    bias: np.ndarray

    def repeat(self, times):
        return Affine(*(np.repeat(a, times) for a in self))

    def as_bn(self):
        return self.mean, np.ones_like(self.mean), self.scale, self.bias, 0.0


class Layer:
    """Node i of a graph as a layer. Raises Obstacle where its weight or bias is not constant.

    weight, bias : float64 arrays; bias may be None.
    axis, input_axis : where its output and its input have their channels.
    inputs : the numbers of the node's inputs that are initializers of its own.
    """

    inputs = weight_input, bias_input = 1, 2

    def __init__(self, graph, i):
        self.graph, self.i, self.node, self.label = graph, i, graph.nodes[i], label(graph.nodes[i])
        self.attributes = attributes(self.node)
        self.weight = self._constant(self.weight_input, "weight")
        self.bias = self._constant(self.bias_input, "bias") if self._has(self.bias_input) else None
        self.dtype = self.weight.dtype
        if self.dtype.kind != "f" and self.dtype.name != "bfloat16":
            raise Obstacle(f"the weight of {self.label} is of type {self.dtype}")
        self.weight = self.weight.astype(np.float64)
        self.read()

    def read(self):
        """What the kind of layer has besides."""

    def _has(self, k):
        return len(self.node.input) > k and self.node.input[k] != ""

    def _constant(self, k, what):
        return self.graph.constant(self.node.input[k], f"the {what} of {self.label}")

    def take(self, affine, before):
        """Take over a batch normalization after the layer, or before it. Raises Obstacle, and leaves the layer as it was, where it can't."""
        folded, info = self.folded(affine, before), ml_dtypes.finfo(self.dtype)
        for array in folded[:2]:
            if not (abs(array) <= float(info.max)).all():
                raise Obstacle(f"the folded {self.label} overflows {self.dtype}, or isn't finite")
        if 0 < abs(folded[0]).max(initial=0) < float(info.tiny):
            raise Obstacle(f"the folded weights of {self.label} are too small for {self.dtype}")
        self.weight, self.bias = folded[:2]

    def arrays(self):
        """{number of the input: array} as the node is to have them, rounded."""
        return {self.weight_input: rounded(self.weight, self.dtype), self.bias_input: rounded(self.bias, self.dtype)}

    def finish(self, names):
        """Have the node use initializers of these names: {number of the input: name}."""
        while len(self.node.input) <= max(names):
            self.node.input.append("")
        for k, name in names.items():
            self.node.input[k] = name


class Convolution(Layer):
    axis = input_axis = 1

    def folded(self, affine, before):
        transposed, shift = op_type(self.node) == "ConvTranspose", affine.bias - affine.mean * affine.scale
        if before and shift.any():
            if transposed:
                raise Obstacle(f"{self.label} is transposed: each of its outputs would be shifted by another part of its kernel")
            same = self.attributes.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER") and max(self.weight.shape[2:]) > 1
            if same or any(self.attributes.get("pads", ())):
                raise Obstacle(f"{self.label} pads with zeros, which would be shifted, too")
        groups = self.attributes.get("group", 1)
        return fold_conv(self.weight, self.bias, affine.as_bn(), groups=groups, transposed=transposed, before=before, padding=0)


class Gemm(Layer):
    axis = 1

    def read(self):
        """alpha and beta go into the weight and the bias."""
        self.input_axis = 0 if self.attributes.get("transA", 0) else 1
        self.order = "torch" if self.attributes.get("transB", 0) else "tensorflow"
        out = self.weight.shape[self.order == "tensorflow"]
        if self.bias is not None:
            if self.bias.size > 1 and self.bias.shape not in ((out,), (1, out)):
                raise Obstacle(f"the bias of {self.label} is of shape {self.bias.shape}, not one value for each of {out} outputs")
            self.bias = np.broadcast_to(self.bias.astype(np.float64).reshape(-1), out) * self.attributes.get("beta", 1.0)
        self.weight = self.weight * self.attributes.get("alpha", 1.0)

    def folded(self, affine, before):
        return fold_linear(self.weight, self.bias, affine.as_bn(), order=self.order, before=before)

    def finish(self, names):
        super().finish(names)
        kept = [a for a in self.node.attribute if a.name not in ("alpha", "beta", "broadcast")]
        del self.node.attribute[:]
        self.node.attribute.extend(kept)
        if self.graph.version < 7:
            self.node.attribute.append(onnx.helper.make_attribute("broadcast", 1))


class MatMul(Layer):
    """A matrix that is multiplied from the right; its bias becomes an Add of its own."""

    inputs = (1,)

    def read(self):
        if self.weight.ndim != 2:
            raise Obstacle(f"the weight of {self.label} has {self.weight.ndim} dimensions, not 2")
        shape = self.graph.shape(self.node.input[0])
        if shape is None or len(shape) < 2:
            raise Obstacle(f"nothing says how many dimensions the input of {self.label} has")
        self.axis = self.input_axis = len(shape) - 1

    def folded(self, affine, before):
        return fold_linear(self.weight, self.bias, affine.as_bn(), order="tensorflow", before=before)

    def arrays(self):
        arrays = super().arrays()
        if not self.bias.any():
            del arrays[self.bias_input]
        return arrays

    def finish(self, names):
        bias = names.pop(self.bias_input, None)
        super().finish(names)
        if bias:
            output, product = self.node.output[0], self.graph.fresh(f"{self.node.output[0]}_product")
            old = {"broadcast": 1} if self.graph.version < 7 else {}
            self.node.output[0] = product
            name = self.graph.fresh(f"{self.node.name}_bias") if self.node.name else ""
            self.graph.added[self.i] = onnx.helper.make_node("Add", [product, bias], [output], name=name, **old)


class Normalization(Layer):
    """A batch normalization that takes over the next."""

    axis = input_axis = 1

    def read(self):
        if not is_inference(self.node, self.graph.version):
            raise Obstacle(f"{self.label} is in training mode")
        if self.weight.ndim != 1:
            raise Obstacle(f"{self.label} has a weight of shape {self.weight.shape}")

    def folded(self, affine, before):
        return self.weight * affine.scale, (self.bias - affine.mean) * affine.scale + affine.bias


LAYERS = {"Conv": Convolution, "ConvTranspose": Convolution, "Gemm": Gemm, "MatMul": MatMul, "BatchNormalization": Normalization}
