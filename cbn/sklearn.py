"""A scikit-learn transformer that standardizes features by stable statistics."""

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from .functional import batch_norm, batch_stats
from .statistics import BatchStats

_DTYPES = (np.float64, np.float32, np.float16)      # any other becomes the first


class Standardizer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Each feature shifted to mean 0 and scaled to variance 1, as by scikit-learn's StandardScaler: z = (x - mean_) / scale_.

    Statistics are computed stably and in float64, whatever the type of X and the offset of a feature. Those of several calls of `partial_fit`
    are merged (Chan, Golub & LeVeque 1983) to the values of one `fit` on all samples, to rounding, for a stream of any length.

    with_mean, with_std : whether to shift, and whether to scale.
    copy : if False, transform and inverse_transform write into X where it is a writeable array of float16, float32 or float64.

    Attributes: mean_, var_ (population variance), scale_ (its root, 1 for a constant feature; None without with_std): float64 arrays of shape
    (n_features,); n_samples_seen_: int or, where features miss different numbers of values, an array of ints; n_features_in_,
    feature_names_in_.

    X is a dense array or DataFrame of shape (n_samples, n_features). NaN stands for a missing value, which is left out of the statistics and
    stays NaN. float16, float32 and float64 keep their type, others become float64. Raises ValueError for infinity, for another number of
    features than fitted, and for a feature whose variance exceeds float64.
    """

    def __init__(self, *, copy=True, with_mean=True, with_std=True):
        self.copy = copy
        self.with_mean = with_mean
        self.with_std = with_std

    def fit(self, X, y=None):
        """Take the statistics of X, forgetting those of before; y is ignored. Returns the transformer."""
        return self._take(X, ())

    def partial_fit(self, X, y=None):
        """Take the statistics of X and of all before together; y is ignored. Returns the transformer."""
        return self._take(X, (self.n_samples_seen_, self.mean_, self.var_) if hasattr(self, "n_samples_seen_") else ())

    def _take(self, X, before):
        X = validate_data(self, X, reset=not before, dtype=_DTYPES, ensure_all_finite="allow-nan")
        counts, mean, var = _statistics(X)
        if before:
            counts, mean, var = _merged(*before, counts, mean, var)
        if self.with_std and np.isinf(var).any():
            raise ValueError(f"X: expected features whose variance float64 has room for, got one beyond for feature {np.isinf(var).argmax()}; "
                             "divide it by a constant")
        self.n_samples_seen_ = int(counts[0]) if np.ptp(counts) == 0 else counts
        self.mean_, self.var_ = mean, var
        self.scale_ = np.sqrt(self._divided_by()) if self.with_std else None
        return self

    def _divided_by(self):
        """The variance that transform divides by the root of."""
        return np.where(self.var_ == 0, 1.0, self.var_) if self.with_std else np.ones_like(self.var_)

    def _shift(self):
        return self.mean_ if self.with_mean else np.zeros_like(self.mean_)

    def _checked(self, X):
        """X as an array, and what to write: itself or, if None, a new array."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=_DTYPES, ensure_all_finite="allow-nan", force_writeable=not self.copy)
        return X, None if self.copy else X

    def transform(self, X):
        """(X - mean_) / scale_, of X's type."""
        X, out = self._checked(X)
        return batch_norm(X, self._shift(), self._divided_by(), eps=0.0, out=out)

    def inverse_transform(self, X):
        """X * scale_ + mean_, of X's type."""
        X, out = self._checked(X)
        return batch_norm(X, np.zeros_like(self.mean_), np.ones_like(self.var_), np.sqrt(self._divided_by()), self._shift(), eps=0.0, out=out)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = [np.dtype(dtype).name for dtype in _DTYPES]
        return tags


def _statistics(X):
    """For each feature, how many values it has, their mean and variance."""
    count, mean, var = batch_stats(X)
    counts = np.full(X.shape[1], count)
    for j in np.flatnonzero(np.isnan(mean)):
        counts[j], mean[j:j + 1], var[j:j + 1] = batch_stats(X[~np.isnan(X[:, j]), j:j + 1])
    return counts, mean, var


def _merged(counts, mean, var, other_counts, other_mean, other_var):
    """The statistics of both samples together: BatchStats.merge of all features that have the same numbers of values."""
    both = np.stack(np.broadcast_arrays(counts, other_counts))
    mean, var = mean.copy(), var.copy()
    for pair in np.unique(both, axis=1).T:
        i = (both.T == pair).all(axis=1)
        _, mean[i], var[i] = BatchStats(int(pair[0]), mean[i], var[i]).merge(BatchStats(int(pair[1]), other_mean[i], other_var[i]))
    return both.sum(axis=0), mean, var
