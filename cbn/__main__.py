"""python -m cbn prints what this installation consists of, for a report of a bug."""

from .config import show_config

show_config()
