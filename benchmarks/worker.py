"""A process that holds one contender, for one number of threads, and works only when it is its turn.

It is told by pickled requests on its standard input and answers, pickled, on its standard output:

    ("prepare", cell) -> ("ready", sample of the results) or ("cannot", reason)
    ("turn", seconds) -> (seconds per call: the median over the calls of the turn, whether other processes disturbed it)
    ("free",)         -> None
"""

import gc
import glob
import importlib
import os
import pickle
import statistics
import sys
import time
from contextlib import suppress
from itertools import repeat

import numpy as np
from contenders import Cannot
from workloads import IMAGES

BATCH = 50e-6  # seconds that are timed at once, so that the clock's resolution and cost don't matter
SAMPLES = 1000  # values of each result that are compared with cbn's
ATTEMPTS = 3  # at a turn that other processes don't disturb
DISTURBED = 0.05  # of the time its threads were ready to run, but others were running


def time_calls(call, calls, seconds):
    """Seconds per call, one value for each batch of calls: at least three, and until the time is up."""
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        for _ in repeat(None, calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return times


def waited():
    """Seconds that this process's threads have been ready to run, but others were running; 0 where the system doesn't tell."""
    nanoseconds = 0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        with suppress(OSError), open(path) as file:  # the thread may have ended
            nanoseconds += int(file.read().split()[1])
    return nanoseconds / 1e9


def measure(call, calls, seconds):
    """The median seconds per call of the least disturbed attempt, and what share of its time was spent waiting for others."""
    attempts = []
    while len(attempts) < ATTEMPTS and not (attempts and attempts[-1][0] < DISTURBED):
        before, begin = waited(), time.perf_counter()
        times = time_calls(call, calls, seconds)
        attempts.append(((waited() - before) / (time.perf_counter() - begin), statistics.median(times)))
    share, median = min(attempts)
    return median, share


def settle():
    """Wait until the threads that spin for more work have gone to sleep; a tenth of a second at most."""
    for _ in range(30):
        used = time.process_time()
        time.sleep(0.003)
        if time.process_time() - used < 0.0003:
            return


def sample(results):
    """Of each array: its size, some of its values, its sum, and that of the magnitudes."""
    samples = {}
    for name, array in results.items():
        flat = np.asarray(array).reshape(-1)
        some = flat[:: max(1, flat.size // SAMPLES)].astype(np.float64)
        samples[name] = flat.size, some, float(flat.sum(dtype=np.float64)), float(np.abs(flat).sum(dtype=np.float64))
    return samples


class Prepared:
    """A cell made ready: the fastest of the contender's calls, and how many of them are timed at once."""

    def __init__(self, contender, cell):
        calls, self.results = (contender.prepare_images if cell.op == IMAGES else contender.prepare)(cell)
        trials = []
        for call in calls:
            call()
            calls_at_once = max(1, round(BATCH / min(time_calls(call, 1, 0))))
            trials.append((measure(call, calls_at_once, 0.003)[0], calls_at_once, call))
        _, self.calls_at_once, self.call = min(trials, key=lambda trial: trial[0])

    def sample(self):
        return sample(self.results(self.call()))

    def turn(self, seconds):
        time_calls(self.call, 1, seconds / 10)  # wakes the threads and brings the arrays back into the caches
        median, share = measure(self.call, self.calls_at_once, seconds)
        return median, share >= DISTURBED


def main(name):
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(value):
        settle()
        pickle.dump(value, answers)
        answers.flush()

    try:
        contender = importlib.import_module(f"contenders.{name}")
        answer(("ready", contender.versions()))
    except Exception as error:  # noqa: BLE001 -- whatever a peer fails with, the race goes on without it
        return answer(("cannot", f"{type(error).__name__}: {error}"))
    prepared = None
    while True:
        try:
            request, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return None
        if request == "prepare":
            try:
                prepared = Prepared(contender, *arguments)
                answer(("ready", prepared.sample()))
            except Cannot as reason:
                answer(("cannot", str(reason)))
            except Exception as error:  # noqa: BLE001
                answer(("cannot", f"failed with {type(error).__name__}: {error}"))
        elif request == "turn":
            answer(prepared.turn(*arguments))
        elif request == "free":
            prepared = None
            gc.collect()
            answer(None)


if __name__ == "__main__":
    main(sys.argv[1])
