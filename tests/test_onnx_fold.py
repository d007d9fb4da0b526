"""cbn.onnx.fold: a model of the same outputs without the batch normalizations that a layer can take over, and why the others are left."""

import os

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="models are read with the package onnx")
import onnx_graphs
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import cbn
import cbn.onnx
from cbn.onnx.__main__ import main


class BatchNormalization(OpRun):
    """The formula: an oracle that is neither cbn nor the evaluator's own."""

    op_domain = ""

    def _run(self, x, scale, bias, mean, var, epsilon=None, **_):
        scale, bias, mean, var = (a.astype(np.float64).reshape(-1, *[1] * (x.ndim - 2)) for a in (scale, bias, mean, var))
        return (((x.astype(np.float64) - mean) / np.sqrt(var + epsilon) * scale + bias).astype(x.dtype),)


class ConvTranspose(OpRun):
    """As the operator's description says; the evaluator's own takes other weights where groups have several channels."""

    op_domain = ""

    def _run(self, x, w, b=None, group=1, strides=None, dilations=None, output_padding=None, **_):
        space = w.ndim - 2
        strides, dilations, more = strides or [1] * space, dilations or [1] * space, output_padding or [0] * space
        reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
        size = [(n - 1) * s + r + m for n, s, r, m in zip(x.shape[2:], strides, reach, more, strict=True)]
        w__gio = w.reshape(group, -1, *w.shape[1:])
        y = np.zeros((len(x), group, w.shape[1], *size), x.dtype)
        for tap in np.ndindex(w.shape[2:]):
            window = tuple(slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilations, x.shape[2:], strides, strict=True))
            y[(..., *window)] += np.einsum("ngi...,gio->ngo...", x.reshape(len(x), group, -1, *x.shape[2:]), w__gio[(..., *tap)])
        y = y.reshape(len(x), -1, *size)
        return (y if b is None else y + b.reshape(-1, *[1] * space),)


def run(model, inputs):
    return ReferenceEvaluator(model, new_ops=[BatchNormalization, ConvTranspose]).run(None, inputs)


def inputs_of(model, rng):
    initialized = {t.name for t in model.graph.initializer}
    return {v.name: rng.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim])
            .astype(helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)) for v in model.graph.input if v.name not in initialized}


def all_nodes(graph):
    for node in graph.node:
        yield node
        for a in node.attribute:
            yield from all_nodes(a.g)


def check(model, folded, report, expected, rng, tolerance):
    """The same outputs; folded what may be, and nothing else; a model in order."""
    onnx.checker.check_model(folded, full_check=True)
    assert {node.name: bool(node.into) for node in report.nodes} == expected
    assert all(bool(node.reason) != bool(node.into) for node in report.nodes)
    nodes = list(all_nodes(folded.graph))
    assert [node.op_type for node in nodes].count("BatchNormalization") == len(report.left)
    assert [v.name for v in folded.graph.output] == [v.name for v in model.graph.output]
    used = {name for node in nodes for name in node.input}
    assert {t.name for t in folded.graph.initializer} <= used
    inputs = inputs_of(model, rng)
    for a, b in zip(run(folded, inputs), run(model, inputs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = a.astype(np.float64), b.astype(np.float64)
        assert abs(a - b).max() <= tolerance * abs(b).max()


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12), (np.float16, 2e-2)])
@pytest.mark.parametrize("seed", range(25))
def test_drawn(seed, dtype, tolerance):
    rng = np.random.default_rng(seed)
    graph = onnx_graphs.Drawn(rng, dtype, opset=int(rng.integers(13, 22)), constant_nodes=bool(seed % 2))
    model = graph.draw()
    before = model.SerializeToString(deterministic=True)
    folded, report = cbn.onnx.fold(model, compare=False)
    assert model.SerializeToString(deterministic=True) == before
    check(model, folded, report, graph.folds, rng, tolerance)


def test_drawn_paths():
    """Between layer and normalization: outputs stay the same, whatever moves, adds or pads there; a quarter can be folded."""
    folded_at_all = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        model = onnx_graphs.Paths(rng, np.float64).draw()
        folded, report = cbn.onnx.fold(model, compare=False)
        onnx.checker.check_model(folded, full_check=True)
        inputs = inputs_of(model, rng)
        (a,), (b,) = run(folded, inputs), run(model, inputs)
        assert a.shape == b.shape and abs(a - b).max() <= 1e-12 * abs(b).max(), seed
        folded_at_all += len(report.folded)
    assert folded_at_all > 75


def built(make, folds, rng=None, tolerance=1e-5, dtype=np.float32, opset=17, change=lambda model: None):
    """Folds the model that make(builder) makes, after change(model), checks it, and returns (model, folded, report).

    folds : whether all batch normalizations are to be folded; None: as the builder says.
    """
    rng = rng or np.random.default_rng(0)
    b = onnx_graphs.Builder(rng, dtype, opset)
    y = make(b)
    if not b.outputs:
        b.output(y, 4)
    model = b.model()
    change(model)
    folded, report = cbn.onnx.fold(model, compare=False)
    check(model, folded, report, {node: folds for node in b.folds} if folds is not None else b.folds, rng, tolerance)
    return model, folded, report


def conv(b, x=None, out=6, into=4, kernel=3, kind="Conv", bias=True, **attributes):
    """A convolution of 4 channels to 6, on an input of 5 x 5 where none is given."""
    group = attributes.get("group", 1)
    shape = (out, into // group) if kind == "Conv" else (into, out // group)
    weight = b.normal((*shape, kernel, kernel), (into * kernel**2)**-0.5)
    return b.node(kind, x or b.input([2, into, 5, 5]), weight, *[b.normal(out)] * bias, **attributes)


def reason(report):
    (node,) = report.left
    return node.reason


# The situations in which tools are known to go wrong.

@pytest.mark.parametrize("kind", [*onnx_graphs.ACTIVATIONS, "Softplus"])
def test_across_an_activation(kind):
    _, _, report = built(lambda b: b.activation(b.bn(b.activation(conv(b), kind), 6)), False)
    assert "before it: " in reason(report) and "after it: " in reason(report)


def test_weights_shared_with_another_node():
    """The layer gets a copy; the other keeps the weight."""
    def make(b):
        x, weight = b.input([2, 4, 5, 5]), b.normal((6, 4, 3, 3))
        return b.node("Add", b.bn(b.node("Conv", x, weight), 6), b.node("Conv", x, weight))
    model, folded, report = built(make, True)
    old, new = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, folded))
    (shared,) = old.keys() & new.keys()
    assert np.array_equal(old[shared], new[shared])
    (line,) = report.copies
    assert f"{6 * 4 * 9 * 4} bytes" in line and shared in line


@pytest.mark.parametrize("same", [True, False])
def test_weights_shared_by_two_folded_layers(same):
    """Two branches of the same weight and the same normalization share the folded weight, too."""
    def make(b):
        x, weight, bias = b.input([2, 4, 5, 5]), b.normal((6, 4, 3, 3)), b.normal(6)
        y = b.bn(b.node("Conv", x, weight, bias), 6)
        parameters = list(b.nodes[-1].input)[1:] if same else None
        return b.node("Add", b.bn(b.node("Conv", b.node("Relu", x), weight, bias), 6, parameters=parameters), y)
    def change(model):      # the same epsilon in both
        for node in model.graph.node:
            for a in node.attribute:
                a.f = 1e-5
    _, folded, report = built(make, True, change=change)
    assert len(folded.graph.initializer) == (2 if same else 4)
    assert len(report.copies) == (0 if same else 1)


def test_output_used_elsewhere():
    def make(b):
        y = conv(b)
        return b.node("Add", b.node("Relu", b.bn(y, 6)), y)
    _, _, report = built(make, False)
    assert "is used by Add 'Add15' and BatchNormalization" in reason(report)


def test_output_that_is_an_output_of_the_graph():
    def make(b):
        y = conv(b)
        b.output(y, 4)
        b.output(b.bn(y, 6), 4)
    _, _, report = built(make, False)
    assert "is an output of the graph, too" in reason(report)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_grouped_convolutions(group):
    built(lambda b: b.bn(conv(b, out=8, group=group), 8), True)
    built(lambda b: b.node("Relu", conv(b, b.bn(b.input([2, 4, 5, 5]), 4), out=8, group=group)), True)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_grouped_transposed_convolutions(group):
    """A batch normalization before one is folded only where it shifts nothing."""
    built(lambda b: b.bn(conv(b, out=8, kind="ConvTranspose", group=group, strides=[2, 2], output_padding=[1, 1]), 8), True)
    built(lambda b: conv(b, b.bn(b.input([2, 4, 5, 5]), 4, shift=False), out=8, kind="ConvTranspose", group=group), True)
    _, _, report = built(lambda b: conv(b, b.bn(b.input([2, 4, 5, 5]), 4), out=8, kind="ConvTranspose", group=group), False)
    assert "transposed" in reason(report)


@pytest.mark.parametrize("which", ["weight", "mean"])
def test_initializers_that_are_inputs_too(which):
    """A caller may override them, and before version 4 of the format, where all had to be inputs, no runtime lets them."""
    def make(b):
        return b.bn(conv(b), 6)
    def as_inputs(names):
        def change(model):
            for t in model.graph.initializer:
                if t.name in names or names == "all":
                    model.graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, t.dims))
            model.ir_version = 3 if names == "all" else 8
        return change
    model = built(make, True)[0]
    name = model.graph.node[0].input[1] if which == "weight" else model.graph.node[1].input[3]
    _, folded, report = built(make, False, change=as_inputs([name]))
    assert which in reason(report) and f"({name}) is an input with a default, which a caller may override" in reason(report)
    assert [v.name for v in folded.graph.input][-1] == name
    old, folded, _ = built(make, True, change=as_inputs("all"), opset=9)
    assert {v.name for v in folded.graph.input} == {t.name for t in folded.graph.initializer} | {old.graph.input[0].name}
    _, folded, _ = built(lambda b: b.bn(conv(b, bias=False), 6), True, change=as_inputs("all"), opset=9)
    assert len(folded.graph.input) == 3, "the new bias is one, too"


@pytest.mark.parametrize("shape, channels, folds", [
    ([0, 6, -1], 6, True), ([0, 3, -1], 3, True), ([2, 6, 1, 3, 3], 6, True), ([-1, 6, 9], 6, True), ([2, 1, 54], 1, True),
    ([2, 54], 54, False), ([2, 18, 3], 18, False), ([1, 2, 6, 9], 2, False), ([3, 4, 9], 4, False),
])
def test_reshapes_in_between(shape, channels, folds):
    """Folded where each channel of the layer lies in one of the normalization."""
    def make(b):
        y = b.bn(b.node("Reshape", conv(b), b.constant(shape, np.int64)), channels)
        return b.node("Reshape", b.node("Relu", y), b.constant([2, 6, 3, 3], np.int64))
    built(make, folds)


@pytest.mark.parametrize("features", [1, 4])
def test_linear_then_reshaped_to_images(features):
    """A generator's start: each channel of the image has several outputs of the layer."""
    def make(b):
        y = b.node("Gemm", b.input([3, 5]), b.normal((5, 6 * features**2)), b.normal(6 * features**2))
        return b.bn(b.node("Reshape", y, b.constant([-1, 6, features, features], np.int64)), 6)
    built(make, True)


def test_flatten_before_a_linear_layer():
    def make(b):
        y = b.node("Flatten", b.bn(b.input([3, 6, 2, 2]), 6))
        b.output(b.node("Gemm", y, b.normal((24, 5))), 2)
    built(make, True)


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE"])
def test_not_computed_in_the_stored_type(dtype):
    """The weights are those of float64 arithmetic, rounded once, also through several normalizations."""
    rng = np.random.default_rng(3)
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, dtype))
    b = onnx_graphs.Builder(rng, dtype)
    b.output(b.bn(b.bn(conv(b), 6), 6), 4)
    model = b.model()
    folded, _ = cbn.onnx.fold(model, compare=False)
    arrays = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    weight, bias = (arrays[name] for name in model.graph.node[0].input[1:])
    for node in model.graph.node[1:]:
        scale, shift, mean, var = (arrays[name] for name in node.input[1:])
        factor = scale / np.sqrt(var + node.attribute[0].f)
        weight, bias = weight * factor.reshape(-1, 1, 1, 1), (bias - mean) * factor + shift
    new = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    for name, expected in zip(folded.graph.node[0].input[1:], (weight, bias), strict=True):
        assert new[name].dtype == dtype
        for towards in -100, 100:       # no neighbour is nearer
            neighbour = np.nextafter(new[name], new[name].dtype.type(towards)).astype(np.float64)
            assert (abs(new[name].astype(np.float64) - expected) <= abs(neighbour - expected) * (1 + 1e-12)).all()


def test_training_mode():
    def make(b):
        parameters = [b.normal(6) for _ in range(4)]
        y, *_ = b.node("BatchNormalization", conv(b), *parameters, outputs=3, training_mode=1)
        b.output(y, 4)
        return y
    b = onnx_graphs.Builder(np.random.default_rng(0))
    make(b)
    folded, report = cbn.onnx.fold(b.model(), compare=False)
    assert folded == b.model() and "in training mode" in reason(report)


@pytest.mark.parametrize("opset, attributes, outputs, folds", [
    (6, {"is_test": 1}, 1, True), (6, {}, 1, False), (7, {}, 1, True), (7, {}, 5, False), (9, {}, 5, False), (13, {}, 1, True),
    (14, {"training_mode": 1}, 1, False), (15, {"training_mode": 0}, 1, True),
])
def test_modes_of_the_opsets(opset, attributes, outputs, folds):
    b = onnx_graphs.Builder(np.random.default_rng(0), opset=opset)
    y = conv(b)
    names = [b.name("y") for _ in range(outputs)]
    b.nodes.append(helper.make_node("BatchNormalization", [y, *[b.normal(6) for _ in range(3)], b.constant(np.ones(6))], names, **attributes))
    b.output(names[0], 4)
    model = b.model()
    folded, report = cbn.onnx.fold(model, compare=False)
    assert len(report.folded) == folds and len(folded.graph.node) == (1 if folds else 2)
    onnx.checker.check_model(folded)


def test_a_bias_that_was_not_there():
    _, folded, _ = built(lambda b: b.bn(conv(b, bias=False), 6), True)
    assert len(folded.graph.node[0].input) == 3
    _, folded, _ = built(lambda b: b.bn(conv(b, bias=False), 6), True, change=lambda m: m.graph.node[0].input.append(""))
    assert folded.graph.node[0].input[2]


@pytest.mark.parametrize("attributes, folds", [
    ({}, True), ({"pads": [0, 0, 0, 0]}, True), ({"pads": [0, 0, 1, 0]}, False), ({"auto_pad": "VALID"}, True),
    ({"auto_pad": "SAME_UPPER"}, False), ({"auto_pad": "SAME_LOWER"}, False),
])
def test_zero_padding_before(attributes, folds):
    _, _, report = built(lambda b: conv(b, b.bn(b.input([2, 4, 5, 5]), 4), **attributes), folds)
    assert folds or "pads with zeros, which would be shifted, too" in reason(report)
    built(lambda b: conv(b, b.bn(b.input([2, 4, 5, 5]), 4, shift=False), **attributes), True)


# Where else it may and may not.

@pytest.mark.parametrize("mode, value, pads, shift, folds", [
    ("constant", 0, 1, True, False), ("constant", 0, 1, False, True), ("constant", 1, 1, False, False), ("constant", 1, 0, True, True),
    ("reflect", 0, 1, True, True), ("edge", 0, 1, True, True),
])
@pytest.mark.parametrize("opset", [9, 12, 18])
@pytest.mark.parametrize("first", ["layer", "normalization"])
def test_pads(mode, value, pads, shift, folds, opset, first):
    pads = [0, 0, pads, pads] * 2
    def pad(b, x):
        if opset < 11:
            return b.node("Pad", x, mode=mode, pads=pads, value=float(value))
        return b.node("Pad", x, b.constant(pads, np.int64), b.constant(np.float64(value)), mode=mode)
    def make(b):
        if first == "layer":
            return b.bn(pad(b, conv(b)), 6, shift=shift)
        return conv(b, pad(b, b.bn(b.input([2, 4, 5, 5]), 4, shift=shift)))
    built(make, folds, opset=opset)


def test_pad_of_channels():
    pads = [0, 1, 0, 0] * 2
    _, _, report = built(lambda b: b.bn(b.node("Pad", conv(b), b.constant(pads, np.int64), mode="edge"), 8), False)
    assert "pads with channels" in reason(report)


def test_matmul_of_sequences():
    """(N, L, C) is turned to (N, C, L) for the normalization, and back; without, it is one of positions, which the layer can't be."""
    def make(b):
        y = b.node("Add", b.normal(6), b.node("MatMul", b.input([2, 5, 4]), b.normal((4, 6))))
        y = b.bn(b.node("Transpose", y, perm=[0, 2, 1]), 6)
        b.output(b.node("Transpose", y, perm=[0, 2, 1]), 3)
    _, folded, _ = built(make, True)
    assert [node.op_type for node in folded.graph.node] == ["MatMul", "Add", "Transpose", "Transpose"]
    def make(b):
        b.output(b.bn(b.node("MatMul", b.input([2, 5, 4]), b.normal((4, 6))), 5), 3)
    _, _, report = built(make, False)
    assert "the channels of MatMul" in reason(report)


def test_channels_last():
    """The channels of a layer's output are the normalization's through transposes, which are not their own inverses."""
    def make(b):
        y = b.node("MatMul", b.input([2, 3, 5, 4]), b.normal((4, 6)))
        b.output(b.bn(b.node("Transpose", y, perm=[0, 3, 1, 2]), 6), 4)
    built(make, True)
    def make(b):
        y = b.node("Transpose", b.bn(b.input([2, 4, 3, 5]), 4), perm=[0, 2, 3, 1])
        b.output(b.node("MatMul", y, b.normal((4, 6))), 4)
    built(make, True)
    built(lambda b: b.bn(b.node("Transpose", conv(b), perm=[1, 0, 2, 3]), 2), False)


def test_matmul_without_a_shift_needs_no_add():
    def make(b):
        b.output(b.bn(b.node("MatMul", b.input([2, 4]), b.normal((4, 6))), 6, shift=False), 2)
    _, folded, _ = built(make, True)
    assert [node.op_type for node in folded.graph.node] == ["MatMul"]


def test_add_that_adds_a_dimension():
    """The 6 images of the batch are the channels after it."""
    built(lambda b: b.output(b.bn(b.node("Add", conv(b, b.input([6, 4, 5, 5])), b.normal([1] * 5)), 6), 5), False)


def test_add_that_makes_channels_of_one():
    """Those of the layer went to the batch before."""
    def make(b):
        y = b.node("Conv", b.input([3, 2, 3]), b.normal((4, 2, 1)))
        y = b.node("Reshape", y, b.constant([12, 1, 3], np.int64))
        b.output(b.bn(b.node("Add", y, b.normal([4, 1])), 4), 3)
    built(make, False)


def test_reshape_to_unknown_sizes():
    """Names of dimensions are compared where there are no numbers."""
    for name, folds in ("L", True), ("M", False):
        b = onnx_graphs.Builder(np.random.default_rng(0))
        x = b.node("Conv", b.input(["N", 4, "L"]), b.normal((6, 4, 1)))
        y = b.node("Reshape", x, b.input([3], np.int64))
        b.output(b.bn(y, 6), 3)
        model = b.model()
        for value, shape in (x, ["N", 6, "L"]), (y, [None, 6, name]):
            model.graph.value_info.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, shape))
        assert len(cbn.onnx.fold(model, compare=False)[1].folded) == folds


def test_add_of_something_else():
    for shape in [6, 1, 1], [1, 6, 1, 1], [], [1]:
        built(lambda b, shape=shape: b.bn(b.node("Add", conv(b), b.normal(shape)), 6), True)
    for shape in [3], [2, 6, 1, 1], [1, 1, 3, 3]:
        built(lambda b, shape=shape: b.bn(b.node("Add", conv(b), b.normal(shape)), 6), False)
    built(lambda b: b.bn(b.node("Add", conv(b), b.input([2, 6, 3, 3])), 6), False)
    built(lambda b: b.bn(b.node("Add", b.normal([6, 1, 1]), b.node("Identity", b.node("Add", conv(b), b.normal([1, 6, 1, 1])))), 6), True)
    _, _, report = built(lambda b: b.bn(b.node("Add", conv(b, out=5, kernel=1), b.normal([5])), 5), False)     # 5 channels, of width 5
    assert "not one value a channel" in reason(report)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm(trans_a, trans_b):
    """As many rows as columns, so that what is transposed matters. A normalization before a transposed input is one of rows."""
    def after(b):
        y = b.node("Gemm", b.input([4, 4]), b.normal((4, 4)), b.normal((4,)), transA=trans_a, transB=trans_b, alpha=0.5, beta=3.0)
        b.output(b.bn(y, 4), 2)
    _, folded, _ = built(after, True)
    assert {a.name for a in folded.graph.node[0].attribute} == {"transA", "transB"}
    def before(b):
        b.output(b.node("Gemm", b.bn(b.input([4, 4]), 4), b.normal((4, 4)), transA=trans_a, transB=trans_b, alpha=0.5), 2)
    built(before, not trans_a)
    def rows(b):
        b.output(b.bn(b.node("Gemm", b.input([3, 4]), b.normal((4, 4)), b.normal((3, 1))), 4), 2)
    built(rows, False)


def test_several_in_a_row_without_a_layer():
    """The first takes over the others."""
    def make(b):
        y = b.bn(b.node("Relu", b.input([2, 6, 3, 3])), 6, folds=False)
        return b.node("Relu", b.bn(b.bn(y, 6), 6))
    _, folded, _ = built(make, None)
    assert [node.op_type for node in folded.graph.node] == ["Relu", "BatchNormalization", "Relu"]
    _, folded, report = built(lambda b: conv(b, b.bn(b.bn(b.input([2, 4, 5, 5]), 4), 4)), True)
    assert [node.op_type for node in folded.graph.node] == ["Conv"]
    assert [node.into.split()[0] for node in report.nodes] == ["Conv", "BatchNormalization"]


def normalized(opset=17, dtype=np.float32):
    """(model, {"weight", "bias", "scale", "shift", "mean", "var": array to write to}) of a convolution and its normalization."""
    b = onnx_graphs.Builder(np.random.default_rng(0), dtype, opset)
    b.output(b.bn(conv(b, kernel=5), 6), 4)
    model = b.model()
    names = [*model.graph.node[0].input[1:], *model.graph.node[1].input[1:]]
    return model, dict(zip(("weight", "bias", "scale", "shift", "mean", "var"), names, strict=True))


def put(model, name, change):
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    array = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(array)), name))


@pytest.mark.parametrize("opset", [1, 6])
def test_statistics_of_each_element(opset):
    model, names = normalized(opset)
    model.graph.node[1].attribute.extend([helper.make_attribute("spatial", 0), helper.make_attribute("is_test", 1)])
    for name in "scale", "shift", "mean", "var":
        put(model, names[name], lambda a: np.ones((6, 3, 3), np.float32))
    _, report = cbn.onnx.fold(model, compare=False)
    assert "statistics for each element" in reason(report)


@pytest.mark.parametrize("kind", ["weight", "bias", "scale", "shift", "mean", "var"])
def test_what_is_not_constant(kind):
    model, names = normalized()
    (tensor,) = [t for t in model.graph.initializer if t.name == names[kind]]
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.graph.initializer.remove(tensor)
    folded, report = cbn.onnx.fold(model, compare=False)
    assert folded == model and f"({tensor.name}) is an input, not constant" in reason(report)


def test_what_overflows_is_left():
    model, names = normalized(dtype=np.float16)
    put(model, names["scale"], lambda a: a * 0 + np.float16(60000))
    put(model, names["weight"], lambda a: a * 8)
    folded, report = cbn.onnx.fold(model, compare=False)
    assert folded == model and "overflows float16" in reason(report)


def test_what_is_too_small_is_left():
    model, names = normalized(dtype=np.float16)
    put(model, names["scale"], lambda a: a * np.float16(1e-5))
    folded, report = cbn.onnx.fold(model, compare=False)
    assert folded == model and "too small for float16" in reason(report)


def test_variances():
    """A slightly negative one is computed with, and warned of; one that takes epsilon below 0 is left; NaN in a parameter is left."""
    model, names = normalized()
    put(model, names["var"], lambda a: np.r_[np.float32(-1e-6), a[1:]])
    with pytest.warns(UserWarning, match="channel 0"):
        _, report = cbn.onnx.fold(model, compare=False)
    assert report.folded[0].quiet == [0] and report.folded[0].change > 10 and "next to no variance in 1 channels: 0" in str(report)
    put(model, names["var"], lambda a: np.r_[np.float32(-1), a[1:]])
    assert "expected non-negative values, got -1.0 for channel 0" in reason(cbn.onnx.fold(model, compare=False)[1])
    put(model, names["var"], lambda a: np.r_[np.float32(np.nan), a[1:]])
    assert "isn't finite" in reason(cbn.onnx.fold(model, compare=False)[1])


def test_parameters_of_another_length():
    model, names = normalized()
    put(model, names["var"], lambda a: a[:5])
    folded, report = cbn.onnx.fold(model, compare=False)
    assert folded == model and "shape" in reason(report)


def test_epsilon_left_out_is_1e_5():
    model, names = normalized(dtype=np.float64)
    put(model, names["var"], lambda a: a * 1e-6)
    del model.graph.node[1].attribute[:]
    folded, _ = cbn.onnx.fold(model, compare=False)
    x = {model.graph.input[0].name: np.random.default_rng(0).standard_normal((2, 4, 5, 5))}
    (a,), (b,) = (ReferenceEvaluator(m).run(None, x) for m in (folded, model))
    assert abs(a - b).max() <= 1e-12 * abs(b).max()


def test_constants_made_by_nodes():
    def make(b):
        weight = b.node("Transpose", b.node("Identity", b.normal((4, 6, 3, 3))), perm=[1, 0, 2, 3])
        ones = b.node("ConstantOfShape", b.constant([6], np.int64), value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.5]))
        mean = b.node("Cast", b.constant(np.arange(6), np.int64), to=TensorProto.FLOAT)
        mean = b.node("Squeeze", b.node("Unsqueeze", mean, b.constant([0], np.int64)))
        return b.bn(b.node("Conv", b.input([2, 4, 5, 5]), weight), 6, parameters=[ones, mean, mean, ones])
    _, folded, _ = built(make, True)
    assert [node.op_type for node in folded.graph.node] == ["Conv"], "nothing of them is left"


@pytest.mark.parametrize("activation, expected", [
    ("Relu", "relu"), ("LeakyRelu", ("leaky_relu", 0.01)), ("Clip", ("clip", -1.0, 2.0)), ("Sigmoid", "sigmoid"), ("HardSwish", "hard_swish"),
    ("swish", "silu"), ("hard_swish_pieces", "hard_swish"), ("Tanh", None),
])
def test_activations_are_recognized(activation, expected):
    for seed in range(4):       # of the pieces, too
        _, _, report = built(lambda b: b.activation(b.bn(conv(b), 6), activation), True, rng=np.random.default_rng(seed))
        found = report.nodes[0].activation
        assert found == (pytest.approx(expected) if expected == ("leaky_relu", 0.01) else expected) or found[1] == pytest.approx(expected[1])


@pytest.mark.parametrize("make, expected", [
    (lambda b, y: b.node("Clip", y, b.constant(np.float32(0)), b.constant(np.float32(6))), "relu6"),
    (lambda b, y: b.node("Clip", y, b.constant(np.float32(0))), "relu"),
    (lambda b, y: b.node("Clip", y, "", b.constant(np.float32(1))), ("clip", -np.inf, 1.0)),
    (lambda b, y: b.node("Mul", b.node("HardSigmoid", y, alpha=1 / 6, beta=0.5), y), "hard_swish"),
    (lambda b, y: b.node("Mul", b.node("HardSigmoid", y, alpha=0.2, beta=0.5), y), None),
    (lambda b, y: b.node("Mul", b.node("Sigmoid", y), b.node("Relu", y)), None),
    (lambda b, y: next(b.node("Add", b.node("Mul", y, gate), gate) for gate in [b.node("Sigmoid", y)]), None),
    (lambda b, y: b.node("Mul", y, b.node("Div", b.node("Clip", b.node("Add", y, b.constant(np.float32(3))), b.constant(np.float32(0)),
                                                        b.constant(np.float32(6))), b.constant(np.float32(6)))), "hard_swish"),
    (lambda b, y: b.node("Div", b.node("Mul", y, b.node("Clip", b.node("Add", y, b.constant(np.float32(3))), b.constant(np.float32(0)),
                                                        b.constant(np.float32(6)))), b.constant(np.float32(5))), None),
    (lambda b, y: b.node("Add", b.node("Relu", y), y), None),
])
def test_pieces(make, expected):
    _, _, report = built(lambda b: make(b, b.bn(conv(b), 6)), True)
    assert report.nodes[0].activation == expected


def test_swish_of_opset_24():
    b = onnx_graphs.Builder(np.random.default_rng(0), opset=24)
    b.output(b.node("Swish", b.bn(conv(b), 6)), 4)
    assert cbn.onnx.fold(b.model(), compare=False)[1].nodes[0].activation == "silu"


def branches(b, then, otherwise):
    """An If on an input whose branches are what then and otherwise add, called with a builder each."""
    graphs = []
    for make in then, otherwise:
        inner = onnx_graphs.Builder(b.rng, b.dtype, b.opset)
        inner.number = b.number + 1000 * (1 + len(graphs))
        inner.output(make(inner), 4)
        b.folds |= inner.folds
        graphs.append(helper.make_graph(inner.nodes, "branch", [], inner.outputs, inner.initializers))
    return b.node("If", b.input([], bool), then_branch=graphs[0], else_branch=graphs[1])


def test_in_subgraphs():
    """Folded within one, also with the weights of the graph around it; not across its border."""
    def make(b):
        x, weight, other = b.input([2, 4, 5, 5]), b.normal((6, 4, 3, 3)), b.normal((6, 4, 3, 3))
        y = b.node("Conv", x, other)
        return branches(b, lambda c: c.node("Relu", c.bn(c.node("Conv", x, weight), 6)), lambda c: c.node("Relu", c.bn(y, 6, folds=False)))
    _, folded, report = built(make, None)
    assert "from outside its subgraph" in reason(report)
    assert len(folded.graph.initializer) == 1, "that of the branch has gone there"


def test_output_used_in_a_subgraph():
    def make(b):
        y = conv(b)
        b.output(b.node("Relu", b.bn(y, 6, folds=False)), 4)
        return branches(b, lambda c: c.node("Relu", y), lambda c: c.node("Neg", y))
    def all_outputs(b):
        b.output(make(b), 4)
    built(all_outputs, None)


def test_in_a_function():
    node = helper.make_node("BatchNormalization", ["x", "a", "b", "c", "d"], ["y"], name="inside")
    function = helper.make_function("own", "f", ["x", "a", "b", "c", "d"], ["y"], [node], [helper.make_opsetid("", 17)])
    model, _ = normalized()
    model.functions.append(function)
    folded, report = cbn.onnx.fold(model, compare=False)
    assert "in the function 'f'" in reason(report) and len(report.folded) == 1
    assert folded.functions == model.functions


def test_what_else_is_kept():
    """Opsets, names, descriptions, metadata, types of values in between."""
    model, names = normalized()
    model.doc_string, model.producer_name, model.domain, model.graph.doc_string = "a model", "somebody", "org", "a graph"
    helper.set_model_props(model, {"stride": "32"})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node[0].doc_string = "a layer"
    (weight,) = [t for t in model.graph.initializer if t.name == names["weight"]]
    weight.doc_string = "a weight"
    model = onnx.shape_inference.infer_shapes(model)
    model.graph.value_info.append(helper.make_tensor_value_info(names["mean"], TensorProto.FLOAT, [6]))
    folded, _ = cbn.onnx.fold(model, compare=False)
    onnx.checker.check_model(folded, full_check=True)
    for field in "doc_string", "producer_name", "domain", "metadata_props", "opset_import", "ir_version":
        assert getattr(folded, field) == getattr(model, field)
    for field in "doc_string", "input", "output", "name":
        assert getattr(folded.graph, field) == getattr(model.graph, field)
    (node,) = folded.graph.node
    assert (node.doc_string, node.name, list(node.input)[1:]) == ("a layer", model.graph.node[0].name, [names["weight"], names["bias"]])
    assert folded.graph.initializer[0].doc_string == "a weight"
    assert not folded.graph.value_info


def test_shapes_that_are_not_known():
    """Of a model that inference knows little of, what needs no shapes is folded."""
    def make(b):
        y = b.node("Relu", b.bn(conv(b, b.node("Strange", b.input([2, 4, 5, 5]), domain="own")), 6))
        y = b.node("Strange", y, domain="own")
        y = b.bn(b.node("MatMul", y, b.normal((5, 5))), 6)
        b.output(b.node("Strange", y, domain="own"), 4)
    b = onnx_graphs.Builder(np.random.default_rng(0))
    make(b)
    model = b.model()
    model.opset_import.append(helper.make_opsetid("own", 1))
    _, report = cbn.onnx.fold(model, compare=False)
    assert len(report.folded) == 1 and "nothing says how many dimensions" in reason(report)


def test_shapes_asked_for_in_between():
    """Of the layer's output, and of the normalization's before a layer, by nodes that need nothing else of it."""
    def direct(b):
        y = conv(b)
        return b.node("Reshape", b.node("Relu", b.bn(y, 6)), b.node("Shape", y))
    built(direct, True)
    def before(b):
        y = b.bn(b.node("Relu", b.input([2, 4, 5, 5])), 4)
        return b.node("Reshape", conv(b, y, out=4, kernel=1), b.node("Shape", y))
    built(before, True)
    def make(b):
        y = conv(b)
        z = b.node("Reshape", y, b.constant([0, 6, -1], np.int64))
        return b.node("Reshape", b.node("Relu", b.bn(z, 6)), b.node("Shape", y))
    built(make, True)


def test_comparison():
    model, _ = normalized()
    x = {model.graph.input[0].name: np.random.default_rng(0).standard_normal((2, 4, 5, 5), np.float32)}
    for inputs, words in (x, "on the given inputs"), (None, "on drawn inputs"):
        _, report = cbn.onnx.fold(model, inputs=inputs)
        assert 0 < report.difference < 1e-5 and words in report.compared and f"{report.difference:.2g}" in str(report)
    with pytest.raises(ValueError, match=r"inputs: expected values for \['x2'\], got them for \['y'\]"):
        cbn.onnx.fold(model, inputs={"y": 0})
    with pytest.raises(Exception, match="(?i)dimension|index|shape"):       # by whichever runs the model
        cbn.onnx.fold(model, inputs={"x2": np.zeros((2, 3, 5, 5), np.float32)})
    model.graph.node[0].op_type = "Strange"
    _, report = cbn.onnx.fold(model)
    assert report.difference is None and report.compared.startswith("not compared, as it doesn't run on drawn inputs: ")


@pytest.mark.parametrize("a, b, expected", [
    ([1, 2.0], [1, 4.0], 0.5), ([1, np.nan], [1, np.nan], 0), ([1, np.nan], [1, 2.0], np.inf), ([1, np.inf], [1, -np.inf], np.inf),
    ([1.0], [1, 2.0], np.inf), ([0.5], [0.0], 0.5), ([True], [False], 1), (["a"], ["b"], np.inf), (["a"], ["a"], 0),
])
def test_difference(a, b, expected):
    assert cbn.onnx.compare.relative(np.array(a), np.array(b)) == expected


@pytest.mark.parametrize("model", [None, b"", 3, onnx.GraphProto()])
def test_not_a_model(model):
    with pytest.raises(TypeError, match="model: expected an onnx.ModelProto or a path, got "):
        cbn.onnx.fold(model)


@pytest.mark.parametrize("external", [False, True])
def test_command(external, tmp_path, capsys):
    """Files in, files out: external data stay external, and nothing of a file that was there before is kept."""
    model, _ = normalized()
    expected, _ = cbn.onnx.fold(model, compare=False)
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, source, save_as_external_data=external, location="weights.bin", size_threshold=0)
    for _ in range(2):
        main(["fold", str(source), str(target)])
        assert capsys.readouterr().out.startswith("1 of 1 batch normalizations folded; outputs differ by ")
    assert onnx.load(target).graph.node == expected.graph.node
    assert (tmp_path / "out.onnx.data").exists() == external
    if external:
        unloaded = onnx.load(source, load_external_data=False)
        assert "in a file that was not loaded" in reason(cbn.onnx.fold(unloaded, compare=False)[1])
        assert (tmp_path / "out.onnx.data").stat().st_size < 1.5 * (tmp_path / "weights.bin").stat().st_size
    folded, _ = cbn.onnx.fold(target)
    assert folded.graph == onnx.load(target).graph, "nothing is left to fold"


@pytest.mark.skipif(os.environ.get("CBN_TEST_LARGE") != "1", reason="needs 5 GB of memory and of disk: CBN_TEST_LARGE=1")
def test_command_on_more_than_2_gb(tmp_path):
    n = 14500
    b = onnx_graphs.Builder(np.random.default_rng(0))
    y = b.input([1, n])
    large = np.broadcast_to(b.rng.standard_normal(n, np.float32), (n, n))
    for _ in range(3):
        y = b.node("MatMul", y, b.constant(large))
    b.output(b.bn(b.node("MatMul", y, b.normal((n, 8))), 8), 2)
    onnx.save(b.model(), tmp_path / "in.onnx", save_as_external_data=True, location="in.bin")
    del b
    main(["fold", "--no-compare", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")])
    onnx.checker.check_model(tmp_path / "out.onnx")
    folded = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert [node.op_type for node in folded.graph.node] == ["MatMul"] * 4 + ["Add"]
    assert (tmp_path / "out.onnx.data").stat().st_size > 2**31


@pytest.mark.parametrize("arguments, words", [
    (["fold", "{0}/none.onnx", "{0}/out.onnx"], "none.onnx can't be read: "), (["fold", "{0}/junk", "{0}/out.onnx"], "junk can't be read"),
    (["fold", "{0}/junk", "{0}/junk"], "expected another file than IN"), (["fold"], "required"), ([], "required"),
    (["fold", "{0}/missing.onnx", "{0}/out.onnx"], "missing.onnx can't be read"),
    (["fold", "{0}/in.onnx", "{0}/none/out.onnx"], "can't be written"),
])
def test_command_misused(arguments, words, tmp_path, capsys):
    (tmp_path / "junk").write_text("no model")
    model, _ = normalized()
    onnx.save(model, tmp_path / "in.onnx")
    onnx.save(model, tmp_path / "missing.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(SystemExit) as exit:
        main([a.format(tmp_path) for a in arguments])
    assert words in str(exit.value) + capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
