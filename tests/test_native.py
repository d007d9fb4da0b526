"""The functions for callers without Python give the bits of those for Python, from ctypes, Cython, C and numba, and answer wrong arguments."""

import ctypes
import importlib.util
import itertools
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from interpreter import output
from test_threads import openmp

import cbn
from cbn import capi

SOURCES = pathlib.Path(__file__).parent / "native"
HEADER = (pathlib.Path(cbn.get_include()) / "cbn.h").read_text()
DECLARATION = (pathlib.Path(cbn.__file__).parent / "capi.pxd").read_text()
TYPES = {"int": ctypes.c_int, "ptrdiff_t": ctypes.c_ssize_t, "double": ctypes.c_double}
CODES = dict(re.findall(r"(CBN_\w+) = (-?\d+)", HEADER))
OK, NO_MEMORY, ONE_VALUE = (int(CODES["CBN_" + name]) for name in ("OK", "NO_MEMORY", "ONE_VALUE"))
NAMES = "inference", "training", "backward"
HALVES = "gradient_sums", "backward_by_sums"  # of backward, for a batch in parts: tests/test_split.py
RNG = np.random.default_rng(77)

ctypes.pythonapi.PyCapsule_GetName.restype = ctypes.c_char_p
ctypes.pythonapi.PyCapsule_GetName.argtypes = [ctypes.py_object]
ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def parameters(name):
    """(type, name) of each argument, as the header has it."""
    text = re.search(rf"typedef int cbn_{name}_function\(([^)]*)\)", HEADER)[1]
    return [re.fullmatch(r"(.*\W)(\w+)", argument.strip()).groups() for argument in text.split(",")]


def function_type(name, pointer):
    types = [pointer if "*" in kind else TYPES[kind.strip()] for kind, _ in parameters(name)]
    return ctypes.CFUNCTYPE(ctypes.c_int, *types)


def address(name):
    capsule = capi.__pyx_capi__["cbn_" + name]
    return ctypes.pythonapi.PyCapsule_GetPointer(capsule, ctypes.pythonapi.PyCapsule_GetName(capsule))


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The modules from_cython and from_c, compiled as their authors would, against the package that is imported here."""
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    need_compiler()
    folder = tmp_path_factory.mktemp("native")
    for name in ("from_cython.pyx", "from_c.c"):
        shutil.copy(SOURCES / name, folder)
    openmp = ["-fopenmp"] if cbn.threads.has_openmp() else []
    (folder / "setup.py").write_text(f"""
from Cython.Build import cythonize
from setuptools import Extension, setup

setup(name="consumers", py_modules=[], ext_modules=cythonize([
    Extension("from_cython", ["from_cython.pyx"], extra_compile_args={openmp}, extra_link_args={openmp}),
    Extension("from_c", ["from_c.c"], include_dirs=[{cbn.get_include()!r}], extra_compile_args=["-Wall", "-Wextra", "-Werror"]),
], include_path=[{str(pathlib.Path(cbn.__file__).parents[1])!r}]))
""")
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], folder)
    return SimpleNamespace(**{name: load(name, next(folder.glob(name + ".*.so"))) for name in ("from_cython", "from_c")})


def need_compiler():
    if os.name != "posix" or not shutil.which(os.environ.get("CC", "cc")):
        pytest.skip("there is no C compiler")


def run(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_ctypes():
    return {name: function_type(name, ctypes.c_void_p)(address(name)) for name in NAMES}


def from_numba():
    numba = pytest.importorskip("numba")
    from numba.extending import get_cython_function_address

    def compiled(name):
        native = function_type(name, ctypes.c_ssize_t)(get_cython_function_address("cbn.capi", "cbn_" + name))
        return numba.njit(nogil=True)(lambda *arguments: native(*arguments))

    return {name: compiled(name) for name in NAMES}


@pytest.fixture(scope="module", params=["ctypes", "cython", "c", "numba"])
def consumer(request):
    """The three functions, as one kind of caller calls them: arrays are addresses, and 0 is NULL."""
    if request.param == "ctypes":
        return from_ctypes()
    if request.param == "numba":
        return from_numba()
    module = getattr(request.getfixturevalue("built"), "from_" + request.param)
    return {name: getattr(module, name) for name in NAMES}


def call(consumer, name, **arguments):
    """Call with these arguments; of others, with those that mean the least."""
    values = []
    for kind, argument in parameters(name):
        value = arguments.pop(argument, None if "*" in kind else {"eps": 1e-5, "momentum": 0.1, "training": 1}.get(argument, 0))
        if "*" in kind and not isinstance(value, int):
            value = 0 if value is None else value.ctypes.data
        values.append(float(value) if kind == "double " else int(value))
    assert not arguments
    return consumer[name](*values)


def view(shape, axis):
    """(outer, channels, inner), which is how these functions see an array."""
    axis %= len(shape)
    if axis == len(shape) - 1:
        return {"outer": math.prod(shape[:-1]), "channels": shape[-1], "inner": 1}
    return {"outer": math.prod(shape[:axis]), "channels": shape[axis], "inner": math.prod(shape[axis + 1 :])}


SHAPES = [
    ((4, 5, 6, 7), 1),
    ((4, 6, 7, 5), -1),
    ((37, 5), 1),
    ((700, 3), 1),
    ((3, 1, 9, 9), 1),
    ((40, 1), 1),
    ((2, 70, 1, 1), 1),
    ((5, 3, 130, 131), 1),
]
EMPTY = [((0, 5, 6), 1), ((4, 0, 6), 1), ((4, 5, 0), 1), ((0, 3), 1), ((0, 0), 1)]
ACTIVATIONS = [
    (None, {"activation": 0}),
    ("relu", {"activation": 1, "alpha": math.nan}),
    ("relu6", {"activation": 2}),
    (("clip", -0.5, 0.7), {"activation": 3, "alpha": -0.5, "beta": 0.7}),
    (("leaky_relu", 0.1), {"activation": 4, "alpha": 0.1}),
    ("hard_swish", {"activation": 5, "beta": math.inf}),
    ("sigmoid", {"activation": 6}),
    ("silu", {"activation": 7}),
]


def normal(shape, dtype):
    return RNG.standard_normal(shape).astype(dtype)


def same(*pairs):
    for a, b in pairs:
        assert a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)


def compare(consumer, shape, axis, dtype, parameter_dtype, affine, with_residual, in_place, activation, numbers, threads):
    """All three functions against those of Python, on one problem."""
    x, dy = normal(shape, dtype) * 2 + 1, normal(shape, dtype)
    channels = shape[axis]
    residual = normal(shape, dtype) if with_residual else None
    running_mean, weight, bias = (normal(channels, parameter_dtype) for _ in range(3))
    if not affine:
        weight = bias = None
    running_var = abs(normal(channels, parameter_dtype)) + parameter_dtype(0.1)
    plain = dict(
        view(shape, axis), **numbers, dtype=dtype().itemsize, parameter_dtype=parameter_dtype().itemsize, weight=weight, bias=bias,
        residual=residual, eps=1e-4, threads=threads,
    )  # fmt: skip
    python = {"weight": weight, "bias": bias, "residual": residual, "eps": 1e-4, "axis": axis, "activation": activation}

    y = x.copy() if in_place else np.full_like(x, 7)
    assert call(consumer, "inference", x=y if in_place else x, y=y, running_mean=running_mean, running_var=running_var, **plain) == OK
    same((y, cbn.batch_norm(x, running_mean, running_var, **python)))

    y = x.copy() if in_place else np.full_like(x, 7)
    mean, var = np.full(channels, 7.0), np.full(channels, 7.0)
    new_mean, new_var = running_mean.copy(), running_var.copy()
    running = {"running_mean": new_mean, "running_var": new_var} if affine else {}
    assert call(consumer, "training", x=y if in_place else x, y=y, mean=mean, var=var, momentum=0.3, **running, **plain) == OK
    expected_y, stats = cbn.batch_norm_train(x, **python)
    same((y, expected_y), (mean, stats.mean), (var, stats.var))
    if affine:
        expected_mean, expected_var = running_mean.copy(), running_var.copy()
        cbn.batch_norm(x, expected_mean, expected_var, training=True, momentum=0.3, **python)
        same((new_mean, expected_mean), (new_var, expected_var))

    for train in (True, False):
        dx = dy.copy() if in_place else np.full_like(x, 7)
        weight_grad, bias_grad = np.full(channels, 7, parameter_dtype), np.full(channels, 7, parameter_dtype)
        residual_grad = np.full_like(x, 7) if with_residual else None
        # Without weight, Python's gradients are of x's type.
        python["weight"] = np.ones(channels, parameter_dtype) if weight is None else weight
        assert (
            call(
                consumer, "backward", dy=dx if in_place else dy, x=x, dx=dx, residual_grad=residual_grad, mean=stats.mean, var=stats.var,
                weight_grad=weight_grad, bias_grad=bias_grad, training=train, **plain,
            ) == OK
        )  # fmt: skip
        g = cbn.batch_norm_backward(dy, x, stats, training=train, **python)
        same((dx, g.x), (weight_grad, g.weight), (bias_grad, g.bias))
        if with_residual:
            same((residual_grad, g.residual))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_bits_as_from_python(consumer, dtype):
    choices = itertools.product((False, True), repeat=3)
    problems = itertools.product(SHAPES[:-1], (np.float32, np.float64), choices, ACTIVATIONS)
    for (shape, axis), parameter_dtype, (affine, with_residual, in_place), (activation, numbers) in problems:
        compare(consumer, shape, axis, dtype, parameter_dtype, affine, with_residual, in_place, activation, numbers, 0)


@pytest.mark.parametrize("shape, axis", SHAPES, ids=str)
def test_any_number_of_threads(threads, shape, axis):
    for wanted, with_residual, numbers in itertools.product((0, 1, 2, 7), (False, True), (ACTIVATIONS[0], ACTIVATIONS[3])):
        compare(from_ctypes(), shape, axis, np.float32, np.float32, True, with_residual, False, *numbers, wanted)


@pytest.mark.parametrize("shape, axis", EMPTY, ids=str)
def test_without_elements(shape, axis):
    """Pointers to nothing may be NULL."""
    for with_residual in (False, True):
        compare(from_ctypes(), shape, axis, np.float32, np.float32, True, with_residual, False, *ACTIVATIONS[1], 0)
    assert call(from_ctypes(), "inference", dtype=4, outer=3, channels=0, inner=2, parameter_dtype=4) == OK
    mean, var = np.zeros(2), np.zeros(2)
    assert call(from_ctypes(), "training", dtype=4, outer=0, channels=2, inner=2, parameter_dtype=4, mean=mean, var=var) == OK
    assert np.isnan(mean).all() and np.isnan(var).all()


@openmp
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_threads_are_as_many_as_asked_for():
    code = """
import sys
sys.path.insert(0, {folder!r})
from test_native import call, from_ctypes
x, mean, var = np.ones((64, 4096), np.float32), np.empty(4096), np.empty(4096)
cbn.threads.set_patience(float("inf"))
cbn.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
for threads in (1, 0, 4):
    assert call(from_ctypes(), "training", dtype=4, outer=64, channels=4096, inner=1, x=x, y=x, parameter_dtype=4, mean=mean, var=var,
                threads=threads) == 0
    print(len(os.listdir("/proc/self/task")) - before, end=" ")
"""
    assert output(code.format(folder=str(SOURCES.parent))) == "0 1 3"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_in_a_forked_child():
    code = """
import sys
sys.path.insert(0, {folder!r})
from test_native import call, from_ctypes

def train():
    y, mean, var = np.empty_like(x), np.empty(256), np.empty(256)
    assert call(from_ctypes(), "training", dtype=4, outer=1024, channels=256, inner=1, x=x, y=y, parameter_dtype=4, mean=mean, var=var,
                threads=2) == 0
    return y

x = np.random.default_rng(1).standard_normal((1024, 256)).astype(np.float32)
expected = train()
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(train(), expected) else 1)
print(os.waitpid(child, 0)[1], np.array_equal(train(), expected))
"""
    assert output(code.format(folder=str(SOURCES.parent))) == "0 True"


def test_in_a_prange(built):
    x = normal((9, 5, 300), np.float32)
    mean, var, y = normal(5, np.float32), abs(normal(5, np.float32)), np.empty_like(x)
    assert built.from_cython.samples_in_parallel(x, mean, var, y) == 0
    same((y, cbn.batch_norm(x, mean, var)))


def test_training_in_a_prange(built):
    """Of uneven numbers of batches: none waits for the other thread's."""
    x = normal((9, 40, 20), np.float32)
    mean, var, y = np.empty((9, 20)), np.empty((9, 20)), np.empty_like(x)
    assert built.from_cython.batches_in_parallel(x, mean, var, y) == 0
    for n in range(9):
        expected, stats = cbn.batch_norm_train(x[n])
        same((y[n], expected), (mean[n], stats.mean), (var[n], stats.var))


def test_in_a_parallel_numba_loop():
    numba = pytest.importorskip("numba")
    native = function_type("inference", ctypes.c_ssize_t)(address("inference"))

    @numba.njit(nogil=True, parallel=True)
    def samples_in_parallel(x, mean, var, y):
        failed = 0
        for n in numba.prange(x.shape[0]):
            status = native(
                x.itemsize, 1, x.shape[1], x.shape[2], x[n].ctypes.data, 0, y[n].ctypes.data, mean.itemsize, 0, 0, mean.ctypes.data,
                var.ctypes.data, 1e-5, 1, 0.0, 0.0, 0,
            )  # fmt: skip
            failed += status != 0
        return failed

    for dtype in (np.float32, np.float64):
        x = normal((9, 5, 300), dtype)
        mean, var, y = normal(5, np.float64), abs(normal(5, np.float64)), np.empty_like(x)
        assert samples_in_parallel(x, mean, var, y) == 0
        same((y, cbn.batch_norm(x, mean, var, activation="relu")))


@pytest.mark.parametrize("language", ["c", "c++"])
def test_in_threads_of_a_c_library(tmp_path, language):
    """Threads that Python knows nothing of, all calling at once; the header is C and C++."""
    need_compiler()
    compiler = os.environ.get("CC", "cc") if language == "c" else os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}")
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-shared", "-fPIC", "-pthread", "-I", cbn.get_include()]
    run([compiler, "-x", language, *flags, str(SOURCES / "library.c"), "-o", "library.so"], tmp_path)
    library = ctypes.CDLL(str(tmp_path / "library.so"))
    x = normal((8, 12, 50, 50), np.float32)
    y, mean, var = np.empty((6, *x.shape), np.float32), np.empty((6, 12)), np.empty((6, 12))
    sizes = [ctypes.c_ssize_t(n) for n in (8, 12, 2500)]
    arrays = [ctypes.c_void_p(a.ctypes.data) for a in (x, y, mean, var)]
    assert library.train_in_threads(ctypes.c_void_p(address("training")), *sizes, *arrays) == 0
    expected, stats = cbn.batch_norm_train(x, activation="relu")
    for i in range(6):
        same((y[i], expected), (mean[i], stats.mean), (var[i], stats.var))


def plain_call(name):
    """Arguments of a call in which nothing is left out."""
    arguments = {"dtype": 4, "outer": 3, "channels": 4, "inner": 5, "parameter_dtype": 8, "threads": 1}
    for kind, argument in parameters(name):
        if argument in ("mean", "var"):
            arguments[argument] = abs(normal(4, np.float64))
        elif argument in ("x", "y", "dy", "dx", "residual", "residual_grad"):
            arguments[argument] = normal((3, 4, 5), np.float32)
        elif "*" in kind:
            arguments[argument] = abs(normal(4, np.float64))
    return arguments


def check_refused(consumer, name, status, arguments):
    before = {key: value.copy() for key, value in arguments.items() if isinstance(value, np.ndarray)}
    assert call(consumer, name, **arguments) == status
    for key, value in before.items():
        same((arguments[key], value))


WRONG = {
    "dtype": [0, 2, 5, 32, -4], "parameter_dtype": [0, 2, 16], "outer": [-1, -(2**62)], "channels": [-1], "inner": [-1, 2**60, 2**62],
    "eps": [0, -1e-5, math.nan, math.inf], "momentum": [-0.1, 1.1, math.nan], "activation": [-1, 8], "threads": [-1, 4097],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments(consumer, name):
    """Each is answered by its position, and nothing is written."""
    positions = {argument: i + 1 for i, (_, argument) in enumerate(parameters(name))}
    for argument, values in WRONG.items():
        for value in values if argument in positions else ():
            if (name, argument, value) != ("inference", "eps", 0):
                check_refused(consumer, name, positions[argument], plain_call(name) | {argument: value})
    for activation, alpha, beta in ((3, 1, 0.5), (3, math.nan, 1), (3, 0, math.nan), (4, math.nan, 0), (4, math.inf, 0)):
        check_refused(consumer, name, positions["alpha"], plain_call(name) | {"activation": activation, "alpha": alpha, "beta": beta})
    optional = {"residual", "residual_grad", "weight", "bias"}
    for argument in [argument for kind, argument in parameters(name) if "*" in kind]:
        arguments = plain_call(name)
        if argument in optional:
            assert call(consumer, name, **arguments | {argument: None}) == OK
        else:
            check_refused(consumer, name, positions[argument], arguments | {argument: None})
        check_refused(consumer, name, positions[argument], arguments | {argument: arguments[argument].ctypes.data + 1})


@pytest.mark.parametrize("name", NAMES)
def test_overlaps(name):
    """Outputs have memory of their own, or exactly that of elements that are read."""
    consumer = from_ctypes()
    positions = {argument: i + 1 for i, (_, argument) in enumerate(parameters(name))}
    pointers = [argument for kind, argument in parameters(name) if "*" in kind]
    written = [argument for kind, argument in parameters(name) if "*" in kind and "const" not in kind]
    for result, other in itertools.product(written, pointers):
        if result == other:
            continue
        arguments = plain_call(name)
        first = min(positions[result], positions[other]) if other in written else positions[result]
        exact = result in ("y", "dx") and other in ("x", "dy", "residual")
        here = arguments[other]
        if exact:
            assert call(consumer, name, **arguments | {result: here}) == OK
        else:
            check_refused(consumer, name, first, arguments | {result: here.ctypes.data})
        if arguments[result].nbytes >= here.nbytes:  # else what is beyond may be anything's
            long = np.zeros(1000)
            moved = arguments | {other: long.ctypes.data, result: long.ctypes.data + here.nbytes - 8}
            check_refused(consumer, name, first, moved)
            assert not long.any()


@pytest.mark.parametrize("name", ["inference", "backward"])
def test_negative_variance(name):
    argument = "running_var" if name == "inference" else "var"
    position = [name for _, name in parameters(name)].index(argument) + 1
    arguments = plain_call(name)
    arguments[argument][2] = -1e-9
    check_refused(from_ctypes(), name, position, arguments)
    arguments[argument][2] = math.nan
    assert call(from_ctypes(), name, **arguments) == OK


def test_one_running_statistic_alone():
    arguments = plain_call("training")
    assert call(from_ctypes(), "training", **arguments | {"running_mean": None, "running_var": None}) == OK


def test_one_value_a_channel():
    check_refused(from_ctypes(), "training", ONE_VALUE, plain_call("training") | {"outer": 1, "inner": 1})
    assert call(from_ctypes(), "inference", **plain_call("inference") | {"outer": 1, "inner": 1}) == OK
    assert call(from_ctypes(), "backward", **plain_call("backward") | {"outer": 1, "inner": 1}) == OK


def test_out_of_memory():
    """More channels than any machine has memory for: refused before anything is read."""
    places = {argument: i << 57 for i, argument in enumerate(("x", "y", "mean", "var"), 1)}
    assert call(from_ctypes(), "training", dtype=4, parameter_dtype=4, outer=2, channels=1 << 52, inner=1, threads=1, **places) == NO_MEMORY


def test_header_and_declaration_agree():
    """With each other, and with the types that the module itself gives its functions."""
    assert len(CODES) == 13 and dict(re.findall(r"(CBN_\w+) = (-?\d+)", DECLARATION)) == CODES
    assert set(capi.__pyx_capi__) == {"cbn_" + name for name in NAMES + HALVES}
    for name in NAMES + HALVES:
        declared = re.search(rf"cdef int cbn_{name}\(([^)]*)\) noexcept nogil", DECLARATION)[1]
        assert [argument.split()[-1] for argument in declared.split(",")] == [argument for _, argument in parameters(name)]
        types = [re.sub(r"const (\w+)", r"\1 const", kind).strip() for kind, _ in parameters(name)]
        assert str(ctypes.pythonapi.PyCapsule_GetName(capi.__pyx_capi__["cbn_" + name]), "ascii") == f"int ({', '.join(types)})"
