"""lanes.h: each operation, at each CPU level that this machine has, on each type of elements, as plain C does it, bit for bit."""

import ctypes
import itertools
import os
import pathlib
import platform
import shutil
import subprocess

import numpy as np
import pytest

from cbn import dispatch

FOLDER = pathlib.Path(__file__).parent
KERNELS = FOLDER.parent / "cbn" / "kernels"
COMPILER = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
ELEMENTS = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
FLAGS = {"baseline": [], "avx2": ["-mavx2", "-mf16c"], "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"]}
OPERATIONS = "add", "sub", "mul", "quotient", "most", "least", "if_less", "if_up_to", "last", "spread", "rounded", "power_of_2"

pytestmark = pytest.mark.skipif(
    COMPILER is None or platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"),
    reason="compiles lanes.h by GCC or clang, for the levels of these CPUs",
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(level, elements): the operations of a level, or of plain C, as a library."""
    folder, built = tmp_path_factory.mktemp("lanes"), {}

    def build(level, elements):
        if (level, elements) not in built:
            path = folder / f"{level}_{elements}.so"
            flags = FLAGS.get(level, ["-DCBN_PLAIN"]) + ["-O2", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", f"-I{KERNELS}"]
            subprocess.run([COMPILER, *flags, f"-DCBN_ELEMENT={ELEMENTS[elements]}", FOLDER / "native" / "lanes.c", "-o", path], check=True)
            built[level, elements] = ctypes.CDLL(str(path))
        return built[level, elements]

    return build


def numbers(dtype, count, seed):
    """Of all sizes, and every special one beside every other."""
    rng = np.random.default_rng(seed)
    info = np.finfo(dtype)
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, info.max, info.min, info.tiny, info.smallest_subnormal, -info.smallest_subnormal, 0.5, 3.0]
    a = (rng.standard_normal(count) * 2.0 ** rng.integers(-20, 20, count)).astype(dtype)
    places = rng.random(count) < 0.4
    a[places] = rng.choice(special, places.sum())
    return a


def pointer(a):
    return ctypes.c_void_p(a.ctypes.data)


def same(a, b):
    """The same bits, but for those that tell one NaN from another."""
    nan = np.isnan(a) & np.isnan(b)
    bits = f"u{a.itemsize}"
    return (nan | (a.view(bits) == b.view(bits))).all()


def aligned(dtype, count):
    memory = np.zeros(count * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count * np.dtype(dtype).itemsize].view(dtype)


@pytest.mark.parametrize("elements", ["float32", "float64"])
@pytest.mark.parametrize("level", dispatch.isa_available())
def test_arithmetic(level, elements, build):
    plain, lanes = build("plain", elements), build(level, elements)
    count = lanes.lanes_of()
    for (i, name), n, seed in itertools.product(enumerate(OPERATIONS), range(1, count + 1), range(40)):
        arrays = [numbers(elements, count, 10 * seed + k) for k in range(4)]
        if name in ("rounded", "power_of_2"):
            arrays[0] = np.random.default_rng(seed).uniform(-120, 120, count).astype(elements)
        results = []
        for library in (plain, lanes):
            out = np.zeros(count, elements)
            library.of_reals(i, *map(pointer, arrays), ctypes.c_ssize_t(n), pointer(out))
            results.append(out)
        assert same(*results), (name, n, arrays, results)


def bits(elements, count, seed):
    rng = np.random.default_rng(seed)
    if elements in ("float32", "float64"):
        return numbers(elements, count, seed)
    return rng.integers(0, 1 << 16, count, np.uint16)


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("level", dispatch.isa_available())
def test_memory(level, elements, build):
    """What is written is what was read, and nothing else is written."""
    lanes = build(level, elements)
    count = lanes.lanes_of()
    for operation, n, seed in itertools.product(range(5), range(1, count + 1), range(5)):
        a = bits(elements, count, seed)
        if a.dtype == np.uint16:  # not those that tell one NaN from another
            a &= 0x7BFF if elements == "float16" else 0x7F7F
        out = aligned(a.dtype, 3 * count)
        out[...] = 1
        lanes.of_elements(operation, pointer(a), ctypes.c_ssize_t(n), pointer(out[count:]))
        expected = np.ones_like(out)
        first = 0 if operation != 2 and operation != 4 else count - n
        last = count if operation != 3 else n
        expected[count + first : count + last] = a[first:last]
        assert same(out.view("u2"), expected.view("u2")) if a.dtype == np.uint16 else same(out, expected), (operation, n)


@pytest.mark.parametrize("elements", ["float16", "bfloat16"])
@pytest.mark.parametrize("level", dispatch.isa_available())
def test_conversion(level, elements, build):
    """All 65,536 of a type; and float32 numbers at, and beside, the middle between two of them."""
    plain, lanes = build("plain", elements), build(level, elements)
    every = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 16)
    for row in every:
        a, b = np.zeros((2, 16), np.float32)
        plain.converted(pointer(row), pointer(a))
        lanes.converted(pointer(row), pointer(b))
        assert same(a, b)
        if elements == "float16":
            assert same(a, row.view(np.float16).astype(np.float32))
        with np.errstate(all="ignore"):
            middle = ((a.astype(np.float64) + np.nextafter(a, np.float32(np.inf))) / 2).astype(np.float32)
        step = np.uint32(0x1000 if elements == "float16" else 0x8000)
        for v in (a, middle, (a.view(np.uint32) + step).view(np.float32), (a.view(np.uint32) + step + np.uint32(1)).view(np.float32), (a.view(np.uint32) + step - np.uint32(1)).view(np.float32)):
            c, d = np.zeros((2, 16), np.uint16)
            plain.rounded_to_elements(pointer(v), pointer(c))
            lanes.rounded_to_elements(pointer(v), pointer(d))
            assert np.array_equal(c[~np.isnan(v)], d[~np.isnan(v)])
            if elements == "float16":
                with np.errstate(all="ignore"):
                    assert same(d.view(np.float16), v.astype(np.float16))


@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("level", dispatch.isa_available())
def test_sums(level, elements, build):
    plain, lanes = build("plain", elements), build(level, elements)
    count, computed = lanes.lanes_of(), "float64" if elements == "float64" else "float32"
    for rows, seed in itertools.product((1, 2, 3, 17), range(30)):
        a = numbers(computed, rows * count, seed) if seed % 3 == 0 else np.random.default_rng(seed).standard_normal(rows * count).astype(computed)
        results = []
        for library in (plain, lanes):
            totals, across = np.zeros(32), np.zeros(4)
            library.of_totals(pointer(a), ctypes.c_ssize_t(rows), pointer(totals), pointer(across))
            results.append(np.concatenate([totals, across]))
        assert same(*results)
