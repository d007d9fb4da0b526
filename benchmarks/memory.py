"""Measures how much memory an operation takes beyond its arguments and its output, for arrays that grow at a fixed number of channels.

Each figure is of a process of its own: the peak of its resident memory during one call with out=, less what it was before (Linux only).
The NumPy expression is measured too, to show that the method sees a temporary.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

import cbn

OPERATIONS = ("inference", "training", "backward", "statistics", "numpy")


def resident(field):
    """VmRSS, the memory that is resident now, or VmHWM, its peak, in KB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])


def perform(operation, x, axis):
    """Make the call on x once, in small to load the code and start the threads, then as it is; return KB beyond what was there before."""
    channels = x.shape[axis]
    ones = np.ones(channels, np.float32)
    stats = cbn.BatchStats(x.size // channels, np.ones(channels), np.ones(channels))

    def call(x, dy, out):
        if operation == "inference":
            cbn.batch_norm(x, ones, ones, ones, ones, axis=axis, out=out)
        elif operation == "training":
            cbn.batch_norm_train(x, ones, ones, axis=axis, out=out)
        elif operation == "backward":
            cbn.batch_norm_backward(dy, x, stats, ones, axis=axis, out=out)
        elif operation == "statistics":
            cbn.batch_stats(x, axis=axis)
        else:
            np.copyto(out, x * 1.5 + 0.25)

    small = np.ones_like(x[:1])
    call(small, small, np.ones_like(small))
    dy, out = np.ones_like(x), np.ones_like(x)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = resident("VmRSS")
    call(x, dy, out)
    return resident("VmHWM") - before


def measure(*arguments):
    """What perform returns, in a new process."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--threads", type=int, default=cbn.get_num_threads())
    parser.add_argument("--one", nargs=5, metavar=("OPERATION", "LAYOUT", "BATCH", "CHANNELS", "THREADS"), help="a single figure, in KB")
    chosen = parser.parse_args()
    if chosen.one:
        operation, layout, *numbers = chosen.one
        batch, channels, threads = map(int, numbers)
        cbn.set_num_threads(threads)
        shape = (batch, channels, 56, 56) if layout == "first" else (batch, 56, 56, channels)
        return print(perform(operation, np.ones(shape, np.float32), 1 if layout == "first" else -1))

    batches = (2, 8, 32)
    sizes = [f"{batch * chosen.channels * 56 * 56 * 4 / 1e6:.0f} MB" for batch in batches]
    print(f"KB beyond arguments and output, {chosen.channels} channels, {chosen.threads} threads")
    print(f"{'operation':<12}{'channels':<10}" + "".join(f"{size:>10}" for size in sizes))
    for operation in OPERATIONS:
        for layout in ("first", "last"):
            figures = [measure(operation, layout, batch, chosen.channels, chosen.threads) for batch in batches]
            print(f"{operation:<12}{layout:<10}" + "".join(f"{figure:>10}" for figure in figures))


if __name__ == "__main__":
    main()
