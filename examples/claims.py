"""What is said of batch normalization, put to the test on scikit-learn's handwritten digits: the figures of each claim, held or not.

The networks are those of digits.py. Every training is repeated over seeds, each with its own split of the data, initial weights and
order of batches, the same with and without batch normalization. Accuracies are those of inference mode.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
from network import digits, perceptron
from tqdm import tqdm

HIDDEN = (100, 100, 100)
STD = 0.1
RATE = 0.5
SEEDS = range(5)
EVERY = 50  # steps between evaluations
GOAL = 0.95  # the test accuracy to reach
RATES = (1, 10, 30)  # factors of RATE
STDS = (0.1, 1, 10)  # factors of STD
DEPTHS = (2, 4, 8, 16)
NEAR = 0.02  # accuracies less apart than this count as equal: over 597 test digits one of 0.95 has a standard error of 0.009

NAMES = {False: "without", True: "with"}
COLORS = {False: "C1", True: "C0"}


def train(normalized, of_rate, of_std, seed, steps, progress):
    """The test accuracy at each evaluation, then the training accuracy at the end."""
    x, labels, x_test, labels_test = digits(seed)
    network = perceptron(HIDDEN, normalized, STD * of_std, seed)
    accuracies = []
    for step in network.train(x, labels, steps, RATE * of_rate, seed):
        if step % EVERY == 0:
            accuracies.append(network.accuracy(x_test, labels_test))
        progress.update()
    return [*accuracies, network.accuracy(x, labels)]


def first_gradient(normalized, depth, seed):
    """The norm of the gradient of the first layer's weights before training, over the training set."""
    x, labels, _, _ = digits(seed)
    network = perceptron((100,) * depth, normalized, STD, seed)
    network.set_gradients(x, labels)
    return np.linalg.norm(network.layers[0].weight_grad)


def measure(steps):
    """Test accuracies by (normalized, factor of the rate, factor of std), shape (seeds, evaluations); training accuracies at the end,
    likewise, shape (seeds,); gradient norms by normalized, shape (seeds, depths)."""
    settings = [(of_rate, 1) for of_rate in RATES] + [(1, of_std) for of_std in STDS if of_std != 1]
    test, training = {}, {}
    with tqdm(total=len(NAMES) * len(settings) * len(SEEDS) * steps, unit="step") as progress:
        for setting in [(normalized, *setting) for normalized in NAMES for setting in settings]:
            runs = np.array([train(*setting, seed, steps, progress) for seed in SEEDS])
            test[setting], training[setting] = runs[:, :-1], runs[:, -1]
    gradients = {normalized: np.array([[first_gradient(normalized, depth, seed) for depth in DEPTHS] for seed in SEEDS])
                 for normalized in NAMES}
    return test, training, gradients


def table(header, row):
    """Print the cells of the header, and those of row(normalized) without and with batch normalization."""
    for name, cells in (("", header), *((NAMES[normalized], row(normalized)) for normalized in NAMES)):
        print(f"  {name:10}" + "".join(f"{cell:>12}" for cell in cells))


def conclude(held, criterion):
    print(f"  {'HELD' if held else 'NOT HELD'}. Criterion: {criterion}")


def report(test, training, gradients):
    steps = EVERY * test[False, 1, 1].shape[1]
    print(f"Means over {len(SEEDS)} seeds, {steps} steps each; learning rate {RATE} and initial weights of standard deviation {STD} are x1")

    # A seed that never gets there counts as infinitely many steps, which a median takes.
    reached = {normalized: np.median([EVERY * (1 + np.argmax(run >= GOAL)) if run.max() >= GOAL else np.inf for run in test[normalized, 1, 1]])
               for normalized in NAMES}
    print(f"\nFaster training: median of the steps to a test accuracy of {GOAL:.0%}")
    table(["steps"], lambda normalized: [f"{reached[normalized]:.0f}" if reached[normalized] < np.inf else "not reached"])
    conclude(reached[True] <= reached[False] / 2 and reached[True] < np.inf, "at most half as many steps with")

    final = {setting: accuracies[:, -1].mean() for setting, accuracies in test.items()}

    of_rates = {normalized: np.array([final[normalized, factor, 1] for factor in RATES]) for normalized in NAMES}
    print("\nHigher learning rates: test accuracy at the end")
    table([f"x{factor}" for factor in RATES], lambda normalized: [f"{value:.1%}" for value in of_rates[normalized]])
    below = {normalized: of_rates[normalized].max() - of_rates[normalized][-1] for normalized in NAMES}
    conclude(below[True] < NEAR <= below[False], f"the highest rate is within {NEAR:.0%} of the best with, and not without")

    of_stds = {normalized: np.array([final[normalized, 1, factor] for factor in STDS]) for normalized in NAMES}
    print("\nLess care with initialization: test accuracy at the end, initial weights scaled by")
    table([f"x{factor}" for factor in STDS], lambda normalized: [f"{value:.1%}" for value in of_stds[normalized]])
    conclude(np.ptp(of_stds[True]) < NEAR <= np.ptp(of_stds[False]), f"all within {NEAR:.0%} of each other with, and not without")

    norms = {normalized: gradients[normalized].mean(axis=0) for normalized in NAMES}
    print("\nGradients neither vanish nor explode: norm at the first layer before training, of networks by hidden layers")
    table(DEPTHS, lambda normalized: [f"{value:.1e}" for value in norms[normalized]])
    ratio = {normalized: norms[normalized].max() / norms[normalized].min() for normalized in NAMES}
    conclude(ratio[True] < 10 <= ratio[False], "all within a factor of 10 with, and not without")

    print("\nGeneralization: accuracy at the end")
    table(["training", "test"], lambda normalized: [f"{training[normalized, 1, 1].mean():.2%}", f"{final[normalized, 1, 1]:.2%}"])
    gain = test[True, 1, 1][:, -1] - test[False, 1, 1][:, -1]
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    print(f"  test accuracy with minus without: {gain.mean():+.2%} with a standard error of {error:.2%}")
    conclude(gain.mean() > 2 * error, "higher test accuracy with, by more than two standard errors")


def plot(test, training, gradients, path):
    plt.switch_backend("Agg")
    figure, ((faster, rates, stds), (depths, generalization, legend)) = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for shift, (normalized, name) in zip((-0.2, 0.2), NAMES.items()):
        style = {"color": COLORS[normalized], "label": f"{name} batch normalization"}
        for run in test[normalized, 1, 1]:
            faster.plot(EVERY * np.arange(1, len(run) + 1), run, linewidth=0.8, **style)
        for axes, settings in ((rates, [(factor, 1) for factor in RATES]), (stds, [(1, factor) for factor in STDS])):
            finals = np.array([test[(normalized, *setting)][:, -1] for setting in settings])
            axes.bar(np.arange(len(settings)) + shift, finals.mean(axis=1), 0.4, **style)
            axes.plot(np.arange(len(settings)) + shift, finals, "k.", markersize=3)
        depths.plot(DEPTHS, gradients[normalized].mean(axis=0), "o-", **style)
        accuracies = np.array([training[normalized, 1, 1], test[normalized, 1, 1][:, -1]])
        generalization.bar(np.arange(2) + shift, accuracies.mean(axis=1), 0.4, **style)
        generalization.plot(np.arange(2) + shift, accuracies, "k.", markersize=3)
    faster.axhline(GOAL, color="gray", linewidth=0.8, linestyle=":")
    faster.set(title="faster training", xlabel="steps", ylabel="test accuracy", xscale="log", ylim=(0, 1.02))
    rates.set(title="higher learning rates", xlabel="learning rate", ylabel="final test accuracy", ylim=(0, 1.02))
    rates.set_xticks(range(len(RATES)), [f"x{factor}" for factor in RATES])
    stds.set(title="less care with initialization", xlabel="scale of the initial weights", ylabel="final test accuracy", ylim=(0, 1.02))
    stds.set_xticks(range(len(STDS)), [f"x{factor}" for factor in STDS])
    depths.set(title="gradients neither vanish nor explode", xlabel="hidden layers", ylabel="gradient norm, first layer", yscale="log")
    depths.set_xticks(DEPTHS)
    generalization.set(title="generalization", ylabel="final accuracy (cut at 90%)", ylim=(0.9, 1.005))
    generalization.set_xticks(range(2), ["training", "test"])
    legend.axis("off")
    legend.legend(*depths.get_legend_handles_labels(), loc="center", title="bars: means over seeds\ndots, thin lines: seeds")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help=f"of each training, a multiple of {EVERY} (default: %(default)s)")
    parser.add_argument("--output", default="claims.png", help="where the plot goes (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < EVERY or arguments.steps % EVERY:
        parser.error(f"--steps: expected a multiple of {EVERY}, got {arguments.steps}")
    results = measure(arguments.steps)
    report(*results)
    plot(*results, arguments.output)


if __name__ == "__main__":
    main()
