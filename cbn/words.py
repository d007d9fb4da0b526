"""What errors and warnings have in common: showing what came, and pointing at the line outside of cbn that caused it."""

import sys
import warnings


def show(value):
    """What came, for an error: its repr, or no more than its type where that is long or fails."""
    try:
        text = repr(value)
    except Exception:
        text = ""
    return text if 0 < len(text) <= 500 else f"an object of type {type(value).__name__}"


def warn(message):
    """A UserWarning, by Python's default shown once for each message and line."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_globals.get("__name__", "").startswith("cbn."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
