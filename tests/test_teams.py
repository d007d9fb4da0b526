"""Who has a team of threads when: many callers at once, a system that refuses threads, cores that other processes use, forked children."""

import os
import sys

import pytest
from interpreter import output
from test_threads import openmp

pytestmark = [openmp, pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of a process as Linux shows them")]

# What the code below begins with: work worth several threads, and the number of threads that OpenMP and Python made.
BEGIN = """
import math, resource, threading, time
from concurrent.futures import ThreadPoolExecutor
cbn.threads.set_patience(math.inf)
cbn.threads.set_grain(1)
def count():
    return len(os.listdir("/proc/self/task"))
x = np.random.default_rng(41).standard_normal((8, 33, 9, 11)).astype(np.float32)
with cbn.num_threads(1):
    expected = cbn.batch_norm_train(x)[0].tobytes()
def right():
    return cbn.batch_norm_train(x)[0].tobytes() == expected
before = count()
"""
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def shown(code):
    return output(BEGIN + code, **ENVIRONMENT).split("\n")


def test_a_lone_caller_has_its_whole_team():
    assert shown("cbn.set_num_threads(3); print(right(), count() - before)") == ["True 2"]


def test_many_callers():
    """Each is right, and few of them have teams, at once or one after the other."""
    lines = shown("""
cbn.set_num_threads(3)
def call(_):
    assert right()
    lasting = count()       # without the threads by which calls find out whether the system grants any: they are gone soon
    for _ in range(4):
        time.sleep(0.002)
        lasting = min(lasting, count())
    return lasting
for workers in (32, 1):
    with ThreadPoolExecutor(workers) as pool:
        most = max(pool.map(call, range(600)))       # within the second for which a team is kept
    print(before + workers <= most <= before + workers + 8 * 2)
meet = threading.Barrier(33)
def wait():
    call(0)
    meet.wait()
threads = [threading.Thread(target=wait) for _ in range(32)]
time.sleep(0.05)    # until calls that met are forgotten; these don't meet
for i, t in enumerate(threads, 1):
    t.start()
    while meet.n_waiting < i:
        time.sleep(0.0001)
print(count() - before - 32)
meet.wait()
for t in threads:
    t.join()
time.sleep(0.1)     # the system needs a moment to end them
print(right(), count() - before)
""")
    assert lines == ["True", "True", str(8 * 2), "True 2"]


def test_teams_of_ended_threads_are_not_counted():
    """More callers, one after the other, than may have teams at once: the last has one still."""
    lines = shown("""
cbn.set_num_threads(3)
def call():
    right()
    seen.append(count())
seen = []
for _ in range(50):
    t = threading.Thread(target=call)
    t.start()
    t.join()
print(min(seen) >= before + 3)
""")
    assert lines == ["True"]


def test_team_of_a_thread_that_calls_no_more():
    """After a second, another thread may have one in its place."""
    lines = shown("""
cbn.set_num_threads(3)
meet = threading.Barrier(9)
def wait():
    right()
    meet.wait()
threads = [threading.Thread(target=wait) for _ in range(8)]
for t in threads:
    t.start()
while meet.n_waiting < 8:
    time.sleep(0.001)
teams = count()
right()
print(count() - teams)
time.sleep(1.1)
right()
print(count() - teams)
meet.wait()
""")
    assert lines[1] == "2" and lines[0] in "02"  # 2: not all eight had got one


def test_system_that_refuses_threads():
    """Calls work, in one thread, and in several again a second after that is allowed."""
    lines = shown("""
if os.getuid() == 0:
    os.setuid(65534)        # the limit does not bind the superuser
limits = resource.getrlimit(resource.RLIMIT_NPROC)
resource.setrlimit(resource.RLIMIT_NPROC, (1, limits[1]))
try:
    threading.Thread(target=int).start()
    print("threads are not refused")
except RuntimeError:
    print("refused")
cbn.set_num_threads(3)
print(right(), right(), count() - before)
resource.setrlimit(resource.RLIMIT_NPROC, limits)
print(right(), count() - before)
time.sleep(1.1)
print(right(), count() - before)
""")
    if lines[0] != "refused":
        pytest.skip(lines[0])
    assert lines[1:] == ["True True 0", "True 0", "True 2"]


def test_without_teams_for_a_while():
    """Where threads wait for each other for most of the time, as these, which have next to nothing to do, the process makes do with one."""
    lines = shown("""
cbn.set_num_threads(64)
cbn.threads.set_patience(0.001)
x = x[:, :, :1, :1]
end = time.monotonic() + 60
while cbn.threads.teams_pause() == 0 and time.monotonic() < end:
    cbn.batch_norm_train(x)
print(0 < cbn.threads.teams_pause() <= 0.5)
while cbn.threads.teams_pause() > 0:
    time.sleep(0.01)
while cbn.threads.teams_pause() == 0 and time.monotonic() < end:
    cbn.batch_norm_train(x)
print(0.5 < cbn.threads.teams_pause() <= 1)     # twice as long the next time
cbn.threads.set_patience(math.inf)
time.sleep(1.1)
print(cbn.threads.teams_pause())
""")
    assert lines == ["True", "True", "0.0"]


def test_waking_is_no_waiting():
    """Threads that slept take a while to be at work again; that doesn't count as waiting for others."""
    lines = shown("""
cbn.set_num_threads(2)
cbn.threads.set_patience(1e-9)
x = x[:, :, :1, :1]
for _ in range(30):
    time.sleep(0.02)
    cbn.batch_norm_train(x)
print(cbn.threads.teams_pause())
""")
    assert lines == ["0.0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_children():
    """A child has teams of its own, whoever had some, was computing or was refused them in the parent; so does its child."""
    lines = shown("""
cbn.set_num_threads(3)
stop = threading.Event()
def compute():
    while not stop.is_set():
        right()
threads = [threading.Thread(target=compute) for _ in range(9)]
for t in threads:
    t.start()
def family(generations):
    child = os.fork()
    if child == 0:
        before = count()
        fine = right() and count() == before + 2 and (generations == 1 or family(generations - 1) == 0)
        os._exit(0 if fine else 1)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, 9)
    return "hangs"
print({family(3) for _ in range(20)})
stop.set()
""")
    assert lines == ["{0}"]
