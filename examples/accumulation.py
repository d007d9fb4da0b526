"""Trains a small network on handwritten digits in micro-batches, with the numbers of the whole batch: statistics and gradients accumulate.

Beside it, the same network on whole batches (the parameters agree to rounding), and on the first micro-batch of each alone (they don't).
"""

import functools

import numpy as np
from sklearn.datasets import load_digits
from tqdm import tqdm

import cbn

HIDDEN, BATCH, PART, STEPS, RATE = 64, 64, 8, 200, 0.5


class Network:
    """Linear, batch normalization with ReLU, linear, softmax; parameters in float64."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.first, self.second = rng.standard_normal((64, HIDDEN)) / 8, rng.standard_normal((HIDDEN, 10)) / 8
        self.weight, self.bias = np.ones(HIDDEN), np.zeros(HIDDEN)

    def parameters(self):
        return [self.first, self.second, self.weight, self.bias]

    def step(self, xs, labels):
        """One step of gradient descent on a batch in parts: each pass over the parts keeps what the next one needs, and no more."""
        count = sum(len(x) for x in xs)
        hidden = [x @ self.first for x in xs]
        stats = functools.reduce(cbn.BatchStats.merge, [cbn.batch_stats(h) for h in hidden])
        second_grad, dys, sums = np.zeros_like(self.second), [], []
        for h, label in zip(hidden, labels, strict=True):
            y, _ = cbn.batch_norm_train(h, self.weight, self.bias, stats=stats, activation="relu")
            scores = np.exp(y @ self.second)
            d = scores / scores.sum(1, keepdims=True)
            d[np.arange(len(label)), label] -= 1
            second_grad += y.T @ d / count
            dys.append(d @ self.second.T / count)
            sums.append(cbn.gradient_sums(dys[-1], h, stats, self.weight, self.bias, activation="relu"))
        sums = functools.reduce(cbn.GradientSums.merge, sums)
        first_grad = np.zeros_like(self.first)
        for x, h, dy in zip(xs, hidden, dys, strict=True):
            gradients = cbn.batch_norm_backward(dy, h, stats, self.weight, self.bias, activation="relu", sums=sums)
            first_grad += x.T @ gradients.x
        for parameter, gradient in zip(self.parameters(), (first_grad, second_grad, sums.dy_xhat, sums.dy), strict=True):
            parameter -= RATE * gradient


def main():
    digits = load_digits()
    images, labels = digits.data / 16, digits.target
    accumulated, whole, apart = Network(), Network(), Network()
    rng = np.random.default_rng(1)
    for _ in tqdm(range(STEPS), desc="steps"):
        chosen = rng.integers(0, len(images), BATCH)
        parts = np.split(chosen, range(PART, BATCH, PART))
        accumulated.step([images[p] for p in parts], [labels[p] for p in parts])
        whole.step([images[chosen]], [labels[chosen]])
        apart.step([images[parts[0]]], [labels[parts[0]]])
    for name, network in (("micro-batches of 8, accumulated", accumulated), ("micro-batches of 8, alone", apart)):
        distance = max(abs(a - b).max() for a, b in zip(network.parameters(), whole.parameters(), strict=True))
        print(f"{name}: parameters at most {distance:.1e} from those of whole batches of 64")


if __name__ == "__main__":
    main()
