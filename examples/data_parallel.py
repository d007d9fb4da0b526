"""Trains the digits network in data parallel: each rank has a replica and 4 images of each batch, and normalizes by the statistics of all ranks' images.

    mpiexec -n 4 python -m mpi4py examples/data_parallel.py

Beside it, on the same images: one process with the whole batches, whose parameters are the same to rounding, and replicas that normalize by
their own 4 images.
"""

import argparse

import numpy as np
from mpi4py import MPI
from network import Network, digits, perceptron
from tqdm import tqdm

import cbn

COMM = MPI.COMM_WORLD
HIDDEN = (100, 100)
STD = 0.1
RATE = 0.5
SEED = 0
EVERY = 20  # steps between evaluations
NAMES = ("synchronized", "one process, whole batches", "each rank for itself")


def replica(comm):
    """The network of digits.py, with a hidden layer less, in float64, so that what differs by more than rounding shows."""
    layers = []
    for layer in perceptron(HIDDEN, True, STD, SEED).layers:
        if isinstance(layer, cbn.BatchNorm):
            layer = cbn.BatchNorm1d(layer.num_features, dtype=np.float64, comm=comm)
        elif hasattr(layer, "weight"):
            layer.weight, layer.bias = layer.weight.astype(np.float64), layer.bias.astype(np.float64)
        layers.append(layer)
    return Network(layers)


def parameters(network):
    return np.concatenate([a.ravel() for _, layer in network.trained for a in (layer.weight, layer.bias)])


def gather(a):
    """Of all ranks, in their order: whoever adds up such rows gets the same bits everywhere."""
    everyone = np.empty((COMM.size, a.size), a.dtype)
    COMM.Allgather(a, everyone)
    return everyone


def descend(network, ranks):
    """A step down the mean of the gradients of `ranks` ranks, in one collective for all parameters of the network."""
    gradients = np.concatenate([a.ravel() for _, layer in network.trained for a in (layer.weight_grad, layer.bias_grad)])
    if ranks > 1:
        gradients = gather(gradients).sum(axis=0) / ranks
    start = 0
    for _, layer in network.trained:
        for a in (layer.weight, layer.bias):
            a -= RATE * gradients[start:start + a.size].reshape(a.shape)
            start += a.size


def train(steps, part):
    """Returns the synchronized network and, of rank 0's evaluations, steps, accuracies and distances to whole batches, by name."""
    x, labels, x_test, labels_test = digits(SEED)
    x, x_test = x.astype(np.float64), x_test.astype(np.float64)
    synchronized, whole, alone = replica(COMM), replica(None), replica(None)
    mine = slice(COMM.rank * part, (COMM.rank + 1) * part)
    rng, history = np.random.default_rng(SEED), []
    for step in tqdm(range(1, steps + 1), "steps", disable=COMM.rank > 0):
        batch = rng.choice(len(x), COMM.size * part, replace=False)  # the same on all ranks
        for network in (synchronized, alone):
            network.set_gradients(x[batch[mine]], labels[batch[mine]])
            descend(network, COMM.size)
        if COMM.rank == 0:
            whole.set_gradients(x[batch], labels[batch])
            descend(whole, 1)
            if step % EVERY == 0 or step == steps:
                networks = (synchronized, whole, alone)
                history.append((step, *(n.accuracy(x_test, labels_test) for n in networks),
                                *(abs(parameters(n) - parameters(whole)).max() for n in networks)))
    return synchronized, np.array(history)


def plot(history, part, path):
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    steps, accuracies, distances = history[:, 0], history[:, 1:4].T, history[:, 4:].T
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, accuracy, style in zip(NAMES, accuracies, ("C0-", "k:", "C1-"), strict=True):
        left.plot(steps, accuracy, style, label=name)
    for name, distance, style in ((NAMES[0], distances[0], "C0-"), (NAMES[2], distances[2], "C1-")):
        right.plot(steps, distance, style, label=name)
    left.set(title=f"test accuracy, {COMM.size} ranks of {part} images", xlabel="steps", ylim=(0, 1.02))
    right.set(title="largest difference of a parameter from whole batches", xlabel="steps", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of training (default: %(default)s)")
    parser.add_argument("--part", type=int, default=4, help="images of a batch on each rank (default: %(default)s)")
    parser.add_argument("--output", default="data_parallel.png", help="where the plot goes (default: %(default)s)")
    arguments = parser.parse_args()
    network, history = train(arguments.steps, arguments.part)
    state = np.concatenate([a.ravel() for a in network.state_dict().values()]).astype(np.float64)
    same = (gather(state).view(np.int64) == state.view(np.int64)).all()
    if not COMM.allreduce(same, MPI.LAND):
        raise SystemExit("replicas differ")
    if COMM.rank == 0:
        print(f"parameters and running statistics of the {COMM.size} synchronized replicas: the same bits")
        for name, accuracy, distance in zip(NAMES, history[-1, 1:4], history[-1, 4:], strict=True):
            print(f"{name}: test accuracy {accuracy:.1%}, parameters at most {distance:.1e} from those of whole batches")
        plot(history, arguments.part, arguments.output)


if __name__ == "__main__":
    main()
