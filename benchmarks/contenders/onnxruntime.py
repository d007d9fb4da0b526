"""ONNX Runtime's BatchNormalization, and the Add and Relu that follow, in a graph with bound buffers: channels first, forward only."""

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from workloads import EPS

from . import Cannot, aligned, aligned_elements, parameters


def versions():
    return f"{ort.__version__}"


def prepare(cell):
    if cell.kind == "backward":
        raise Cannot("has no backward")
    if not (cell.layout == "first" or cell.spatial == 1):
        raise Cannot("has no channels last")
    shape = (cell.batch, cell.channels, cell.spatial) if cell.spatial > 1 else (cell.batch, cell.channels)
    names = ("weight", "bias", "mean", "var")
    training = cell.kind == "training"
    outputs = ("y", "running_mean", "running_var") if training else ("y",)
    steps = [("BatchNormalization", ["x", *names], {"epsilon": EPS, "training_mode": int(training)})]
    steps += [("Add", ["residual"], {})] * cell.add + [("Relu", [], {})] * cell.relu
    nodes, value = [], []
    for i, (op, others, attributes) in enumerate(steps):
        result = ["y" if i == len(steps) - 1 else f"value{i}"]
        nodes.append(helper.make_node(op, value + others, result + list(outputs[1:] if i == 0 else ()), **attributes))
        value = result
    inputs = ["x", "residual"][: 1 + cell.add]
    initializers = [numpy_helper.from_array(array, name) for name, array in zip(names, parameters(cell), strict=True)]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (*inputs, "y")]
    running = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [cell.channels]) for name in outputs[1:]]
    graph = helper.make_graph(nodes, "batch_norm", info[:-1], info[-1:] + running, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=9)
    onnx.checker.check_model(model)

    options = ort.SessionOptions()
    options.intra_op_num_threads = cell.threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # These arrays back the OrtValues and must outlive them.
    arrays = {name: aligned_elements(cell, seed).reshape(shape) for name, seed in zip(inputs, (0, 3), strict=False)} | {"y": aligned(shape)}
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    binding = session.io_binding()
    for name in inputs:
        binding.bind_ortvalue_input(name, values[name])
    if cell.output == "given":
        binding.bind_ortvalue_output("y", values["y"])
    for name in outputs[cell.output == "given" :]:
        binding.bind_output(name, "cpu")

    def given():
        session.run_with_iobinding(binding)
        return arrays["y"]

    def allocated():
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    if cell.output == "given":
        return [given], lambda y: {"y": y.reshape(cell.shape)}
    return [allocated], lambda y: {"y": y.numpy().reshape(cell.shape)}
