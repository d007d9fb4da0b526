"""Networks for handwritten digits, in NumPy, with cbn's layers among their own: the perceptrons that digits.py and claims.py train, and
the convolutional network of service/.
"""

from itertools import pairwise

import numpy as np
from threadpoolctl import threadpool_limits

import cbn

threadpool_limits(1, "blas")  # matrix products this small gain nothing from a second thread, and lose much where the cores are shared

TRAINING_SET = 1200  # of 1797 digits; the others are the test set
BATCH = 60
CLASSES = 10


def digits(seed):
    """x_train, labels_train, x_test, labels_test: images of 8x8 pixels as rows of 64 numbers in [0, 1], split at random."""
    from sklearn.datasets import load_digits  # here, as a network that is trained does without scikit-learn

    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, labels = (x[order] / 16).astype(np.float32), labels[order]
    return x[:TRAINING_SET], labels[:TRAINING_SET], x[TRAINING_SET:], labels[TRAINING_SET:]


class Dense:
    """x @ weight + bias, with the attributes and methods of cbn's layers; x may be of any rank, and its last axis is multiplied."""

    def __init__(self, inputs, outputs, std, rng):
        self.weight = rng.normal(0, std, (inputs, outputs)).astype(np.float32)
        self.bias = np.zeros(outputs, np.float32)

    def __call__(self, x):
        rows = x.reshape(-1, x.shape[-1])  # one product of matrices, not one for each image
        self.x = rows
        return (rows @ self.weight + self.bias).reshape(*x.shape[:-1], -1)

    def backward(self, dy):
        rows = dy.reshape(-1, dy.shape[-1])
        self.weight_grad = self.x.T @ rows
        self.bias_grad = rows.sum(axis=0)
        return (rows @ self.weight.T).reshape(*dy.shape[:-1], -1)


class Convolution(Dense):
    """3x3, with padding 1, channels last: x (N, H, W, inputs), result (N, H / stride, W / stride, outputs); stride divides H and W."""

    def __init__(self, inputs, outputs, stride, rng):
        super().__init__(9 * inputs, outputs, np.sqrt(2 / (9 * inputs)), rng)
        self.stride = stride

    def __call__(self, x):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::self.stride, ::self.stride]
        return super().__call__(windows.reshape(*windows.shape[:3], -1))

    def backward(self, dy):
        n, height, width, _ = dy.shape
        windows = super().backward(dy).reshape(n, height, width, -1, 3, 3)
        padded = np.zeros((n, height * self.stride + 2, width * self.stride + 2, windows.shape[3]), dy.dtype)
        for i, j in np.ndindex(3, 3):
            padded[:, i:i + height * self.stride:self.stride, j:j + width * self.stride:self.stride] += windows[..., i, j]
        return padded[:, 1:-1, 1:-1]


class Reshape:
    """Each sample in another shape."""

    def __init__(self, *shape):
        self.shape = shape

    def __call__(self, x):
        self.before = x.shape[1:]
        return x.reshape(-1, *self.shape)

    def backward(self, dy):
        return dy.reshape(-1, *self.before)


class Sigmoid:
    """1 / (1 + exp(-x)), in a form that doesn't overflow."""

    def __call__(self, x):
        self.y = 0.5 + 0.5 * np.tanh(0.5 * x)
        return self.y

    def backward(self, dy):
        return dy * self.y * (1 - self.y)


def softmax(x):
    p = np.exp(x - x.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


class Network:
    """Layers one after another, the last one's outputs a number for each class, trained by SGD on the softmax cross-entropy.

    With the batch normalizations in eval mode, a network may be called from many threads at once: what layers keep of a call is for
    `backward` alone.
    """

    def __init__(self, layers):
        self.layers = layers
        self.norms = [layer for layer in layers if isinstance(layer, cbn.BatchNorm)]
        self.trained = {str(i): layer for i, layer in enumerate(layers) if hasattr(layer, "weight")}

    def __call__(self, x, layers=slice(None)):
        """The output of (a slice of) the layers, in the modes that they are in."""
        for layer in self.layers[layers]:
            x = layer(x)
        return x

    def eval(self):
        """Set the batch normalizations' eval mode; returns the network."""
        for norm in self.norms:
            norm.eval()
        return self

    def state_dict(self):
        """Parameters and running statistics of all layers, under PyTorch's names: "0.weight", "1.running_mean"."""
        return cbn.state_dict(self.trained)

    def load_state_dict(self, state):
        cbn.load_state_dict(self.trained, state)

    def infer(self, x, layers=slice(None)):
        """The output of (a slice of) the layers in inference mode: normalized by the running statistics."""
        y = self.eval()(x, layers)
        for norm in self.norms:
            norm.train()
        return y

    def accuracy(self, x, labels):
        return np.mean(self.infer(x).argmax(axis=1) == labels)

    def set_gradients(self, x, labels):
        """Set every layer's gradients of the mean cross-entropy of a batch, in training mode."""
        dy = (softmax(self(x)) - np.eye(CLASSES, dtype=x.dtype)[labels]) / len(x)
        for layer in reversed(self.layers):
            dy = layer.backward(dy)

    def train(self, x, labels, steps, rate, seed):
        """Train, and yield the number of steps done after each. The order of the data depends on the seed only."""
        rng = np.random.default_rng(seed)
        batches = []
        for step in range(1, steps + 1):
            batches = batches or list(rng.permutation(len(x)).reshape(-1, BATCH))
            batch = batches.pop()
            self.set_gradients(x[batch], labels[batch])
            for _, parameter, gradient in cbn.parameters(self.trained):
                parameter -= rate * gradient
            yield step


def perceptron(hidden, normalized, std, seed):
    """Hidden layers of sigmoid units and a linear layer to the classes.

    hidden : number of units of each hidden layer.
    normalized : whether each sigmoid comes after a batch normalization.
    std : standard deviation of the initial weights, which depend on the seed and not on `normalized`.
    """
    rng = np.random.default_rng(seed)
    layers = []
    for inputs, outputs in pairwise((64, *hidden)):
        layers.append(Dense(inputs, outputs, std, rng))
        layers.append(cbn.BatchNorm1d(outputs, activation="sigmoid") if normalized else Sigmoid())
    return Network([*layers, Dense(hidden[-1], CLASSES, std, rng)])


def convolutional(seed):
    """Two convolutions, each with batch normalization and ReLU, and a linear layer from the 4x4 pixels that are left to the classes."""
    rng = np.random.default_rng(seed)
    return Network([
        Reshape(8, 8, 1),
        Convolution(1, 16, 1, rng),
        cbn.BatchNorm2d(16, axis=-1, activation="relu"),
        Convolution(16, 32, 2, rng),
        cbn.BatchNorm2d(32, axis=-1, activation="relu"),
        Reshape(4 * 4 * 32),
        Dense(4 * 4 * 32, CLASSES, 0.01, rng),
    ])


def convolutional_of(norms, kernels):
    """The same of weights from another framework with channels last.

    norms : the two batch normalizations, without their activation.
    kernels : (kernel, bias) of the other layers: (height, width, inputs, outputs) or (inputs, outputs), and (outputs,).
    """
    layers, norms, kernels = convolutional(seed=0).layers, iter(norms), iter(kernels)
    for i, layer in enumerate(layers):
        if isinstance(layer, cbn.BatchNorm):
            layers[i] = next(norms)
            layers[i].activation = layer.activation
        elif isinstance(layer, Dense):
            kernel, layer.bias = map(np.asarray, next(kernels))
            kernel = kernel.transpose(2, 0, 1, 3) if kernel.ndim == 4 else kernel  # as Convolution's windows lie
            layer.weight = kernel.reshape(-1, kernel.shape[-1])
    return Network(layers)
