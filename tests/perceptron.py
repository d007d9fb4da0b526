"""A perceptron in NumPy, with cbn's batch normalizations in it, that trains beside a framework's own from the same weights."""

import numpy as np

import cbn

STEPS, RATE, INPUTS, OUTPUTS = 5, 0.1, 6, 3


class Dense:
    """x @ weight + bias."""

    def __init__(self, weight, bias):
        self.weight, self.bias = np.array(weight), np.array(bias)

    def __call__(self, x):
        self.x = x
        return x @ self.weight + self.bias

    def backward(self, dy):
        self.weight_grad, self.bias_grad = self.x.T @ dy, dy.sum(0)
        return dy @ self.weight.T


def drawn(seed):
    """The generator, and of each hidden layer: its units, and epsilon, momentum (of the new value), and whether it has a weight and a bias."""
    rng = np.random.default_rng(seed)
    return rng, [
        (
            int(rng.integers(2, 20)),
            float(rng.choice([1e-5, 1e-3, 0.1])),
            float(rng.choice([0.01, 0.1, 0.5])),
            bool(rng.integers(2)),
            bool(rng.integers(2)),
        )
        for _ in range(rng.integers(1, 4))
    ]


def batches(rng, count=STEPS):
    return [(rng.normal(1, 2, (8, INPUTS)), rng.normal(size=(8, OUTPUTS))) for _ in range(count)]


def forward(layers, x):
    for layer in layers.values():
        x = layer(x)
    return x


def train(layers, data):
    """Steps of gradient descent on the mean of squared differences."""
    for layer in layers.values():
        if isinstance(layer, cbn.BatchNorm):
            layer.train()
    for x, target in data:
        y = forward(layers, x)
        dy = 2 * (y - target) / y.size
        for layer in reversed(layers.values()):
            dy = layer.backward(dy)
        for _, array, gradient in cbn.parameters(layers):
            array -= RATE * gradient
    for layer in layers.values():
        if isinstance(layer, cbn.BatchNorm):
            layer.eval()


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
