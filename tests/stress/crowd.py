"""What others on the same cores cost: worker processes beside one another, callers within one process, and a caller alone.

    python tests/stress/crowd.py                                            (about eight minutes)
    python tests/stress/crowd.py --sizes 100000 --rounds 9 --training

Prints a line for each crowd and size: calls a second with cbn's defaults, what share this is of the calls with one thread each, and, where a process
has one caller, of those with all threads whoever else is there, as plain OpenMP has it. Medians of several rounds, in which each way is measured in turn.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time

import cbn

FOLDER = pathlib.Path(cbn.__file__).parents[1]  # where processes look first for modules: not in the source
WAYS = {"defaults": "", "one thread": "cbn.set_num_threads(1)", "all threads": "cbn.threads.set_patience(math.inf)"}

MEASURE = """
import math, sys, threading, time
import numpy as np
import cbn
training, callers, size, start, seconds = map(float, sys.argv[1:])
{way}
calls = [0] * int(callers)
mean, var = np.zeros(64), np.ones(64)
xs = np.random.default_rng(0).standard_normal((len(calls), 1, 64, int(size) // 64, 1), np.float32)
def call(i):
    x, out = xs[i], np.empty_like(xs[i])
    while time.time() < start + seconds:
        cbn.batch_norm_train(x, out=out) if training else cbn.batch_norm(x, mean, var, out=out)
        calls[i] += time.time() > start
threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
for t in threads:
    t.start()
for t in threads:
    t.join()
print(sum(calls) / seconds)
"""


def throughput(way, workers, callers, size, given):
    """Calls a second of all workers, counted from a moment when all have begun."""
    start = time.time() + 0.6 + 0.3 * workers
    numbers = [given.training, callers, size, start, given.seconds]
    command = [sys.executable, "-c", MEASURE.format(way=WAYS[way]), *(str(float(number)) for number in numbers)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=FOLDER, env={"OPENBLAS_NUM_THREADS": "1"} | os.environ) for _ in range(workers)]
    return sum(float(worker.communicate()[0]) for worker in running)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64_000, 200_000, 2_000_000], metavar="N", help="elements of the float32 arrays, of 64 channels (default %(default)s)")
    parser.add_argument("--workers", type=int, nargs="*", default=[4], metavar="N", help="processes, of one caller each (default %(default)s)")
    parser.add_argument("--callers", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], metavar="N", help="threads of one process (default %(default)s)")
    parser.add_argument("--training", action="store_true", help="batch_norm_train instead of batch_norm")
    parser.add_argument("--seconds", type=float, default=1, metavar="S", help="that each measurement takes (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of which the median is shown (default %(default)s)")
    given = parser.parse_args()
    print(f"{'':24} {'elements':>10} {'calls/s':>10} {'of one thread':>15} {'of all threads':>15}")
    for workers, callers in [(n, 1) for n in given.workers] + [(1, n) for n in given.callers]:
        for size in given.sizes:
            ways = list(WAYS)[: 3 if callers == 1 else 2]
            rounds = [{way: throughput(way, workers, callers, size, given) for way in ways} for _ in range(given.rounds)]
            medians = [statistics.median(r[way] for r in rounds) for way in ways]
            name = f"{workers} processes" if workers > 1 else f"1 process, {callers} callers" if callers > 1 else "alone"
            print(f"{name:24} {size:10,} {medians[0]:10,.0f}", *(f"{medians[0] / median:15.2f}" for median in medians[1:]), flush=True)


if __name__ == "__main__":
    main()
