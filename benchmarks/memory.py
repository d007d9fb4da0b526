"""Measures how much memory an operation takes beyond its arguments and its output, for arrays that grow at a fixed number of channels.

Each figure is of a process of its own: the peak of its resident memory during one call with out=, less what it was before (Linux only).
The NumPy expression is measured too, to show that the method sees a temporary.

With --service: what a service takes that lets cbn allocate its outputs, one layer after the other, in batches of 1 to 64 images, and then pauses.
"""

import argparse
import subprocess
import sys
import time
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


def serve():
    """MB beyond what was there before requests came: at most, after the last one, and two seconds later."""
    layers = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]
    inputs = [np.ones((64, channels, width, width), np.float32) for channels, width in layers]
    ones = [np.ones(channels, np.float32) for channels, _ in layers]
    cbn.batch_norm(inputs[0][:1, :, :8, :8], ones[0], ones[0])
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = resident("VmRSS")
    for batch in np.random.default_rng(0).permutation(np.repeat(np.arange(1, 65), 4)):
        outputs = [cbn.batch_norm(x[:batch], one, one) for x, one in zip(inputs, ones, strict=True)]
        largest = sum(y.nbytes for y in outputs) * 64 // batch
        del outputs
    figures = [resident("VmHWM"), resident("VmRSS")]
    time.sleep(2)
    figures.append(resident("VmRSS"))
    peak, after, idle = ((figure - before) * 1024 / 1e6 for figure in figures)
    print(f"MB: {peak:.0f} at most, of which {largest / 1e6:.0f} outputs of the largest batch; {after:.0f} after the last request; {idle:.0f} two seconds later")


def measure(*arguments):
    """What perform returns, in a new process."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--threads", type=int, default=cbn.get_num_threads())
    parser.add_argument("--one", nargs=5, metavar=("OPERATION", "LAYOUT", "BATCH", "CHANNELS", "THREADS"), help="a single figure, in KB")
    parser.add_argument("--service", action="store_true", help="what a service takes, with the cbn that Python finds first")
    chosen = parser.parse_args()
    if chosen.service:
        return serve()
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
