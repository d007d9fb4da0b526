"""Runs two models on the same inputs and tells how far their outputs are apart."""

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from .operator import operators

SYMBOLIC = 2, 64        # what stands for dimensions without a number: the first, and the others


def draw(model, seed=0):
    """Inputs by name, as the model declares them: floats of N(0, 1), other numbers 0 or 1."""
    rng, initialized, symbols, drawn = np.random.default_rng(seed), {t.name for t in model.graph.initializer}, {}, {}
    for v in model.graph.input:
        if v.name in initialized:
            continue
        if not v.type.HasField("tensor_type"):
            raise ValueError(f"inputs: expected a value for {v.name!r}, as only tensors can be drawn")
        dims = v.type.tensor_type.shape.dim
        shape = [d.dim_value if d.dim_value > 0 else symbols.setdefault(d.dim_param or (v.name, k), SYMBOLIC[k > 0])
                 for k, d in enumerate(dims)]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)
        floats = dtype.kind == "f" or dtype.name == "bfloat16"
        drawn[v.name] = np.asarray(rng.standard_normal(shape) if floats else rng.integers(0, 2, shape)).astype(dtype)
    return drawn


def difference(before, after, inputs):
    """(the largest difference of an output, relative to that output's largest value; by what the models were run)."""
    run, runner = _by_runtime, "ONNX Runtime"
    try:
        expected = run(before, inputs)
    except Exception:     # not installed, or without a kernel for some node, or the model is of more than 2 GB
        run, runner = _by_evaluator, "onnx.reference"
        expected = run(before, inputs)
    return max(map(relative, run(after, inputs), expected), default=0.0), runner


def relative(a, b):
    """The largest |a - b| over the largest |b|, of numbers; NaN and infinity count where they are not in both."""
    if not isinstance(b, np.ndarray) or b.dtype.kind in "OSU":
        return 0.0 if np.array_equal(a, b) else np.inf
    if a.shape != b.shape:
        return np.inf
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return np.inf
    distance = abs(a[finite] - b[finite]).max(initial=0)
    return float(distance / (abs(b[finite]).max(initial=0) or 1.0))


def _by_evaluator(model, inputs):
    return ReferenceEvaluator(model, new_ops=operators()).run(None, inputs)


def _by_runtime(model, inputs):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, inputs)
