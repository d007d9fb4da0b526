"""What synchronizing over MPI costs: a step of all batch normalizations of ResNet-50 on each rank, and the collectives by themselves.

    OMP_NUM_THREADS=1 mpiexec -n 2 python benchmarks/synchronized.py --batch 16
"""

import argparse
import statistics
import time

import numpy as np
import workloads
from mpi4py import MPI

import cbn

COMM = MPI.COMM_WORLD


class Counting:
    """A communicator that counts its collectives, and the bytes that this rank sends."""

    calls = bytes = 0

    def __getattr__(self, name):
        return getattr(COMM, name)

    def Allgather(self, message, everyone):
        self.calls, self.bytes = self.calls + 1, self.bytes + message.nbytes
        COMM.Allgather(message, everyone)


def timed(call):
    """Seconds of the slowest rank."""
    COMM.Barrier()
    start = time.perf_counter()
    call()
    return COMM.allreduce(time.perf_counter() - start, MPI.MAX)


def medians(calls, rounds):
    """Of calls in turn, seconds."""
    for call in calls:
        call()
    times = [[timed(call) for call in calls] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def step_of(layer, x, dy, y, dx):
    def forward():
        layer(x, out=y)

    def backward():
        layer.backward(dy, out=dx, retain=True)

    return forward, backward


def measure_step(batch, rounds):
    """Print seconds of a step; returns those of the kernels alone, forward and backward."""
    totals = {"alone": [0, 0], "in halves": [0, 0], "synchronized": [0, 0]}
    counting = Counting()
    for shape, count in workloads.resnet50().items():
        x, dy = np.random.default_rng(COMM.rank).standard_normal((2, batch, *shape), np.float32)
        y, dx = np.empty_like(x), np.empty_like(x)
        for comm, total in zip((None, MPI.COMM_SELF, COMM), totals.values(), strict=True):
            layer = cbn.BatchNorm2d(shape[0], comm=comm)
            total[:] = (a + count * b for a, b in zip(total, medians(step_of(layer, x, dy, y, dx), rounds), strict=True))
        layer = cbn.BatchNorm2d(shape[0], comm=counting)
        counting.calls -= 1     # that of making it
        counting.bytes -= 16
        for _ in range(count):
            layer(x)
            layer.backward(dy)
    if COMM.rank == 0:
        print(f"\n53 layers of ResNet-50, {batch} images a rank, {COMM.size} ranks of {cbn.get_num_threads()} threads, milliseconds a step:")
        for name, (forward, backward) in totals.items():
            print(f"  {name:13} forward {forward * 1e3:7.1f}   backward {backward * 1e3:7.1f}   together {(forward + backward) * 1e3:7.1f}")
        print(f"  each rank takes part in {counting.calls} collectives and sends {counting.bytes} bytes")


def measure_collectives(rounds):
    """Print the time of one Allgather, and what an Iallgather hides behind the statistics of another array."""
    x = np.random.default_rng(0).standard_normal((16, 256, 14, 14), np.float32)
    if COMM.rank == 0:
        print("\nmicroseconds, of 100 at a time:")
    for channels in (64, 256, 2048):
        message, everyone = np.zeros(3 + 2 * channels), np.empty((COMM.size, 3 + 2 * channels))

        def gather():
            COMM.Allgather(message, everyone)       # noqa: B023

        def blocking():
            COMM.Allgather(message, everyone)       # noqa: B023
            cbn.batch_stats(x)

        def in_flight():
            request = COMM.Iallgather(message, everyone)    # noqa: B023
            cbn.batch_stats(x)
            request.Wait()

        calls = [lambda call=call: [call() for _ in range(100)] for call in (gather, blocking, in_flight)]
        alone, after, beside = (seconds * 1e4 for seconds in medians(calls, rounds))
        if COMM.rank == 0:
            print(f"  {channels:4} channels: Allgather {alone:6.1f}; before the statistics of an array {after:7.1f}, beside them {beside:7.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images a rank (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is taken (default: %(default)s)")
    arguments = parser.parse_args()
    measure_collectives(arguments.rounds)
    measure_step(arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
