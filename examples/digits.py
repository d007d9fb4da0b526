"""Figure 1 of Ioffe & Szegedy 2015 on scikit-learn's handwritten digits: a network of sigmoids learns sooner with batch normalization.

The network is that of their section 4.1: three hidden layers of 100 sigmoid units, batches of 60, plain SGD, small Gaussian weights.
With and without, it starts from the same weights and sees the same batches at the same learning rate.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
from network import digits, perceptron
from tqdm import tqdm

import cbn

HIDDEN = (100, 100, 100)
STD = 0.1
RATE = 0.5
SEED = 0
EVERY = 20  # steps between evaluations
UNIT = 0  # of the last hidden layer: the sigmoid whose input is plotted


def inputs_of_last_sigmoids(network, x):
    """In inference mode; batch normalization otherwise computes the sigmoids in the same pass."""
    last, v = network.layers[-2], network.infer(x, slice(-2))
    if isinstance(last, cbn.BatchNorm):
        v = cbn.batch_norm(v, last.running_mean, last.running_var, last.weight, last.bias, eps=last.eps)
    return v


def follow(network, steps, name):
    """Train; return, of each evaluation, the step, the test accuracy in inference mode, and the 15th, 50th and 85th percentiles,
    over the test set, of the inputs of the last hidden layer's sigmoids: shape (3, evaluations, units)."""
    x, labels, x_test, labels_test = digits(SEED)
    evaluated, accuracies, percentiles = [], [], []
    for step in tqdm(network.train(x, labels, steps, RATE, SEED), name, steps):
        if step % EVERY == 0 or step == steps:
            evaluated.append(step)
            accuracies.append(network.accuracy(x_test, labels_test))
            percentiles.append(np.percentile(inputs_of_last_sigmoids(network, x_test), (15, 50, 85), axis=0))
    return np.array(evaluated), np.array(accuracies), np.stack(percentiles, axis=1)


def report(runs):
    for name, (steps, accuracies, (low, median, high)) in runs.items():
        spread = (high - low).mean(axis=1)
        print(f"\n{name}")
        print(f"  test accuracy after {steps[-1]} steps, in inference mode: {accuracies[-1]:.2%}")
        print(f"  input of a last hidden sigmoid over the test set, mean of the {median.shape[1]} sigmoids:")
        print(f"    its median moves within a range of {np.ptp(median, axis=0).mean():.2f}")
        print(f"    its 15th and 85th percentiles are {spread[0]:.2f} apart at step {steps[0]}, {spread[-1]:.2f} at step {steps[-1]}")
    (steps, plain, _), (_, normalized, _) = runs.values()
    goal = plain[-1]
    plain_steps = steps[plain >= goal][0]
    print(f"\nsteps to a test accuracy of {goal:.2%}, the one that the network without ends with:")
    if normalized.max() < goal:
        print(f"  {plain_steps} without, more than {steps[-1]} with batch normalization")
        return
    normalized_steps = steps[normalized >= goal][0]
    print(f"  {plain_steps} without (where it first gets there), {normalized_steps} with batch normalization: "
          f"{plain_steps / normalized_steps:.1f} times fewer")


def plot(runs, path):
    plt.switch_backend("Agg")
    figure, (left, *others) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for color, axes, (name, (steps, accuracies, (low, median, high))) in zip(("C1", "C0"), others, runs.items()):
        left.plot(steps, accuracies, color, label=name)
        axes.plot(steps, median[:, UNIT], color, label="median of the test set")
        axes.fill_between(steps, low[:, UNIT], high[:, UNIT], color=color, alpha=0.25, linewidth=0, label="15th to 85th percentile")
        axes.set(title=name, xlabel="steps", ylabel="input of a sigmoid of the last hidden layer")
        axes.sharey(others[0])
    others[0].legend(loc="upper right")
    left.set(title="test accuracy, in inference mode", xlabel="steps", xscale="log", ylim=(0, 1.02))
    left.grid(alpha=0.3)
    left.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="of training, for each network (default: %(default)s)")
    parser.add_argument("--output", default="digits.png", help="where the plot goes (default: %(default)s)")
    arguments = parser.parse_args()
    runs = {}
    for normalized, name in ((False, "without batch normalization"), (True, "with batch normalization")):
        runs[name] = follow(perceptron(HIDDEN, normalized, STD, SEED), arguments.steps, name)
    report(runs)
    plot(runs, arguments.output)


if __name__ == "__main__":
    main()
