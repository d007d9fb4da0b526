"""Warnings that point at the line outside of cbn that caused them."""

import sys
import warnings


def warn(message):
    """A UserWarning, by Python's default shown once for each message and line."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_globals.get("__name__", "").startswith("cbn."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
