"""What synchronizing over MPI costs: a step of all batch normalizations of ResNet-50 on each rank, and the collectives by themselves.

    OMP_NUM_THREADS=1 mpiexec -n 2 python benchmarks/synchronized.py --batch 16
"""

import argparse
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


def measured(calls, rounds):
    """Seconds of calls made in turn: of each, the median and the least."""
    for call in calls:
        call()
    times = np.array([[timed(call) for call in calls] for _ in range(rounds)])
    return np.transpose([np.median(times, axis=0), times.min(axis=0)])


def step_of(layer, x, dy, y, dx):
    def forward():
        layer(x, out=y)

    def backward():
        layer.backward(dy, out=dx, retain=True)

    return forward, backward


def measure_step(batch, rounds):
    """Print what a step takes without a communicator, in the two halves that synchronizing needs, and synchronized."""
    totals = {name: np.zeros((2, 2)) for name in ("alone", "in halves", "synchronized")}
    counting = Counting()
    for shape, count in workloads.resnet50().items():
        x, dy = np.random.default_rng(COMM.rank).standard_normal((2, batch, *shape), np.float32)
        y, dx = np.empty_like(x), np.empty_like(x)
        for comm, total in zip((None, MPI.COMM_SELF, COMM), totals.values(), strict=True):
            layer = cbn.BatchNorm2d(shape[0], comm=comm)
            total += count * measured(step_of(layer, x, dy, y, dx), rounds)
        layer = cbn.BatchNorm2d(shape[0], comm=counting)
        counting.calls -= 1     # that of making it
        counting.bytes -= 16
        for _ in range(count):
            layer(x)
            layer.backward(dy)
    if COMM.rank == 0:
        print(f"\n53 layers of ResNet-50, {batch} images a rank, {COMM.size} ranks of {cbn.get_num_threads()} threads, "
              "milliseconds a step, median (least):")
        for name, total in totals.items():
            both = zip(("forward", "backward", "together"), 1e3 * np.vstack([total, total.sum(axis=0)]), strict=True)
            print(f"  {name:12}", *(f"  {of} {median:7.1f} ({least:7.1f})" for of, (median, least) in both))
        print(f"  each rank takes part in {counting.calls} collectives and sends {counting.bytes} bytes")


def measure_collectives(rounds):
    """Print the time of one Allgather, and what an Iallgather hides behind the statistics of another array."""
    x = np.random.default_rng(0).standard_normal((16, 256, 14, 14), np.float32)
    if COMM.rank == 0:
        print("\nmicroseconds, of 100 at a time, median (least):")
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
        times = zip(("Allgather", "before the statistics of an array", "Iallgather beside them"), 1e4 * measured(calls, rounds), strict=True)
        if COMM.rank == 0:
            print(f"  {channels:4} channels:", *(f"  {of} {median:7.1f} ({least:7.1f})" for of, (median, least) in times))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images a rank (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is taken (default: %(default)s)")
    arguments = parser.parse_args()
    measure_collectives(arguments.rounds)
    measure_step(arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
