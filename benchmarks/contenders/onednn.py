"""oneDNN, through its C interface: plain arrays, channels first (nchw) or last (nhwc)."""

import ctypes
import importlib.metadata

import numpy as np
from workloads import EPS

from . import Cannot, aligned, aligned_elements, parameters

# Values of dnnl_types.h (oneDNN 3).
CPU, F32, DEFAULT_FLAGS = 1, 3, 1
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
USE_GLOBAL_STATS, USE_SCALE_AND_SHIFT = 1, 6
SRC, DST, MEAN, VARIANCE, SCALE, SHIFT, DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 1, 17, 49, 50, 51, 52, 129, 145, 255, 256
Dims = ctypes.c_int64 * 12
Handle = ctypes.c_void_p


class Argument(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_int), ("memory", Handle)]


class Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int)]


library = next(f.locate().resolve() for f in importlib.metadata.files("onednn-cpu-gomp") if f.name == "libdnnl.so.3")
dnnl = ctypes.PyDLL(str(library))  # a call that keeps the GIL is cheaper
dnnl.dnnl_version.restype = ctypes.POINTER(Version)


def create(function, *arguments):
    """The handle that the function makes. None is ever destroyed: they are small, and the arrays belong to NumPy."""
    handle = Handle()
    status = getattr(dnnl, function)(ctypes.byref(handle), *arguments)
    if status:
        raise Cannot(f"{function} returns status {status}")
    return handle


engine = create("dnnl_engine_create", CPU, ctypes.c_size_t(0))
stream = create("dnnl_stream_create", engine, DEFAULT_FLAGS)


def versions():
    version = dnnl.dnnl_version().contents
    return f"oneDNN {version.major}.{version.minor}.{version.patch}"


def plain(cell):
    """The descriptor of the cell's arrays, seen as (N, C, S, 1)."""
    n, c, s = cell.batch, cell.channels, cell.spatial
    strides = (c * s, 1, c, c) if cell.rows else (c * s, s, 1, 1)
    return create("dnnl_memory_desc_create_with_strides", 4, Dims(n, c, s, 1), F32, Dims(*strides))


def prepare(cell, descriptor=plain, load=lambda array: array, unload=lambda array: array):
    """load and unload bring an array into the layout that the descriptor describes, and back."""
    if cell.output == "allocated":
        raise Cannot("writes into the caller's memory only")
    data = descriptor(cell)
    vector = create("dnnl_memory_desc_create_with_strides", 1, Dims(cell.channels), F32, Dims(1))
    eps = ctypes.c_float(EPS)

    def forward(kind, flags):
        return create("dnnl_batch_normalization_forward_primitive_desc_create", engine, kind, data, data, eps, flags, None)

    weight, bias, mean, var = parameters(cell)
    x = load(aligned_elements(cell, 0))
    y = aligned(x.shape)
    arrays = {SRC: x, MEAN: mean, VARIANCE: var, SCALE: weight}
    if cell.op == "backward":
        hint = forward(FORWARD_TRAINING, USE_SCALE_AND_SHIFT)
        function = "dnnl_batch_normalization_backward_primitive_desc_create"
        primitive_desc = create(function, engine, BACKWARD, data, data, data, eps, USE_SCALE_AND_SHIFT, hint, None)
        dweight, dbias = np.empty_like(weight), np.empty_like(bias)
        arrays |= {DIFF_DST: load(aligned_elements(cell, 1)), DIFF_SRC: y, DIFF_SCALE: dweight, DIFF_SHIFT: dbias}
        computed = {"dx": y, "dweight": dweight, "dbias": dbias}
    else:
        arrays |= {SHIFT: bias, DST: y}
        if cell.op == "training":
            primitive_desc = forward(FORWARD_TRAINING, USE_SCALE_AND_SHIFT)
            computed = {"y": y, "mean": mean, "var": var}
        else:
            primitive_desc = forward(FORWARD_INFERENCE, USE_SCALE_AND_SHIFT | USE_GLOBAL_STATS)
            computed = {"y": y}

    def memory(arg, array):
        desc = data if arg in (SRC, DST, DIFF_SRC, DIFF_DST) else vector
        return Argument(arg, create("dnnl_memory_create", desc, engine, Handle(array.ctypes.data)))

    primitive = create("dnnl_primitive_create", primitive_desc)
    arguments = (Argument * len(arrays))(*(memory(arg, array) for arg, array in arrays.items()))
    arguments.arrays = arrays  # which live as long as the pointers to them
    execute, count = dnnl.dnnl_primitive_execute, ctypes.c_int(len(arrays))

    def results(status):
        if status:
            raise Cannot(f"dnnl_primitive_execute returns status {status}")
        return {name: unload(array) if array is y else array for name, array in computed.items()}

    return [lambda: execute(primitive, stream, count, arguments)], results
