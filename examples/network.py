"""A multilayer perceptron for handwritten digits, in NumPy, with cbn's layers among its own: what digits.py and claims.py train."""

from itertools import pairwise

import numpy as np
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

import cbn

threadpool_limits(1, "blas")  # matrix products this small gain nothing from a second thread, and lose much where the cores are shared

TRAINING_SET = 1200  # of 1797 digits; the others are the test set
BATCH = 60
CLASSES = 10


def digits(seed):
    """x_train, labels_train, x_test, labels_test: images of 8x8 pixels as rows of 64 numbers in [0, 1], split at random."""
    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, labels = (x[order] / 16).astype(np.float32), labels[order]
    return x[:TRAINING_SET], labels[:TRAINING_SET], x[TRAINING_SET:], labels[TRAINING_SET:]


class Dense:
    """x @ weight + bias, with the attributes and the backward method of cbn's layers."""

    def __init__(self, inputs, outputs, std, rng):
        self.weight = rng.normal(0, std, (inputs, outputs)).astype(np.float32)
        self.bias = np.zeros(outputs, np.float32)

    def __call__(self, x):
        self.x = x
        return x @ self.weight + self.bias

    def backward(self, dy):
        self.weight_grad = self.x.T @ dy
        self.bias_grad = dy.sum(axis=0)
        return dy @ self.weight.T


class Sigmoid:
    """1 / (1 + exp(-x)), in a form that doesn't overflow."""

    def __call__(self, x):
        self.y = 0.5 + 0.5 * np.tanh(0.5 * x)
        return self.y

    def backward(self, dy):
        return dy * self.y * (1 - self.y)


class Network:
    """Hidden layers of sigmoid units and a linear layer to the classes, trained by SGD on the softmax cross-entropy.

    hidden : number of units of each hidden layer.
    normalized : whether each sigmoid comes after a batch normalization.
    std : standard deviation of the initial weights, which depend on the seed and not on `normalized`.
    """

    def __init__(self, hidden, normalized, std, seed):
        rng = np.random.default_rng(seed)
        self.layers = []
        for inputs, outputs in pairwise((64, *hidden)):
            self.layers.append(Dense(inputs, outputs, std, rng))
            if normalized:
                self.layers.append(cbn.BatchNorm1d(outputs))
            self.layers.append(Sigmoid())
        self.layers.append(Dense(hidden[-1], CLASSES, std, rng))
        self.norms = [layer for layer in self.layers if isinstance(layer, cbn.BatchNorm)]

    def infer(self, x, layers=slice(None)):
        """The output of (a slice of) the layers in inference mode: normalized by the running statistics."""
        for norm in self.norms:
            norm.eval()
        for layer in self.layers[layers]:
            x = layer(x)
        for norm in self.norms:
            norm.train()
        return x

    def accuracy(self, x, labels):
        return np.mean(self.infer(x).argmax(axis=1) == labels)

    def set_gradients(self, x, labels):
        """Set every layer's gradients of the mean cross-entropy of a batch, in training mode."""
        for layer in self.layers:
            x = layer(x)
        p = np.exp(x - x.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        dy = (p - np.eye(CLASSES, dtype=x.dtype)[labels]) / len(x)
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
            for layer in self.layers:
                if not isinstance(layer, Sigmoid):
                    layer.weight -= rate * layer.weight_grad
                    layer.bias -= rate * layer.bias_grad
            yield step
