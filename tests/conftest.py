"""What tests vary: the CPU level and the number of threads and where stores go, each put back afterwards."""

import math
import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # more threads than cores: waiting ones must not spin

import cbn
from cbn import dispatch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: builds the package, half a minute each")


@pytest.fixture
def restored():
    """Leaves the CPU level, the threads and the way of storing as they were."""
    before = dispatch.get_isa(), dispatch.get_stream_bytes(), cbn.threads.get_grain(), cbn.get_num_threads(), cbn.threads.get_patience()
    cbn.threads.set_patience(math.inf)  # small work in many threads is slow, and meant to be
    yield
    dispatch.set_isa(before[0])
    dispatch.set_stream_bytes(before[1])
    cbn.threads.set_grain(before[2])
    cbn.set_num_threads(before[3])
    cbn.threads.set_patience(before[4])


@pytest.fixture(params=dispatch.isa_available())
def isa(request, restored):
    dispatch.set_isa(request.param)
    return request.param


@pytest.fixture(params=[(1, False), (1, True), (2, True), (3, False), (7, True)], ids=lambda p: f"threads{p[0]}{'stream' * p[1]}")
def threads(request, restored):
    """The number of threads, which even the smallest arrays are shared among, without and with stores past the caches."""
    cbn.set_num_threads(request.param[0])
    cbn.threads.set_grain(1)
    dispatch.set_stream_bytes(0 if request.param[1] else math.inf)
    return request.param[0]
