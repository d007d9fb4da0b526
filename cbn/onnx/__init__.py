"""cbn beside ONNX: a model's batch normalizations folded into its layers, and BatchNormalization as an operator."""

try:
    import onnx  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('cbn.onnx needs the package onnx: pip install "cbn[onnx]"', name=error.name) from error

from .fold import fold
from .operator import operators, runtime_library
from .report import Report

__all__ = ["Report", "fold", "operators", "runtime_library"]
