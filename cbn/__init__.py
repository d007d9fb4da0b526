"""Batch normalization for NumPy arrays on the CPU."""

from ._version import __version__

try:
    from . import dispatch, functional, memory, threads  # compiled modules
except ImportError as error:
    from .not_importable import explained

    raise explained(error, __path__[0]) from None

from .config import get_include, show_config
from .folding import Folded, fold_conv, fold_linear
from .functional import Gradients, activate, activate_backward, batch_norm, batch_norm_backward, batch_norm_train, batch_stats, gradient_sums
from .images import normalize_images
from .layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .memory import empty_cache, get_cache_limit, set_cache_limit
from .network import load_state_dict, parameters, state_dict
from .statistics import BatchStats, GradientSums
from .threads import get_num_threads, num_threads, set_num_threads
from .weights import from_flax, from_keras, from_onnx, from_torch, to_flax, to_keras, to_onnx, to_torch

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchStats",
    "Folded",
    "GradientSums",
    "Gradients",
    "activate",
    "activate_backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_train",
    "batch_stats",
    "empty_cache",
    "fold_conv",
    "fold_linear",
    "from_flax",
    "from_keras",
    "from_onnx",
    "from_torch",
    "get_cache_limit",
    "get_include",
    "get_num_threads",
    "gradient_sums",
    "load_state_dict",
    "normalize_images",
    "num_threads",
    "parameters",
    "set_cache_limit",
    "set_num_threads",
    "show_config",
    "state_dict",
    "to_flax",
    "to_keras",
    "to_onnx",
    "to_torch",
]
