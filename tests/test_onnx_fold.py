"""cbn.onnx.fold gives a model of the same outputs without the batch normalizations that a layer beside them can take over, and says why it left others."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="models are read with the package onnx")
import onnx_graphs
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import cbn
import cbn.onnx


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


def check(model, folded, report, expected, rng, tolerance):
    """The same outputs; folded what may be, and nothing else; a model in order."""
    onnx.checker.check_model(folded, full_check=True)
    assert {node.name: bool(node.into) for node in report.nodes} == expected
    assert all(bool(node.reason) != bool(node.into) for node in report.nodes)
    left = [node.op_type for node in folded.graph.node].count("BatchNormalization")
    assert left == len(report.left)
    assert [v.name for v in folded.graph.output] == [v.name for v in model.graph.output]
    used = {name for node in folded.graph.node for name in node.input}
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
