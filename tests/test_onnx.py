"""ONNX's own cases of BatchNormalization: those of the operator, and models that PyTorch exported, both of which its package ships."""

import importlib
import pathlib

import numpy as np
import pytest

import cbn

onnx = pytest.importorskip("onnx", reason="the cases are in the package onnx")
import onnx.backend.test.case.node as node_cases
from onnx.backend.test.loader import load_model_tests

importlib.import_module("onnx.backend.test.case.node.batch_normalization")  # adds its cases; onnx's own function would add all operators'


def node_data():
    """(name, model, inputs by name, expected outputs) of each case."""
    for case in node_cases._NodeTestCases:
        if case.name.startswith("test_batchnorm_") and not case.name.endswith("_expanded"):
            for inputs, outputs in case.data_sets:
                yield case.name, case.model, dict(zip(case.model.graph.node[0].input, inputs, strict=True)), outputs


def model_data():
    for case in load_model_tests(kind="pytorch-converted"):
        if case.name.startswith("test_BatchNorm"):
            folder = pathlib.Path(case.model_dir)
            model = onnx.load(folder / "model.onnx")
            arrays = {a.name: onnx.numpy_helper.to_array(a) for a in model.graph.initializer}
            read = lambda path: onnx.numpy_helper.to_array(onnx.load_tensor(path))
            inputs = [i.name for i in model.graph.input if i.name not in arrays]
            for data in folder.glob("test_data_set_*"):
                arrays.update((name, read(data / f"input_{i}.pb")) for i, name in enumerate(inputs))
                yield case.name, model, arrays, [read(data / "output_0.pb")]


CASES = sorted([*node_data(), *model_data()], key=lambda case: case[0])


def test_all_cases_are_there():
    assert len(CASES) == 9


@pytest.mark.parametrize("name, model, arrays, expected", CASES, ids=[case[0] for case in CASES])
def test_case(name, model, arrays, expected):
    (node,) = model.graph.node
    assert node.op_type == "BatchNormalization"
    x, scale, bias, mean, var = (arrays[name] for name in node.input)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    eps, momentum = attributes.get("epsilon", 1e-5), attributes.get("momentum", 0.9)
    if attributes.get("training_mode"):
        # ONNX's momentum is the weight of the old value, and its running variance the population's.
        mean, var = mean.copy(), var.copy()
        actual = [cbn.batch_norm(x, mean, var, scale, bias, True, 1 - momentum, eps, unbiased=False), mean, var]
    else:
        actual = [cbn.batch_norm(x, mean, var, scale, bias, eps=eps)]
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
