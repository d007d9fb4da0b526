"""Layers whose batch lies on all ranks of an MPI communicator: what these tell one another, in one collective a call.

Every rank sends as many numbers, whatever may be wrong with its arguments: whether it failed, a checksum of what all must agree on, a count, and two
numbers for each channel. All see the same messages, in the order of ranks, so that all compute the same bits, or raise the same error.
"""

import contextlib
import os
import threading
import weakref
import zlib

import numpy as np

from .statistics import GradientSums, merged
from .words import show

# Of all groups. A layer that waits for other ranks must not hold a lock that another layer, for which these wait, may need.
LOCKS = weakref.WeakSet()

FAILED, AGREED, COUNT, VALUES = 0, 1, 2, 3      # where things are in a message; from VALUES on, two numbers for each channel
MOST_TEXT = 1000                                # bytes of what a rank says of an error
KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, FloatingPointError, MemoryError)}     # raised as such, others as RuntimeError


class Group:
    """The layers of the ranks of a communicator that normalize parts of one batch. Making one is collective.

    comm : mpi4py's communicator, or an object with its Get_rank, Get_size and Allgather.
    channels : the layer's number of channels.
    Raises TypeError for another `comm`, and ValueError, on all ranks, where their numbers of channels differ.
    """

    def __init__(self, comm, channels):
        missing = [name for name in ("Get_rank", "Get_size", "Allgather") if not callable(getattr(comm, name, None))]
        if missing:
            raise TypeError(f"comm: expected None or a communicator of mpi4py, got {show(comm)}, which has no {missing[0]}")
        self.comm, self.channels = comm, channels
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.lock = threading.RLock()
        LOCKS.add(self.lock)
        self.own, self._sent = None, False
        name = int.from_bytes(os.urandom(7), "little")
        everyone = self._gathered(np.array([channels, name]))
        if (everyone[:, 0] != channels).any():
            raise ValueError(f"num_features: expected the same on all ranks of comm, got {everyone[:, 0].tolist()}")
        self._name = f"{everyone[0, 1]:x}"      # rank 0's, by which two layers are told apart

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):       # no other process can use it: what was pickled is None
        return type(None), ()

    @contextlib.contextmanager
    def together(self):
        """What is raised within before this rank has sent its message goes into that message, and is raised on all ranks."""
        self._sent = False
        try:
            yield
        except Exception as error:
            if not self._sent:
                self._exchange(0, (), (), f"{type(error).__name__}: {error}", error)
            raise

    def statistics(self, stats, agreed):
        """The BatchStats of all ranks' batches. agreed : a list of what must be the same on all of them, as texts."""
        everyone = self._exchange(stats.count, stats.mean, stats.var, self._text("a forward call", agreed))
        return merged(everyone[:, COUNT], everyone[:, VALUES:VALUES + self.channels], everyone[:, VALUES + self.channels:])

    def sums(self, sums):
        """The GradientSums of all ranks' batches. This rank's stay in `own`."""
        self.own = sums
        everyone = self._exchange(0, sums.dy, sums.dy_xhat, self._text("a backward call"))
        with np.errstate(all="ignore"):
            total = everyone.sum(axis=0)
        return GradientSums(total[VALUES:VALUES + self.channels], total[VALUES + self.channels:])

    def _text(self, call, agreed=()):
        return "; ".join([call, f"layer {self._name}", *agreed])

    def _exchange(self, count, first, second, text, error=None):
        """The messages of all ranks, of shape (ranks, numbers). text : what all must agree on or, with an error, what it says."""
        self._sent = True
        message = np.zeros(VALUES + 2 * self.channels)
        message[FAILED], message[AGREED], message[COUNT] = error is not None, zlib.crc32(text.encode()), count
        if error is None:
            message[VALUES:VALUES + self.channels], message[VALUES + self.channels:] = first, second
        everyone = self._gathered(message)
        failed = everyone[:, FAILED] != 0
        if failed.any() or (everyone[:, AGREED] != everyone[0, AGREED]).any():
            raise self._error(text, np.flatnonzero(failed)) from error
        return everyone

    def _error(self, text, failed):
        """What all ranks raise, of the ranks that failed or, if none did, of what differs."""
        message = np.frombuffer(bytearray(text.encode()[:MOST_TEXT].ljust(MOST_TEXT)), np.uint8)
        texts = [row.tobytes().decode(errors="replace").rstrip() for row in self._gathered(message)]
        if not failed.size:
            return ValueError("comm: expected calls that agree on all ranks, got " + "; ".join(_differences(texts)))
        kind = texts[failed[0]].partition(":")[0]
        says = [f"rank {rank} of {self.size}: {texts[rank].removeprefix(kind + ': ') if kind in KINDS else texts[rank]}" for rank in failed]
        return KINDS.get(kind, RuntimeError)("\n\t".join(says))

    def _gathered(self, message):
        everyone = np.empty((self.size, message.size), message.dtype)
        self.comm.Allgather(message, everyone)
        return everyone


def _differences(texts):
    for values in zip(*(text.split("; ") for text in texts), strict=False):
        if len(set(values)) > 1:
            yield ", ".join(f"{value} on {_ranks(values, value)}" for value in dict.fromkeys(values))


def _ranks(values, value):
    ranks = [rank for rank, other in enumerate(values) if other == value]
    named = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} others" if len(ranks) > 4 else "")
    return ("rank " if len(ranks) == 1 else "ranks ") + named
