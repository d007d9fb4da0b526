"""oneDNN, through its C interface: plain arrays, channels first (nchw) or last (nhwc); a ReLU by the flag that fuses it."""

import ctypes
import importlib.metadata

import numpy as np
from workloads import EPS

from . import Cannot, aligned, aligned_elements, parameters

Handle = ctypes.c_void_p

# Values of dnnl_types.h (oneDNN 3).
CPU, F32, DEFAULT_FLAGS = 1, 3, 1
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
USE_GLOBAL_STATS, USE_SCALE_AND_SHIFT, FUSE_NORM_RELU, FUSE_NORM_ADD_RELU = 1, 6, 8, 16
UNIMPLEMENTED, QUERY_WORKSPACE, ALLOCATE = 3, 135, Handle(-1)
WORKSPACE, SRC, DST, MEAN, VARIANCE, SCALE, SHIFT, DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 64, 1, 17, 49, 50, 51, 52, 129, 145, 255, 256
Dims = ctypes.c_int64 * 12


class Argument(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_int), ("memory", Handle)]


class Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int)]


library = next(f.locate().resolve() for f in importlib.metadata.files("onednn-cpu-gomp") if f.name == "libdnnl.so.3")
dnnl = ctypes.PyDLL(str(library))  # a call that keeps the GIL is cheaper
dnnl.dnnl_version.restype = ctypes.POINTER(Version)
dnnl.dnnl_primitive_desc_query_md.restype = Handle


def create(function, *arguments):
    """The handle that the function makes. None is ever destroyed: they are small, and the arrays belong to NumPy."""
    handle = Handle()
    status = getattr(dnnl, function)(ctypes.byref(handle), *arguments)
    if status:
        raise Cannot(f"{function} returns status {status}" + " (unimplemented)" * (status == UNIMPLEMENTED))
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

    def execution(primitive_desc, arrays, workspace=None):
        """What executes the primitive on the arrays, and returns its status."""
        memories = {}
        for arg, array in arrays.items():
            desc = data if arg in (SRC, DST, DIFF_SRC, DIFF_DST) else vector
            memories[arg] = create("dnnl_memory_create", desc, engine, Handle(array.ctypes.data))
        if workspace:
            memories[WORKSPACE] = workspace
        primitive, count = create("dnnl_primitive_create", primitive_desc), ctypes.c_int(len(memories))
        arguments = (Argument * len(memories))(*(Argument(*pair) for pair in memories.items()))
        arguments.arrays = arrays  # which live as long as the pointers to them
        execute = dnnl.dnnl_primitive_execute
        return lambda: execute(primitive, stream, count, arguments)

    def workspace_of(primitive_desc):
        """For the mask of the ReLU, which training forward writes and backward reads."""
        desc = Handle(dnnl.dnnl_primitive_desc_query_md(primitive_desc, QUERY_WORKSPACE, 0))
        return create("dnnl_memory_create", desc, engine, ALLOCATE)

    weight, bias, mean, var = parameters(cell)
    x = load(aligned_elements(cell, 0))
    y = aligned(x.shape)
    flags = USE_SCALE_AND_SHIFT | (FUSE_NORM_ADD_RELU if cell.add else FUSE_NORM_RELU if cell.relu else 0)
    arrays = {SRC: x, MEAN: mean, VARIANCE: var, SCALE: weight}
    forward_arrays = arrays | {SHIFT: bias, DST: y}
    training = forward(FORWARD_TRAINING, flags)
    workspace = workspace_of(training) if cell.relu else None
    if cell.kind == "backward":
        function = "dnnl_batch_normalization_backward_primitive_desc_create"
        primitive_desc = create(function, engine, BACKWARD, data, data, data, eps, flags, training, None)
        dweight, dbias = np.empty_like(weight), np.empty_like(bias)
        computed = {"dx": y, "dweight": dweight, "dbias": dbias}
        if workspace:  # written by the forward formula of the mean and variance that the cell gives
            execution(forward(FORWARD_TRAINING, flags | USE_GLOBAL_STATS), forward_arrays, workspace)()
        arrays |= {DIFF_DST: load(aligned_elements(cell, 1)), DIFF_SRC: y, DIFF_SCALE: dweight, DIFF_SHIFT: dbias}
        call = execution(primitive_desc, arrays, workspace)
    elif cell.kind == "training":
        computed = {"y": y, "mean": mean, "var": var}
        call = execution(training, forward_arrays, workspace)
    else:
        computed = {"y": y}
        call = execution(forward(FORWARD_INFERENCE, flags | USE_GLOBAL_STATS), forward_arrays)

    def results(status):
        if status:
            raise Cannot(f"dnnl_primitive_execute returns status {status}")
        return {name: unload(array) if array is y else array for name, array in computed.items()}

    return [call], results
