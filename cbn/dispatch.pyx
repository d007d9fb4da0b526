"""What suits this machine, found once at import: the kernels for its CPU level, and the size beyond which stores bypass its caches.

The environment variables CBN_ISA and CBN_STREAM_BYTES, or set_isa() and set_stream_bytes(), force either.
"""

import importlib
import importlib.util
import os

from cpython.pycapsule cimport PyCapsule_GetPointer

from .words import show

cdef extern from "cpu.h":
    bint cpu_has_avx2()
    bint cpu_has_avx512()
    bint cpu_fetches()
    long last_level_cache()
    long second_level_cache()

# Of a core's own cache, what a thread can count on to find again what it has just read.
core_cache = 0.75 * (second_level_cache() or 1 << 20)
fetches = cpu_fetches()

_supported = {"avx512": bool(cpu_has_avx512()), "avx2": bool(cpu_has_avx2()), "baseline": True}     # best first
_current = None


def isa_built():
    """The CPU levels this installation has kernels for, best first."""
    return [name for name in _supported if importlib.util.find_spec(f"cbn.kernels.{name}_float32") is not None]


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
    global _current
    cdef int stored
    if not isinstance(name, str) or name not in isa_available():
        raise ValueError(f"CPU level: expected one of {', '.join(isa_available())} (built here and supported by this CPU), got {show(name)}")
    modules = [importlib.import_module(f"cbn.kernels.{name}_{elements}") for elements in ("float32", "float64", "float16", "bfloat16")]      # as Job.stored counts
    for stored in range(4):
        tables[stored] = <Table*>PyCapsule_GetPointer(modules[stored].capsule, "cbn.kernels.Table")
    _current = name


def get_stream_bytes():
    """The size of a call's arrays, together, beyond which outputs are written past the caches."""
    return stream_bytes


def set_stream_bytes(size):
    """Write outputs past the caches where a call's arrays are together larger than `size` bytes; results don't depend on it."""
    global stream_bytes
    try:
        number = float(size)
    except Exception:
        number = -1.0
    if not number >= 0:
        raise ValueError(f"size: expected a number of bytes >= 0, got {show(size)}")
    stream_bytes = number


def _usable_cache():
    """The last-level cache that can be counted on.

    A virtual machine sees the whole cache of a server that it shares with others, so no more than 32 MB a core are counted on. (On a 2-core slice of
    a 480 MB cache, stores past the caches win nothing up to 64 MB a call, and from about 100 MB on they win.)
    """
    return min(last_level_cache() or 32 << 20, (os.cpu_count() or 1) * (32 << 20))


def _start():
    if not isa_available():     # which boundscheck=False below would not notice
        raise ImportError("expected the kernels' compiled modules, found none", name=__name__)
    for name, set_it, default in (("CBN_STREAM_BYTES", set_stream_bytes, _usable_cache), ("CBN_ISA", set_isa, lambda: isa_available()[0])):
        setting = os.environ.get(name)
        try:
            set_it(setting or default())
        except ValueError as error:
            if not setting:
                raise
            raise ImportError(f"environment variable {name}: {error} [set to {setting!r}]") from None


_start()
