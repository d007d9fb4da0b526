"""A network that is trained in PyTorch on handwritten digits, exported as ONNX, folded, and run in NumPy: three outputs and times side by side.

Needs torch, onnxscript and onnxruntime beside cbn's own dependencies for examples.
"""

from statistics import median
from time import perf_counter

import numpy as np
import onnxruntime
import torch
from onnx import helper, numpy_helper
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import cbn.onnx
import cbn.torch

TRAINING_SET = 1500  # of 1797 digits
BATCH = 50
EPOCHS = 5
CALLS = 20  # timed


def digits():
    """Training images (N, 1, 8, 8) and labels, and those of the test, as tensors."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = torch.tensor(images[order] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels[order])
    return images[:TRAINING_SET], labels[:TRAINING_SET], images[TRAINING_SET:], labels[TRAINING_SET:]


def train(images, labels):
    """Two convolutions with batch normalization and ReLU, which cbn computes, and a linear layer."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip
    cbn.torch.convert(network)
    optimizer = torch.optim.Adam(network.parameters())
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def conv(x, weight, bias, *, strides, pads, **_):
    """Channels first."""
    top, left, bottom, right = pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::strides[0], ::strides[1]]
    n, _, height, width = windows.shape[:4]
    columns = windows.transpose(1, 4, 5, 0, 2, 3).reshape(-1, n * height * width)
    y = weight.reshape(len(weight), -1) @ columns + bias[:, None]
    return y.reshape(-1, n, height, width).swapaxes(0, 1)


OPERATORS = {
    "Conv": conv,
    "Relu": lambda x: np.maximum(x, 0),
    "Reshape": lambda x, shape, **_: x.reshape(shape),
    "Gemm": lambda x, weight, bias, *, transB=0, **_: x @ (weight.T if transB else weight) + bias,  # noqa: N803 -- ONNX's name
    "Concat": lambda *arrays, axis: np.concatenate(arrays, axis),
    "Constant": lambda *, value_ints: np.array(value_ints),
}


def run(model, x):
    """The output of an ONNX model of the operators above, in NumPy."""
    values = {model.graph.input[0].name: x, **{array.name: numpy_helper.to_array(array) for array in model.graph.initializer}}
    for node in model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        values[node.output[0]] = OPERATORS[node.op_type](*(values[name] for name in node.input), **attributes)
    return values[model.graph.output[0].name]


def timed(call):
    times = []
    for _ in range(CALLS):
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    return 1e3 * median(times)


def main():
    images, labels, test_images, test_labels = digits()
    network = train(images, labels)
    # Unoptimized, as the exporter's optimizer folds, too, in float32.
    exported = torch.onnx.export(network, (test_images,), dynamo=True, optimize=False, verbose=False).model_proto
    folded, report = cbn.onnx.fold(exported)
    print(report)

    x = test_images.numpy()
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    calls = {
        "PyTorch": lambda: network(test_images).numpy(),
        "ONNX Runtime": lambda: session.run(None, {exported.graph.input[0].name: x})[0],
        "NumPy, folded": lambda: run(folded, x),
    }
    with torch.inference_mode():
        outputs = {name: call() for name, call in calls.items()}
        print(f"\n{'':15}{'accuracy':>9}{'largest difference':>20}{'ms for ' + str(len(x)):>12}   the first digit's scores")
        for name, call in calls.items():
            accuracy = np.mean(outputs[name].argmax(1) == test_labels.numpy())
            difference = np.abs(outputs[name] - outputs["PyTorch"]).max()
            print(f"{name:15}{accuracy:9.1%}{difference:20.1e}{timed(call):12.2f}   {outputs[name][0].round(3)}")


if __name__ == "__main__":
    np.set_printoptions(linewidth=160, suppress=True)
    main()
