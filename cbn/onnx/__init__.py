"""cbn beside ONNX: a model's batch normalizations folded into its layers, and BatchNormalization as an operator."""

from .fold import fold
from .operator import operators, runtime_library
from .report import Report

__all__ = ["Report", "fold", "operators", "runtime_library"]
