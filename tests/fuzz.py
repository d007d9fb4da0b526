"""Makes random calls until something is wrong: a crash, an error that isn't due, a wrong bit, a write outside of an output, memory that grows.

    python tests/fuzz.py --seed 1 --calls 1000000

Every call is a function of the seed and its number: `--start N --calls 1` makes call N again, and a run that was stopped is resumed by --start.
Each result is compared, bit for bit, with the same call made by one thread, and to rounding (what takes no sums: bit for bit) with that on
contiguous native copies; every 50th with the reference. The last line has a hash of all results: another machine's is the same. Not a part of the
test suite.
"""

import argparse
import faulthandler
import hashlib
import math
import os
import random
import sys
import time
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # more threads than cores: waiting ones must not spin

import calls
import numpy as np

import cbn
from cbn import dispatch

BLOCK = 500  # calls on one CPU level, with one way of storing and sharing
ISAS = dispatch.isa_available()
DIGEST = hashlib.sha256()


def resident():
    """Bytes of memory that the process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bits(a):
    """The elements in C order and this machine's byte order, with one NaN for all: which one it is, machines decide."""
    a = a.astype(a.dtype.newbyteorder("="), order="C")
    a[np.isnan(a)] = np.nan
    return a.tobytes()


def set_block(block):
    dispatch.set_isa(ISAS[block % len(ISAS)])
    dispatch.set_stream_bytes(0 if block // len(ISAS) % 2 else math.inf)
    cbn.threads.set_grain((12288, 1, 1000)[block // 2 % 3])


def bound(call, given):
    """A generous bound of the rounding errors of sums, by the largest values: what it must tell apart is a wrong element, or a value left out."""
    x = np.array(given["x"].array, np.float64)
    eps = call.others.get("eps", 1.0)
    if call.operation in calls.BACKWARD:
        mean, var = (np.array(given[name].array, np.float64) for name in ("mean", "var"))
        dy = abs(np.array(given["dy"].array, np.float64)).max()
    else:
        _, mean, var = cbn.batch_stats(x, axis=call.others["axis"])
        dy = 0
    m = x.size // mean.size
    weight = abs(np.array(given["weight"].array, np.float64)).max() if "weight" in given else 1
    bias = abs(np.array(given["bias"].array, np.float64)).max() if "bias" in given else 0
    invstd = 1 / np.sqrt(var.min() + eps)
    span = abs(x).max() + abs(mean).max()
    xhat = span * invstd
    if "residual" in given:
        bias = bias + abs(np.array(given["residual"].array, np.float64)).max()
    return {
        "y": weight * xhat + bias if dy == 0 else weight * invstd * dy * (2 + xhat * xhat),
        "st_mean": span, "mean": span + 5, "st_var": span * span, "var": 2 * span * span + 5,
        "weight_grad": m * dy * xhat * 2, "bias_grad": m * dy * 2, "residual_grad": 2 * dy,
    }  # fmt: skip


def one(index, seed):
    rng = random.Random(seed << 40 | index).random
    call = calls.draw(lambda options: options[int(rng() * len(options))])
    threads = (1, 1, 1, 2, 2, 2, 3, 7)[int(rng() * 8)]
    given = {name: p.copy() for name, p in call.placed.items()}
    cbn.set_num_threads(threads)
    results = calls.run(call, call.placed)
    calls.judge(call, call.placed, given, results)
    if call.errors:
        return "error"
    for name in sorted(results):
        DIGEST.update(bits(results[name]))
    cbn.set_num_threads(1)
    if threads > 1:
        for name, a in calls.run(call, {name: p.copy() for name, p in given.items()}).items():
            assert calls.same(results[name], a), f"{name}: other bits with {threads} threads than with one"
    exact = call.operation in ("inference", "frozen")
    size = bound(call, given) if given["x"].array.size and not call.poison else {}
    for name, expected in calls.run(call, calls.plain(given)).items():
        actual = np.array(results[name], results[name].dtype.newbyteorder("="))
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
        if exact and name == "y":
            assert calls.same(actual, expected), f"{name}: other bits than of contiguous copies"
        elif name in size and (name == "y" or actual.dtype != np.float16):
            errors = abs(actual.astype(np.float64) - expected.astype(np.float64))
            if actual.itemsize == 2:  # beyond its range one of the two may have become infinite
                errors = errors[np.isfinite(actual) & np.isfinite(expected)]
            error = errors.max(initial=0)
            allowed = 16 * max(calls.epsilon(calls.type_of_results(given["x"].dtype)), calls.epsilon(actual.dtype)) * size[name]
            assert error <= allowed or not np.isfinite(allowed), f"{name}: {error} from the result of contiguous copies, expected {allowed}"
    if index % 50 == 0:
        calls.compare_with_reference(call, given, results)
    return call.operation


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first call")
    parser.add_argument("--calls", type=int, default=100_000)
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    counts, begin, first_size, block = {}, time.perf_counter(), None, None
    for index in range(options.start, options.start + options.calls):
        if index // BLOCK != block:
            block = index // BLOCK
            set_block(block)
        try:
            kind = one(index, options.seed)
        except BaseException:
            print(f"call {index} of seed {options.seed}: --seed {options.seed} --start {index} --calls 1", file=sys.stderr)
            raise
        counts[kind] = counts.get(kind, 0) + 1
        done = index + 1 - options.start
        if done == 10_000:
            first_size = resident()
        if done % 50_000 == 0 or done == options.calls:
            growth = (resident() - first_size) / 2**20 if first_size else 0.0
            print(f"{done} calls, {done / (time.perf_counter() - begin):.0f} a second, {growth:+.1f} MiB", counts, flush=True)
            assert growth < 64, "memory grows"
    print("results", DIGEST.hexdigest()[:16])


if __name__ == "__main__":
    main()
