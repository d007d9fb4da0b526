"""Saves a network in the midst of its training on handwritten digits, and goes on from the file to the bits that it would have without the pause.

As an npz file and, where safetensors is installed, as one of those. Both hold the layers' configurations, too, so that a network with another
epsilon, say, is not trained on by mistake.
"""

import pathlib
import tempfile

import numpy as np
from network import digits, perceptron

import cbn

try:
    from safetensors.numpy import load_file, save_file
except ImportError:
    save_file = None

HIDDEN, STD, RATE, STEPS = (64, 32), 0.1, 0.5, 200


def train(network, seed):
    x, labels, *test = digits(0)
    for _ in network.train(x, labels, STEPS, RATE, seed):
        pass
    return network.accuracy(*test)


def main():
    network = perceptron(HIDDEN, True, STD, seed=0)
    print(f"after {STEPS} steps: {train(network, seed=1):.1%} of the test set")
    with tempfile.TemporaryDirectory() as folder:
        npz, safetensors = (str(pathlib.Path(folder) / name) for name in ("network.npz", "network.safetensors"))
        np.savez(npz, **cbn.state_dict(network.trained))
        if save_file is not None:
            save_file(cbn.state_dict(network.trained), safetensors)
        print(f"after {2 * STEPS}: {train(network, seed=2):.1%}")
        for name, load in (("npz", lambda: np.load(npz)), ("safetensors", save_file and (lambda: load_file(safetensors)))):
            if load:
                resumed = perceptron(HIDDEN, True, STD, seed=3)
                cbn.load_state_dict(resumed.trained, load())
                print(f"resumed from {name}: {train(resumed, seed=2):.1%}, {'the same bits' if same(resumed, network) else 'other bits'}")
        other = {
            name: cbn.BatchNorm1d(layer.num_features, eps=1e-3) for name, layer in network.trained.items() if isinstance(layer, cbn.BatchNorm)
        }
        try:
            cbn.load_state_dict(other, np.load(npz))
        except ValueError as error:
            print(f"\ninto other layers: {error}")


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(cbn.state_dict(a.trained).values(), cbn.state_dict(b.trained).values(), strict=True))


if __name__ == "__main__":
    main()
