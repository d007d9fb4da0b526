"""The statistics of a batch, and how those of several batches combine."""

from typing import NamedTuple

import numpy as np

from .words import show


class BatchStats(NamedTuple):
    """Statistics of each channel over `count` values.

    count : int, values per channel.
    mean, var : float64 arrays of shape (C,); var is the population variance, sum((x - mean)**2) / count. NaN where count is 0.
    """

    count: int
    mean: np.ndarray
    var: np.ndarray

    def merge(self, other):
        """The statistics of both batches taken together: Chan, Golub & LeVeque 1983, eq. 1.5.

        other : BatchStats of as many channels. Raises TypeError for anything else, ValueError where the numbers of channels differ.
        """
        if not isinstance(other, BatchStats):
            raise TypeError(f"other: expected BatchStats, got {type(other).__name__}")
        for name in ("mean", "var"):
            a = getattr(other, name)
            if type(a) is not np.ndarray or a.ndim != 1 or a.dtype.kind != "f":
                raise TypeError(f"other.{name}: expected an array of floats of shape (C,), got {show(a)}")
        if isinstance(other.count, (bool, np.bool_)) or not isinstance(other.count, (int, np.integer)) or not 0 <= other.count < 1 << 62:
            raise TypeError(f"other.count: expected a number of values, got {show(other.count)}")
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"other: expected statistics of {self.mean.shape[0]} channels, got {other.mean.shape[0]}")
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        with np.errstate(all="ignore"):     # NaN and infinity as IEEE arithmetic says, whatever the caller's errors are
            delta = other.mean - self.mean
            mean = self.mean + delta * (other.count / count)
            var = (self.count * self.var + other.count * other.var + delta**2 * (self.count * other.count / count)) / count
        return BatchStats(count, mean, var)

    @property
    def unbiased_var(self):
        """sum((x - mean)**2) / (count - 1), what running variances are updated with."""
        with np.errstate(all="ignore"):
            return self.var * (self.count / (self.count - 1)) if self.count > 1 else np.full_like(self.var, np.nan)


def merged(counts, means, variances):
    """The BatchStats of several batches taken together, of float64 arrays of shape (batches,), (batches, C) and (batches, C).

    What merging one after the other gives, to rounding, in less time; the same bits on every machine.
    """
    full = np.flatnonzero(counts)
    if full.size <= 1:
        one = full[0] if full.size else 0
        return BatchStats(int(counts[one]), means[one].copy(), variances[one].copy())
    if full.size < counts.size:
        counts, means, variances = counts[full], means[full], variances[full]
    count = counts.sum()
    shares = (counts / count)[:, np.newaxis]
    with np.errstate(all="ignore"):
        parts = means - means[0]        # one array for all that is of this size: fresh memory would cost more than the arithmetic
        parts *= shares
        mean = means[0] + parts.sum(axis=0)
        np.subtract(means, mean, out=parts)
        parts *= parts
        parts += variances
        parts *= shares
        var = parts.sum(axis=0)
    return BatchStats(int(count), mean, var)


class GradientSums(NamedTuple):
    """What the gradients of a batch need of all its parts, for each channel: the gradients of bias and weight, too.

    dy : sum(dy), a float64 array of shape (C,).
    dy_xhat : sum(dy * xhat), with xhat = (x - mean) / sqrt(var + eps).
    """

    dy: np.ndarray
    dy_xhat: np.ndarray

    def merge(self, other):
        """The sums of both parts. Raises TypeError for anything but GradientSums, ValueError where the numbers of channels differ."""
        if not isinstance(other, GradientSums):
            raise TypeError(f"other: expected GradientSums, got {type(other).__name__}")
        for name in ("dy", "dy_xhat"):
            a = getattr(other, name)
            if type(a) is not np.ndarray or a.ndim != 1 or a.dtype.kind != "f":
                raise TypeError(f"other.{name}: expected an array of floats of shape (C,), got {show(a)}")
            if a.shape != self.dy.shape:
                raise ValueError(f"other.{name}: expected sums of {self.dy.shape[0]} channels, got {a.shape[0]}")
        with np.errstate(all="ignore"):
            return GradientSums(self.dy + other.dy, self.dy_xhat + other.dy_xhat)
