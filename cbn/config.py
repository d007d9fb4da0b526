"""What this installation consists of and what is in use."""

import os
import platform

import numpy as np

from . import dispatch, memory, threads
from ._version import __version__


def show_config():
    """Print the versions, the CPU levels built, available and in use, OpenMP, the number of threads, and the memory kept."""
    print(f"cbn {__version__}")
    print(f"{platform.python_implementation()} {platform.python_version()}, NumPy {np.__version__}, {platform.platform()}")
    print(f"CPU level: {dispatch.get_isa()} in use; {', '.join(dispatch.isa_built())} built; {', '.join(dispatch.isa_available())} available")
    print(f"OpenMP: {'yes' if threads.has_openmp() else 'no (serial build)'}")
    print(f"threads: up to {threads.get_num_threads()}")
    print(f"memory kept for outputs: up to {memory.get_cache_limit() / (1 << 20):.0f} MiB ({memory.cached_bytes() / (1 << 20):.0f} MiB now)")


def get_include():
    """The directory of cbn.h, for compilers of C code that calls cbn; its first lines say how."""
    return os.path.join(os.path.dirname(__file__), "include")
