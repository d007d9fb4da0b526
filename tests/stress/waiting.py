"""What waiting costs: the CPU time of all threads for each call of a service that calls now and then, and the speed of calls back to back.

    python tests/stress/waiting.py
    python tests/stress/waiting.py --shape 32 64 56 56 --pause 10 --threads 4

OpenMP's threads spin for a while after a call, so that the next finds them awake; OMP_WAIT_POLICY=passive in the environment of a process lets
them sleep. Prints a line for each way: the medians of several rounds, in which each way is measured in turn, in a process of its own.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys

import cbn

FOLDER = pathlib.Path(cbn.__file__).parents[1]  # where processes look first for modules: not in the source
WAYS = {"one thread": ({}, 1), "default": ({}, None), "OMP_WAIT_POLICY=passive": ({"OMP_WAIT_POLICY": "passive"}, None)}

MEASURE = """
import sys, time
import numpy as np
import cbn
*shape, threads, pause, seconds = map(float, sys.argv[1:])
cbn.set_num_threads(int(threads))
x = np.random.default_rng(0).standard_normal([int(n) for n in shape]).astype(np.float32)
out, mean, var = np.empty_like(x), np.zeros(x.shape[1]), np.ones(x.shape[1])
def run(pause):
    calls, cpu, start = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() < start + seconds:
        cbn.batch_norm(x, mean, var, out=out)
        calls += 1
        time.sleep(pause) if pause else None
    return 1e3 * (time.process_time() - cpu) / calls, 1e3 * (time.perf_counter() - start) / calls
run(pause)
print(run(pause)[0], *reversed(run(0)))
"""


def measured(way, given):
    environment, threads = WAYS[way]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    numbers = [*given.shape, threads or given.threads, given.pause / 1e3, given.seconds]
    command = [sys.executable, "-c", MEASURE, *map(str, numbers)]
    done = subprocess.run(command, cwd=FOLDER, env=kept | environment, stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs="+", default=[8, 64, 28, 28], metavar="N", help="of the float32 array (default 8 64 28 28)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads a call may use (default 2)")
    parser.add_argument("--pause", type=float, default=3, metavar="MS", help="milliseconds between two calls (default 3)")
    parser.add_argument("--seconds", type=float, default=1, metavar="S", help="that each measurement takes (default 1)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of which the median is shown (default 5)")
    given = parser.parse_args()
    rounds = [{way: measured(way, given) for way in WAYS} for _ in range(given.rounds)]
    print(f"milliseconds a call      CPU, one each {given.pause:g} ms   back to back: elapsed   CPU")
    for way in WAYS:
        cpu, elapsed, busy = (statistics.median(r[way][i] for r in rounds) for i in range(3))
        print(f"{way:24} {cpu:21.3f} {elapsed:22.3f} {busy:5.3f}")


if __name__ == "__main__":
    main()
