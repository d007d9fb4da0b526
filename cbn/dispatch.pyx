"""Chooses the kernels for this CPU, once at import; the environment variable CBN_ISA or set_isa() force a level."""

import importlib
import importlib.util
import os

from cpython.pycapsule cimport PyCapsule_GetPointer

cdef extern from "cpu.h":
    bint cpu_has_avx2()
    bint cpu_has_avx512()

_supported = {"avx512": bool(cpu_has_avx512()), "avx2": bool(cpu_has_avx2()), "baseline": True}     # best first
_current = None


def isa_built():
    """The CPU levels this installation has kernels for, best first."""
    return [name for name in _supported if importlib.util.find_spec(f"cbn.kernels.{name}") is not None]


def isa_available():
    """The CPU levels that are built and that this machine can run, best first."""
    return [name for name in isa_built() if _supported[name]]


def get_isa():
    """The CPU level in use: "baseline", "avx2" or "avx512"."""
    return _current


def set_isa(name):
    """Use the kernels of one CPU level from now on, in all threads; results don't depend on it.

    Raises ValueError where the name is unknown, not built, or more than this machine can run.
    """
    global table, _current
    if name not in isa_available():
        raise ValueError(f"CPU level: expected one of {', '.join(isa_available())} (built here and supported by this CPU), got {name!r}")
    table = <Table*>PyCapsule_GetPointer(importlib.import_module(f"cbn.kernels.{name}").capsule, "cbn.kernels.Table")
    _current = name


def _start():
    forced = os.environ.get("CBN_ISA")
    if forced:
        try:
            return set_isa(forced)
        except ValueError as error:
            raise ImportError(f"environment variable CBN_ISA: {error}") from None
    set_isa(isa_available()[0])


_start()
