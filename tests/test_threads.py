"""How many threads calls use: the functions that say so, the environment, many callers at once, and a forked child."""

import asyncio
import contextvars
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from interpreter import output, python

import cbn
from cbn.cgroup import cpu_quota

pytestmark = pytest.mark.usefixtures("restored")
openmp = pytest.mark.skipif(not cbn.threads.has_openmp(), reason="a build without OpenMP has one thread")


@openmp
def test_set_and_get():
    for n in (1, 2, np.int64(3), 100, 4096):
        assert cbn.set_num_threads(n) is None
        assert cbn.get_num_threads() == n and type(cbn.get_num_threads()) is int


WRONG = {ValueError: [0, -1, 4097, 2**70], TypeError: [1.0, "2", True, None, [2], np.array([2, 3])]}


@pytest.mark.parametrize("error, n", [(error, n) for error, ns in WRONG.items() for n in ns], ids=str)
def test_wrong_numbers(error, n):
    before = cbn.get_num_threads()
    for call in (cbn.set_num_threads, lambda wrong: cbn.num_threads(wrong).__enter__()):
        with pytest.raises(error, match=rf"^n: expected .* got {re.escape(repr(n))}"):
            call(n)
        assert cbn.get_num_threads() == before


@openmp
def test_for_a_block():
    cbn.set_num_threads(5)
    with cbn.num_threads(3):
        assert cbn.get_num_threads() == 3
        cbn.set_num_threads(4)
        with cbn.num_threads(7):
            assert cbn.get_num_threads() == 7
        assert cbn.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), cbn.num_threads(2):
            raise ZeroDivisionError
        assert cbn.get_num_threads() == 3
    assert cbn.get_num_threads() == 4


@openmp
def test_a_block_holds_in_its_thread_only():
    cbn.set_num_threads(5)
    meet = threading.Barrier(2, timeout=60)

    def inside():
        with cbn.num_threads(2):
            meet.wait()
            meet.wait()
            return cbn.get_num_threads()

    def outside():
        meet.wait()
        seen = cbn.get_num_threads()
        cbn.set_num_threads(6)  # process-wide, but not in the other's block
        meet.wait()
        return seen, cbn.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        a, b = pool.submit(contextvars.Context().run, inside), pool.submit(contextvars.Context().run, outside)
        assert a.result() == 2 and b.result() == (5, 6)
    assert cbn.get_num_threads() == 6


@openmp
def test_a_block_holds_in_its_task_only():
    async def task(n):
        seen = []
        with cbn.num_threads(n):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(cbn.get_num_threads())
        return seen

    async def tasks():
        return await asyncio.gather(*(task(n) for n in (2, 3, 4)))

    cbn.set_num_threads(5)
    assert asyncio.run(tasks()) == [[2] * 3, [3] * 3, [4] * 3]
    assert cbn.get_num_threads() == 5


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CORES = math.ceil(min(CORES, cpu_quota()))


@openmp
@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, CORES),
        ({"CBN_NUM_THREADS": "1"}, 1),
        ({"CBN_NUM_THREADS": "1000"}, CORES),
        ({"CBN_NUM_THREADS": ""}, CORES),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1000", "CBN_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "CBN_NUM_THREADS": "2"}, 1),
    ],
    ids=str,
)
def test_environment(environment, expected):
    assert output("print(cbn.get_num_threads())", **environment) == str(expected)
    assert output("cbn.set_num_threads(9); print(cbn.get_num_threads())", **environment) == "9"


@openmp
@pytest.mark.parametrize("quota, expected", [(0.1, 1), (1.0, 1), (1.5, 2), (1000.0, 3), (math.inf, 3)])
def test_quota(quota, expected):
    """Of control groups, and three cores."""
    code = f"""
cbn.threads.cpu_quota = lambda: float("{quota}")
os.sched_getaffinity = lambda process: [0, 1, 2]
print(cbn.threads._default_limit())
"""
    assert output(code, OMP_NUM_THREADS="3") == str(expected)


@pytest.mark.parametrize("isa", cbn.dispatch.isa_available())
def test_cpu_level_by_environment(isa):
    assert output("print(cbn.dispatch.get_isa())", CBN_ISA=isa) == isa


@pytest.mark.parametrize(
    "name, value",
    [("CBN_NUM_THREADS", v) for v in ("0", "-1", "two", "1.5", "5000")]
    + [
        ("CBN_ISA", "avx1024"),
        ("CBN_STREAM_BYTES", "much"),
        ("CBN_STREAM_BYTES", "nan"),
        ("CBN_CACHE_BYTES", "-1"),
        ("CBN_CACHE_BYTES", "1 GB"),
    ],
)
def test_wrong_environment(name, value):
    done = python("", **{name: value})
    assert done.returncode == 1
    assert f"ImportError: environment variable {name}: " in done.stderr and repr(value) in done.stderr


def test_cpu_levels():
    assert cbn.dispatch.isa_available()[-1] == "baseline"
    assert set(cbn.dispatch.isa_available()) <= set(cbn.dispatch.isa_built())
    before = cbn.dispatch.get_isa()
    with pytest.raises(ValueError, match="^CPU level: expected one of .*baseline.* got 'sse9'"):
        cbn.dispatch.set_isa("sse9")
    assert cbn.dispatch.get_isa() == before


def test_show_config(capsys):
    cbn.set_num_threads(1)
    cbn.dispatch.set_isa("baseline")
    assert cbn.show_config() is None
    shown = capsys.readouterr().out
    assert shown.startswith(f"cbn {cbn.__version__}\n")
    assert "baseline in use" in shown
    assert ", ".join(cbn.dispatch.isa_built()) + " built" in shown
    assert f"OpenMP: {'yes' if cbn.threads.has_openmp() else 'no'}" in shown
    assert "up to 1" in shown


@pytest.mark.parametrize("n", [1, 2])
def test_many_callers_at_once(n):
    """Functions with arguments of their own, and one layer in eval mode for all."""
    cbn.set_num_threads(n)
    cbn.threads.set_grain(1)
    rng = np.random.default_rng(23)
    layer = cbn.BatchNorm(33)
    xs = [rng.standard_normal((2, 33, 5 + i, 7)).astype(np.float32) for i in range(16)]
    layer(xs[0])
    layer.eval()

    def work(x):
        y, st = cbn.batch_norm_train(x)
        return [layer(x), y, *st[1:], *cbn.batch_norm_backward(x, x, st)]

    expected = [work(x) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        for actual, right in zip(pool.map(work, xs * 10), expected * 10, strict=True):
            for a, b in zip(actual, right, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child():
    """After threads were used in the parent; a child that hangs is ended."""
    done = output("""
import time
cbn.set_num_threads(2)
x = np.random.default_rng(24).standard_normal((64, 16, 64, 64)).astype(np.float32)
expected = cbn.batch_norm_train(x)[0]
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(cbn.batch_norm_train(x)[0], expected) else 1)
for _ in range(1000):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        print("exit code", os.waitstatus_to_exitcode(status))
        break
    time.sleep(0.01)
else:
    os.kill(child, 9)
    print("the child hangs")
print(np.array_equal(cbn.batch_norm_train(x)[0], expected))
""")
    assert done.split("\n") == ["exit code 0", "True"]
