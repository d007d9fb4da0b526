"""The two everyday uses of a batch normalization: after a convolution, on photographs, and after a dense layer, on a table.

Each time: some batches in training mode, what they do to the channels, then inference, compared with the formula in float64.
Last, convolution, normalization and ReLU of a residual network in the three forms there are, side by side: apart, fused, and folded.
The convolution is NumPy's. Its weights and the dense layer's are random: it is the normalization that is shown.
"""

from statistics import median
from time import perf_counter

import numpy as np
from sklearn.datasets import load_diabetes, load_sample_images

import cbn

PATCH = 32  # pixels on a side
BATCH = 40
EPOCHS = 5
CHANNELS_SHOWN = 16
FEATURES = (8, 64, 56, 56)  # N, C, H, W of a residual network's first blocks
TIMED = 5  # calls


def convolution(x, weight):
    """3x3, with padding 1: x (N, C, H, W), weight (K, C, 3, 3), result (N, K, H, W)."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(len(x), -1, x.shape[2] * x.shape[3])
    return (weight.reshape(len(weight), -1) @ columns).reshape(len(x), -1, *x.shape[2:])


def relu(x, out=None):
    return np.maximum(x, 0, out=out)


def patches():
    """Squares of the sample photographs, channels first: (N, 3, PATCH, PATCH), values in [0, 1]."""
    x = np.stack(load_sample_images().images).astype(np.float32) / 255
    rows, columns = x.shape[1] // PATCH, x.shape[2] // PATCH
    x = x[:, :rows * PATCH, :columns * PATCH].reshape(-1, rows, PATCH, columns, PATCH, 3)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3, PATCH, PATCH)


def formula(x, norm):
    """What a layer computes at inference, written down in float64."""
    weight, bias, mean, var = (a.astype(np.float64).reshape(-1, *[1] * (x.ndim - 2))
                               for a in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    return weight * (x - mean) / np.sqrt(var + norm.eps) + bias


def show(title, linear, norm, x, rng):
    """Train on all batches of x but the last few rows, which are for inference."""
    x = rng.permutation(x)
    held_out = BATCH + len(x) % BATCH
    for _ in range(EPOCHS):
        for batch in rng.permutation(x[:-held_out]).reshape(-1, BATCH, *x.shape[1:]):
            before = linear(batch)
            after = norm(before)
            y = relu(after)

    print(f"{title}: {batch.shape} to {y.shape}, {norm.num_batches_tracked} batches")
    print("  in training mode, last batch:   before normalization        after")
    print("                       channel        mean       std      mean       std")
    axes = (0, *range(2, y.ndim))
    figures = [f(a, axis=axes, dtype=np.float64) for a in (before, after) for f in (np.mean, np.std)]
    for channel, values in enumerate(np.transpose(figures)[:CHANNELS_SHOWN]):
        values = values.round(4) + 0.0  # no -0.0000
        print(f"{channel:30} {values[0]:11.4f} {values[1]:9.4f} {values[2]:9.4f} {values[3]:9.4f}")
    print(f"  after, over all {norm.num_features} channels: |mean| at most {np.abs(figures[2]).max():.1e}, "
          f"|std - 1| at most {np.abs(figures[3] - 1).max():.1e} (eps takes a little from it)")

    norm.eval()
    before = linear(x[-held_out:])
    y = relu(norm(before))
    expected = relu(formula(before, norm))
    print(f"  at inference, {len(y)} others: |y| at most {np.abs(y).max():.2f}, {np.mean(y == 0):.0%} zeros; "
          f"difference from the formula in float64 at most {np.abs(y - expected).max():.1e}\n")


def timed(function, *arguments):
    """What the function returns, and milliseconds: the median of some calls, after one to warm up."""
    times = []
    for _ in range(1 + TIMED):
        start = perf_counter()
        result = function(*arguments)
        times.append(perf_counter() - start)
    return result, 1e3 * median(times[1:])


def forms(rng):
    """The three forms on the same feature maps, without and with a residual; checks that fused is of the same bits as apart, and folded close."""
    x, residual = rng.standard_normal((2, *FEATURES), np.float32)
    weight = rng.normal(0, 0.05, (FEATURES[1], FEATURES[1], 3, 3)).astype(np.float32)
    norm, fused = cbn.BatchNorm2d(FEATURES[1]), cbn.BatchNorm2d(FEATURES[1], activation="relu")
    norm.weight[...], norm.bias[...] = rng.uniform(0.5, 1.5, norm.weight.shape), rng.normal(0, 0.3, norm.bias.shape)
    norm(convolution(x, weight))  # some running statistics
    folded = cbn.fold_conv(weight, None, norm)
    convolved, convolved_folded = timed(convolution, x, weight), timed(convolution, x, folded.weight)
    out = np.empty_like(x)

    def apart(before, added):
        y = norm(before, out=out)
        if added is not None:
            y += added
        return relu(y, out=y)

    def at_once(before, added):
        return fused(before, residual=added, out=out)

    def folded_away(before, added):  # of a convolution that has the normalization in its weight
        return cbn.activate(before, "relu", bias=folded.bias, residual=added, out=out)

    print(f"convolution, batch normalization, ReLU in three forms: {FEATURES}, {cbn.get_num_threads()} threads, milliseconds")
    print("                                   convolution  what follows   from apart")
    for mode, added in (("inference", None), ("inference", residual), ("training", None), ("training", residual)):
        norm.train(mode == "training"), fused.train(mode == "training")
        fused.load_state_dict(norm.state_dict())
        expected = None
        for name, (before, milliseconds), follow in (
            ("apart", convolved, apart), ("fused", convolved, at_once), ("folded", convolved_folded, folded_away),
        )[:2 if norm.training else 3]:  # in training, the statistics to fold are not known beforehand  # fmt: skip
            y, followed = timed(follow, before, added)
            expected = y.copy() if expected is None else expected
            difference = np.abs(y - expected).max() / np.abs(expected).max()
            assert difference <= 1e-5 and (name != "fused" or y.tobytes() == expected.tobytes())
            what = "same bits" if y.tobytes() == expected.tobytes() else f"{difference:.0e}"
            print(f"  {mode:<11}{'+ residual' if added is not None else '':<12}{name:<8}{milliseconds:13.1f}{followed:14.2f}{what:>13}")


def main():
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1 / np.sqrt(27), (16, 3, 3, 3)).astype(np.float32)
    show("convolution, batch normalization, ReLU", lambda x: convolution(x, weight), cbn.BatchNorm2d(16), patches(), rng)

    table = load_diabetes(scaled=False).data.astype(np.float32)
    dense = rng.normal(0, 1 / np.sqrt(10), (10, 128)).astype(np.float32)
    show("dense layer, batch normalization, ReLU", lambda x: x @ dense, cbn.BatchNorm1d(128), table, rng)

    forms(rng)


if __name__ == "__main__":
    main()
