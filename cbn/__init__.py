"""Batch normalization for NumPy arrays on the CPU."""

from ._version import __version__
from .config import show_config
from .functional import Gradients, batch_norm, batch_norm_backward, batch_norm_train, batch_stats
from .layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .statistics import BatchStats
from .threads import get_num_threads, num_threads, set_num_threads

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchStats",
    "Gradients",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_train",
    "batch_stats",
    "get_num_threads",
    "num_threads",
    "set_num_threads",
    "show_config",
]
