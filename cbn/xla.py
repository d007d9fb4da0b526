"""Python functions as custom calls of XLA on the CPU: by its foreign function interface they read and write XLA's own memory, as NumPy arrays.

The structures are the beginnings of those of xla/ffi/api/c_api.h, which comes with jaxlib; within version 0 they only grow at their ends.
"""

import ctypes
import pathlib
import re
import threading

import jax
import ml_dtypes
import numpy as np

_HEADER = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
_MAJOR, _MINOR = (int(re.search(rf"define XLA_FFI_API_{part} (\d+)", _HEADER)[1]) for part in ("MAJOR", "MINOR"))
if _MAJOR != 0:
    raise ImportError(f"cbn.jax: expected a jaxlib of version 0 of XLA's foreign function interface, got {_MAJOR}.{_MINOR}")

_METADATA = 1           # the type of the extension by which XLA asks for a handler's version
_INVALID_ARGUMENT = 3   # an error's code
_DTYPES = {
    2: np.dtype(np.int8), 3: np.dtype(np.int16), 6: np.dtype(np.uint8), 7: np.dtype(np.uint16),
    10: np.dtype(np.float16), 11: np.dtype(np.float32), 12: np.dtype(np.float64), 16: np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip


class _Struct(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("extension", ctypes.c_void_p)]


class _Version(_Struct):
    _fields_ = [("major", ctypes.c_int), ("minor", ctypes.c_int)]


class _Metadata(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("version", _Version)]


class _Extension(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p), ("metadata", ctypes.POINTER(_Metadata))]


class _Error(_Struct):
    _fields_ = [("message", ctypes.c_char_p), ("code", ctypes.c_int)]


class _Api(_Struct):
    _fields_ = [("version", _Version), ("internal", ctypes.c_void_p),
                ("create_error", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Error)))]


class _Buffer(_Struct):
    _fields_ = [("dtype", ctypes.c_int), ("data", ctypes.c_void_p), ("rank", ctypes.c_int64), ("shape", ctypes.POINTER(ctypes.c_int64))]


class _Buffers(_Struct):
    _fields_ = [("count", ctypes.c_int64), ("types", ctypes.c_void_p), ("values", ctypes.POINTER(ctypes.POINTER(_Buffer)))]


class _Frame(_Struct):
    _fields_ = [("api", ctypes.POINTER(_Api)), ("context", ctypes.c_void_p), ("stage", ctypes.c_int),
                ("arguments", _Buffers), ("results", _Buffers)]


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))


def _array(buffer):
    """Of a buffer's memory."""
    shape, dtype = buffer.shape[:buffer.rank], _DTYPES[buffer.dtype]
    size = np.prod(shape, dtype=int) * dtype.itemsize
    return np.ndarray(shape, dtype, (ctypes.c_char * size).from_address(buffer.data) if size else None)


def _arrays(buffers):
    return [_array(buffers.values[i][0]) for i in range(buffers.count)]


_handlers, _lock = {}, threading.Lock()      # by name: kept for as long as XLA may call them


def _registered(function, options):
    """The name by which XLA knows function(results, *arguments, **options) from now on: one by content, as programs may outlive the process."""

    def handler(frame):
        frame = frame[0]
        if frame.extension:
            extension = _Extension.from_address(frame.extension)
            if extension.type == _METADATA:
                extension.metadata[0].version.major, extension.metadata[0].version.minor = _MAJOR, _MINOR
                return None
        try:
            function(_arrays(frame.results), *_arrays(frame.arguments), **options)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}".encode()
            return frame.api[0].create_error(_Error(ctypes.sizeof(_Error), None, message, _INVALID_ARGUMENT))

    name = f"{function.__module__}.{function.__qualname__}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
    with _lock:
        if name not in _handlers:
            _handlers[name] = _Handler(handler)
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(_handlers[name]), platform="cpu")
    return name


def call(function, results, *operands, **options):
    """function(results, *operands, **options) whenever the program runs in which this is traced.

    function : writes its results, given as arrays, and doesn't write the operands. An exception becomes a JaxRuntimeError with its message.
    results : (shape, dtype) of each. options : of values that repr tells apart.
    """
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    return jax.ffi.ffi_call(_registered(function, options), results, vmap_method="sequential")(*operands)
