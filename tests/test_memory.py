"""Outputs that reuse the memory of freed ones are arrays like any other, and no more memory is kept than allowed."""

import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from interpreter import python

import cbn
from cbn import memory

X = np.random.default_rng(25).standard_normal((8, 64, 32, 32)).astype(np.float32)  # 2 MiB
MEAN, VAR = np.zeros(64), np.ones(64)
EXPECTED = cbn.batch_norm(X, MEAN, VAR, out=np.empty_like(X))


@pytest.fixture(autouse=True)
def empty():
    before = cbn.get_cache_limit()
    cbn.set_cache_limit(1 << 26)
    cbn.empty_cache()
    yield
    cbn.set_cache_limit(before)


def test_memory_is_reused_once_free():
    a, b = (cbn.batch_norm(X, MEAN, VAR) for _ in range(2))
    assert not np.shares_memory(a, b)
    assert memory.cached_bytes() == 0
    place = a.ctypes.data
    a[...] = np.nan
    view = a[0]
    del a
    assert memory.cached_bytes() == 0  # a view of it lives
    del view
    assert X.nbytes <= memory.cached_bytes() <= 1.2 * X.nbytes
    c = cbn.batch_norm(X, MEAN, VAR)
    assert c.ctypes.data == place
    assert memory.cached_bytes() == 0
    np.testing.assert_array_equal(c, EXPECTED)
    np.testing.assert_array_equal(b, EXPECTED)


def test_limit():
    assert cbn.get_cache_limit() == 1 << 26
    cbn.set_cache_limit(5 * X.nbytes // 2)
    arrays = [cbn.batch_norm(X, MEAN, VAR) for _ in range(4)]
    del arrays
    assert X.nbytes <= memory.cached_bytes() <= 5 * X.nbytes // 2
    cbn.set_cache_limit(X.nbytes // 2)
    assert memory.cached_bytes() == 0
    cbn.batch_norm(X, MEAN, VAR)
    assert memory.cached_bytes() == 0
    cbn.set_cache_limit(0)
    np.testing.assert_array_equal(cbn.batch_norm(X, MEAN, VAR), EXPECTED)
    assert memory.cached_bytes() == 0


def test_emptying():
    cbn.batch_norm(X, MEAN, VAR)
    assert memory.cached_bytes() > 0
    assert cbn.empty_cache() is None
    assert memory.cached_bytes() == 0
    np.testing.assert_array_equal(cbn.batch_norm(X, MEAN, VAR), EXPECTED)


@pytest.mark.parametrize(
    "size, error", [(-1, ValueError), (2**70, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError), (None, TypeError)]
)
def test_wrong_limits(size, error):
    with pytest.raises(error, match=f"^size: expected a number of bytes.* got {size!r}"):
        cbn.set_cache_limit(size)
    assert cbn.get_cache_limit() == 1 << 26


def test_given_back_when_idle():
    cbn.batch_norm(X, MEAN, VAR)
    assert memory.cached_bytes() > 0
    end = time.monotonic() + 60
    while memory.cached_bytes() and time.monotonic() < end:
        time.sleep(0.05)
    assert memory.cached_bytes() == 0
    np.testing.assert_array_equal(cbn.batch_norm(X, MEAN, VAR), EXPECTED)


REFUSED = """
import resource
big = lambda mib: np.broadcast_to(np.float32(1), (1, 1, mib << 18))
cbn.batch_norm(big(300), [0.0], [1.0])
assert cbn.memory.cached_bytes() >= 300 << 20
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (450 << 20), -1))
{call}
print(cbn.memory.cached_bytes() >> 20)
"""
CALLS = {
    "inference": "cbn.batch_norm(big(500), [0.0], [1.0])",
    "training": "cbn.batch_norm_train(big(500))",
    "backward": "cbn.batch_norm_backward(big(500), big(500), ([0.0], [1.0]))",
    "without keeping": "cbn.memory.set_cache_limit(400 << 20); cbn.batch_norm(big(500), [0.0], [1.0])",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("call", CALLS)
def test_given_back_when_the_system_refuses_memory(call):
    done = python(REFUSED.format(call=CALLS[call]), CBN_CACHE_BYTES=str(1 << 30), CBN_NUM_THREADS="1")
    assert (done.returncode, done.stderr) == (0, "")


def test_forks():
    """A child begins with nothing kept, and keeps and gives back as its parent does."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    cbn.batch_norm(X, MEAN, VAR)
    child = os.fork()
    if child == 0:
        try:
            empty = memory.cached_bytes() == 0
            cbn.batch_norm(X, MEAN, VAR)
            os._exit(0 if empty and memory.cached_bytes() > 0 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(cbn.batch_norm(X, MEAN, VAR), EXPECTED)


def test_default_limits():
    """Little, and the block freed last: what a loop takes."""
    code = """
assert cbn.get_cache_limit() > 0
x = np.ones((1, 1, 49 << 18), np.float32)
ys = [cbn.batch_norm(x, [0.0], [1.0]) for _ in range(6)]
del ys
print(cbn.memory.cached_bytes() >> 20)
"""
    done = python(code, CBN_CACHE_BYTES="")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64 + 60
    assert int(python(code.replace("assert cbn.get_cache_limit() > 0", ""), CBN_CACHE_BYTES="0").stdout) == 0
    assert "CBN_CACHE_BYTES: expected a number of bytes, got 'x'" in python("", CBN_CACHE_BYTES="x").stderr


def test_like_any_other_array():
    y = cbn.batch_norm(X, MEAN, VAR)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(y)), EXPECTED)
    np.testing.assert_array_equal(y.copy() + 0 * y, EXPECTED)
    y.resize((9, *X.shape[1:]), refcheck=False)
    np.testing.assert_array_equal(y[:8], EXPECTED)
    assert (y[8] == 0).all()
    y.resize((2, *X.shape[1:]), refcheck=False)
    np.testing.assert_array_equal(y, EXPECTED[:2])
    np.testing.assert_array_equal(cbn.batch_norm(X, MEAN, VAR), EXPECTED)


def test_only_large_outputs_of_cbn():
    cbn.batch_norm(X[:1], MEAN, VAR)
    np.empty_like(X)
    cbn.batch_norm(X, MEAN, VAR, out=np.empty_like(X))
    assert memory.cached_bytes() == 0


def test_many_threads_at_once():
    """No block is handed out twice."""

    def work(i):
        y = cbn.batch_norm(X, MEAN + i, VAR)
        return (y == cbn.batch_norm(X, MEAN + i, VAR)).all() and np.array_equal(y, EXPECTED) == (i == 0)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [0, 1, 2, 3] * 10))
