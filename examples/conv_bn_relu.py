"""The two everyday uses of a batch normalization: after a convolution, on photographs, and after a dense layer, on a table.

Each time: some batches in training mode, what they do to the channels, then inference, compared with the formula in float64.
The convolution is NumPy's. Its weights and the dense layer's are random: it is the normalization that is shown.
"""

import numpy as np
from sklearn.datasets import load_diabetes, load_sample_images

import cbn

PATCH = 32  # pixels on a side
BATCH = 40
EPOCHS = 5
CHANNELS_SHOWN = 16


def convolution(x, weight):
    """3x3, with padding 1: x (N, C, H, W), weight (K, C, 3, 3), result (N, K, H, W)."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,kcij->nkhw", windows, weight, optimize=True)


def relu(x):
    return np.maximum(x, 0)


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


def main():
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1 / np.sqrt(27), (16, 3, 3, 3)).astype(np.float32)
    show("convolution, batch normalization, ReLU", lambda x: convolution(x, weight), cbn.BatchNorm2d(16), patches(), rng)

    table = load_diabetes(scaled=False).data.astype(np.float32)
    dense = rng.normal(0, 1 / np.sqrt(10), (10, 128)).astype(np.float32)
    show("dense layer, batch normalization, ReLU", lambda x: x @ dense, cbn.BatchNorm1d(128), table, rng)


if __name__ == "__main__":
    main()
