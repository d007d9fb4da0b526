"""Trains the convolutional network of the service; writes its weights and running statistics, and the digits kept for testing."""

import argparse

import numpy as np
from network import convolutional, digits

from .model import TEST_SET, WEIGHTS, load

SEED = 0
RATE = 0.1


def main():
    parser = argparse.ArgumentParser(prog="python -m service.train", description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of training (default: %(default)s)")
    steps = parser.parse_args().steps
    try:
        x, labels, x_test, labels_test = digits(SEED)
    except ModuleNotFoundError as error:
        parser.exit(1, f"{parser.prog}: {error}, which has the digits: pip install scikit-learn\n")
    network = convolutional(SEED)
    for _ in network.train(x, labels, steps, RATE, SEED):
        pass
    np.savez(WEIGHTS, **network.state_dict())
    np.savez_compressed(TEST_SET, images=np.rint(x_test * 255).astype(np.uint8).reshape(-1, 8, 8), labels=labels_test.astype(np.uint8))
    print(f"accuracy on {len(x_test)} digits it was not trained on: {load().accuracy(x_test, labels_test):.2%}")
    for path in (WEIGHTS, TEST_SET):
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
