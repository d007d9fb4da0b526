"""What goes wrong once in thousands of times, if at all: forks while threads compute, forks within forks, leaks, threads that come and go.

    python tests/stress/stress.py                                       (some minutes: the numbers below)
    python tests/stress/stress.py --forks 100 --nested 5 --calls 10000 --threads 100 --seed 3

Prints a line a subject; ends with status 1 where a result is wrong, a child hangs or memory grows by a megabyte. Linux only.
"""

import argparse
import gc
import math
import os
import sys
import threading
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import cbn

SHAPES = [(4, 8, 5, 5), (16, 64), (2, 33, 9, 11), (1, 64, 1, 7), (64, 3)]


def work(x):
    y, stats = cbn.batch_norm_train(x)
    return [y, stats.mean, stats.var, *cbn.batch_norm_backward(y, x, stats), cbn.batch_norm(x, stats.mean, stats.var)]


class Subject:
    """Inputs, and what comes of each in one thread, which is right for any number of them."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.xs = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
        with cbn.num_threads(1):
            self.expected = [self.bits(x) for x in self.xs]
        self.failures = 0

    @staticmethod
    def bits(x):
        return [a.tobytes() for a in work(x)]

    def check(self, i):
        fine = self.bits(self.xs[i % len(self.xs)]) == self.expected[i % len(self.xs)]
        self.failures += not fine
        return fine


def exit_code(child, seconds):
    """Of a child; one that hangs is ended, and its code is 99."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return 99
        time.sleep(0.0002)


def forks(subject, count):
    """Children that compute, forked while two threads do."""
    stop = threading.Event()

    def compute(i):
        while not stop.is_set():
            subject.check(i)

    computing = [threading.Thread(target=compute, args=(i,)) for i in range(2)]
    for t in computing:
        t.start()
    codes = {}
    for i in range(count):
        child = os.fork()
        if child == 0:
            os._exit(0 if subject.check(i) else 1)
        code = exit_code(child, 30)
        codes[code] = codes.get(code, 0) + 1
    stop.set()
    for t in computing:
        t.join()
    return codes == {0: count} or count == 0, f"exit codes {codes}"


def nested(subject, depth):
    """A child of a child of a child, each of which computes before and after."""

    def generation(left):
        fine = subject.check(left)
        if left:
            child = os.fork()
            if child == 0:
                os._exit(generation(left - 1))
            fine = exit_code(child, 60) == 0 and subject.check(left) and fine
        return 0 if fine else 1

    return generation(depth) == 0, "every generation right, before its child and after"


def resident():
    """Bytes of memory that the process has."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def calls(subject, count):
    """Memory after the first tenth of the calls, which fills the caches of others, and after all."""
    for i in range(count):
        if i == count // 10:
            before = resident()
        x = subject.xs[i % len(subject.xs)]
        if i % 1000 == 0:
            subject.check(i // 1000)
        elif i % 2:
            cbn.batch_norm(x, np.zeros(x.shape[1]), np.ones(x.shape[1]))
        else:
            cbn.batch_norm_train(x)
    growth = resident() - before if count else 0
    return growth < 1 << 20, f"memory grew by {growth / 1024:.0f} KiB"


def threads(subject, count):
    """Threads that make one call each, four at a time; memory after the first tenth of them, and after all."""
    most = 0
    for first in range(0, count, 4):
        if first == count // 40 * 4:
            before = resident()
        group = [threading.Thread(target=subject.check, args=(i,)) for i in range(first, min(first + 4, count))]
        for t in group:
            t.start()
        most = max(most, len(os.listdir("/proc/self/task")))
        for t in group:
            t.join()
    growth = resident() - before if count else 0
    return most < 100 and growth < 1 << 20, f"at most {most} threads of the system at once; memory grew by {growth / 1024:.0f} KiB"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, count, what in (
        ("forks", 10_000, "children, forked while two threads compute"),
        ("nested", 100, "generations of children"),
        ("calls", 1_000_000, "calls, after which memory has not grown"),
        ("threads", 5_000, "threads that make one call each"),
    ):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"{what} (default {count})")
    parser.add_argument("--team", type=int, default=3, metavar="N", help="threads a call may use (default 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the numbers computed on (default 0)")
    given = parser.parse_args()
    cbn.set_num_threads(given.team)
    cbn.threads.set_grain(1)
    cbn.threads.set_patience(math.inf)
    subject = Subject(given.seed)
    failed = 0
    for run in (forks, nested, calls, threads):
        count, start = getattr(given, run.__name__), time.monotonic()
        fine, told = run(subject, count)
        fine = fine and subject.failures == 0
        failed += not fine
        print(f"{run.__name__} {count}: {'right' if fine else 'WRONG'}; {told}; {time.monotonic() - start:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
