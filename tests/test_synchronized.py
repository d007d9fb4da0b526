"""Layers with comm=: the checks of ranks.py by ranks that are threads and, with mpi4py, over MPI; the parts that other engines may call."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import ranks

import cbn
from cbn.statistics import merged

MPIEXEC = shutil.which("mpiexec", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
needs_mpi = pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None or MPIEXEC is None, reason="mpi4py and an MPI are needed")
TESTS = os.path.dirname(os.path.abspath(__file__))      # not its parent, where an unbuilt cbn may lie


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("check", ranks.CHECKS, ids=lambda check: check.__name__)
def test_in_threads(check, size):
    ranks.in_threads(size, check)


def over_mpi(size, *arguments):
    """Python on so many ranks. One that waits for ever is killed, and the test fails."""
    command = [MPIEXEC, "-n", str(size), sys.executable, "-m", "mpi4py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=TESTS, env=environment)


@needs_mpi
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_over_mpi(size):
    done = over_mpi(size, "ranks.py")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_mpi
def test_a_rank_that_dies():
    """Under `python -m mpi4py`, the others don't wait for it."""
    done = over_mpi(2, "-c", """
from mpi4py import MPI
import numpy as np, cbn
layer = cbn.BatchNorm1d(3, comm=MPI.COMM_WORLD)
if MPI.COMM_WORLD.rank == 1:
    raise OSError("a disk is full")
layer(np.ones((2, 3), "f"))
""")
    assert done.returncode != 0 and "a disk is full" in done.stderr


@pytest.mark.parametrize("comm, says", [(3, "got 3, which has no Get_rank"), (True, "no Get_rank"), (np, "which has no Get_rank")], ids=str)
def test_what_is_no_communicator(comm, says):
    with pytest.raises(TypeError, match=says):
        cbn.BatchNorm2d(3, comm=comm)
    layer = cbn.BatchNorm2d(3)
    with pytest.raises(TypeError, match="comm: expected None or a communicator of mpi4py"):
        layer.comm = comm
    assert layer.comm is None


# What runs the checks in processes of another engine, by its recipe in docs/distributed.md.
ENGINES = {
    "multiprocessing": """
def run(rank, memory, barrier):
    check(Shared(rank, 2, memory, barrier))

def main():
    context = multiprocessing.get_context("spawn")
    shared = context.RawArray("b", 2 * 4096), context.Barrier(2)
    processes = [context.Process(target=run, args=(rank, *shared)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes)
""",
    "torch": """
import tempfile

def run(rank, path):
    torch.distributed.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    check(Gloo())
    torch.distributed.destroy_process_group()

def main():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (folder + "/meeting",), 2)
""",
    "ray": """
@ray.remote
def run(rank, meeting):
    check(Worker(rank, 2, meeting))

def main():
    ray.init(num_cpus=2, include_dashboard=False)
    meeting = Meeting.remote(2)
    ray.get([run.remote(rank, meeting) for rank in range(2)])
""",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_other_engines(engine, tmp_path):
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is needed")
    page = os.path.join(TESTS, "..", "docs", "distributed.md")
    if not os.path.exists(page):
        pytest.skip("the documents are not here")
    with open(page) as file:
        recipe = file.read().partition(f"<!-- {engine} -->")[2].partition(f"<!-- /{engine} -->")[0]
    program = recipe.partition("```python")[2].partition("```")[0] + """
def check(comm):
    import ranks
    for each in (ranks.check_whole, ranks.check_mistakes, ranks.check_differences, ranks.check_nonfinite):
        each(comm)
""" + ENGINES[engine] + """
if __name__ == "__main__":
    main()
"""
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_beside_a_collective():
    """A process that forks waits for the call of another thread, so that the child finds the layer whole and its lock free."""
    waiting, go_on = threading.Event(), threading.Event()

    class Slow(ranks.Threads):
        def Allgather(self, message, everyone):
            waiting.set()
            go_on.wait(ranks.WAIT)
            everyone[0] = message

    layer = cbn.BatchNorm1d(3)
    go_on.set()
    layer.comm = Slow(0, 1, None, None)
    go_on.clear()
    waiting.clear()
    x = np.random.default_rng(3).standard_normal((5, 3)).astype("f")
    thread = threading.Thread(target=layer, args=(x,))
    thread.start()
    waiting.wait(ranks.WAIT)
    threading.Timer(0.2, go_on.set).start()
    child = os.fork()
    if child == 0:
        os._exit(not (layer._lock.acquire(timeout=5) and layer.num_batches_tracked == 1))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()


def test_layers_apart_do_not_wait_for_each_other():
    """A layer that waits for other ranks holds no lock that another layer needs."""
    layers = [cbn.BatchNorm1d(3, comm=ranks.Threads(0, 1, threading.Barrier(1), [None])) for _ in range(200)]
    assert len({id(layer._lock) for layer in layers}) == 200


def test_many_parts_at_once():
    """As merging one after the other, to rounding; with an offset, too."""
    rng = np.random.default_rng(1)
    for offset in (0, 1e6):
        parts = [cbn.batch_stats(rng.standard_normal((n, 9)) + offset) for n in (3, 0, 50, 1, 7)]
        one = functools.reduce(cbn.BatchStats.merge, parts)
        other = merged(np.array([float(p.count) for p in parts]), np.array([p.mean for p in parts]), np.array([p.var for p in parts]))
        assert other.count == one.count and type(other.count) is int
        np.testing.assert_allclose(other.mean, one.mean, rtol=1e-15, atol=1e-15)
        np.testing.assert_allclose(other.var, one.var, rtol=1e-9 if offset else 1e-14)


def test_functions_for_stats_and_sums():
    """They get those of x, when all else has been checked, and give what is used."""
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((2, 8, 5, 3))
    weight, bias = rng.standard_normal((2, 5))
    other = rng.standard_normal((4, 5, 3))
    stats = cbn.batch_stats(x).merge(cbn.batch_stats(other))
    y, used = cbn.batch_norm_train(x, weight, bias, stats=lambda own: own.merge(cbn.batch_stats(other)), activation="relu")
    np.testing.assert_array_equal(y, cbn.batch_norm_train(x, weight, bias, stats=stats, activation="relu")[0])
    assert used.count == stats.count
    np.testing.assert_array_equal(used.var, stats.var)
    sums = cbn.gradient_sums(dy, x, stats, weight, bias, activation="relu")

    def more(own):
        return cbn.GradientSums(2 * own.dy, 3 * own.dy_xhat)

    given = cbn.batch_norm_backward(dy, x, stats, weight, bias, activation="relu", sums=more(sums))
    asked = cbn.batch_norm_backward(dy, x, stats, weight, bias, activation="relu", sums=more)
    for a, b in zip(given, asked, strict=True):
        np.testing.assert_array_equal(a, b)
    out = np.zeros_like(x)
    stored = stats._replace(mean=list(stats.mean), var=np.asfortranarray(np.float32(stats.var)))
    assert cbn.batch_norm_train(x, stats=lambda own: stored)[1].var.dtype == np.float64
    for call, kind, says in [
        (lambda: cbn.batch_norm_train(x, stats=lambda own: None, out=out), TypeError, "stats: expected the BatchStats"),
        (lambda: cbn.batch_norm_train(x, stats=lambda own: own._replace(count=3), out=out), ValueError, "stats.count: expected at least 24"),
        (lambda: cbn.batch_norm_train(x, stats=lambda own: own._replace(mean=None), out=out), TypeError, "stats.mean"),
        (lambda: cbn.batch_norm_train(x, stats=lambda own: own._replace(var=-own.var), out=out), ValueError, "stats.var: expected non-neg"),
        (lambda: cbn.batch_norm_train(x[:1, :, :1], stats=lambda own: own), ValueError, "more than 1 value per channel"),
        (lambda: cbn.batch_norm_train(x, stats=lambda own: 1 / 0, out=out), ZeroDivisionError, "division"),
        (lambda: cbn.batch_norm_train(x, stats=pytest.fail, out=out[:1]), ValueError, "out"),
        (lambda: cbn.batch_norm_train(x, weight[:2], stats=pytest.fail, out=out), ValueError, "weight"),
        (lambda: cbn.batch_norm_backward(dy, x, stats, sums=lambda own: None, out=out), TypeError, "sums: expected GradientSums, got NoneType"),
        (lambda: cbn.batch_norm_backward(dy, x, stats, sums=lambda own: own._replace(dy=own.dy[1:]), out=out), ValueError, "sums.dy"),
        (lambda: cbn.batch_norm_backward(dy, x, stats, sums=pytest.fail, out=out[:1]), ValueError, "out"),
        (lambda: cbn.batch_norm_backward(dy, x, stats, sums=pytest.fail, training=False), ValueError, "sums: expected None"),
    ]:
        with pytest.raises(kind, match=says):
            call()
    assert not out.any()
