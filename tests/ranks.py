"""What every rank checks of synchronized layers, in threads, for test_synchronized.py, or over MPI.

    mpiexec -n 4 python -m mpi4py tests/ranks.py [check_whole ...]
"""

import copy
import pickle
import resource
import sys
import threading
import zlib

import numpy as np

import cbn

ACTIVATIONS = [None, "relu", ("clip", -0.5, 0.75), ("leaky_relu", 0.1), "silu"]
WAIT = 60       # seconds


class Threads:
    """A communicator of threads of this process, with the methods of mpi4py's that layers call."""

    def __init__(self, rank, size, barrier, messages):
        self.rank, self.size, self.barrier, self.messages = rank, size, barrier, messages

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return self.size

    def Allgather(self, message, everyone):
        self.messages[self.rank] = message
        self.barrier.wait(WAIT)
        assert len({other.nbytes for other in self.messages}) == 1
        for row, other in zip(everyone, self.messages, strict=True):
            row[...] = other
        self.barrier.wait(WAIT)


def in_threads(size, check):
    """Run check(comm) in `size` threads; raise the first error of one."""
    barrier, messages, errors = threading.Barrier(size), [None] * size, []

    def run(rank):
        try:
            check(Threads(rank, size, barrier, messages))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Counting:
    """A communicator that counts the collectives, and the bytes that this rank sends."""

    def __init__(self, comm):
        self.comm, self.calls, self.bytes = comm, 0, 0

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def Allgather(self, message, everyone):
        self.calls, self.bytes = self.calls + 1, self.bytes + message.nbytes
        self.comm.Allgather(message, everyone)


def same_on_all(comm, *arrays):
    """Whether arrays have the same bits on all ranks."""
    own = np.array([zlib.crc32(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))])
    everyone = np.empty((comm.Get_size(), 1), own.dtype)
    comm.Allgather(own, everyone)
    return (everyone == own).all()


def raised(call):
    """The type and the text of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("no error")


def part_of(comm, rng, n):
    """This rank's samples of n, of a cut that is any but the same on all ranks: ranks without samples are common."""
    size, rank = comm.Get_size(), comm.Get_rank()
    cuts = [0, *sorted(rng.integers(0, n + 1, size - 1)), n]
    return slice(cuts[rank], cuts[rank + 1])


def close(a, b, dtype=np.float64, scale=1):
    np.testing.assert_allclose(a, b, rtol=0, atol=scale * (1e-12 if dtype == np.float64 else 4e-6))


def pair(comm, channels, seed=3, **options):
    """A synchronized layer, and one that sees the whole batch, in one state, which isn't the initial one."""
    rng = np.random.default_rng(seed)
    whole = cbn.BatchNorm(channels, reduce_grads=True, **options)
    state = {name: rng.uniform(0.5, 1.5, a.shape) for name, a in whole.state_dict().items() if a.ndim}
    whole.load_state_dict(state | {"num_batches_tracked": 2} if whole.track_running_stats else state)
    layer = copy.deepcopy(whole)
    layer.comm = comm
    return layer, whole


def check_whole(comm):
    """Drawn cases equal one process on the whole batch, with the same bits on all ranks."""
    rng = np.random.default_rng(7)
    for _ in range(100):
        dtype = np.float64 if rng.random() < 0.7 else np.float32
        channels, n = int(rng.integers(1, 40)), int(rng.integers(2, 12))
        spatial = tuple(rng.integers(1, 6, rng.integers(0, 4)))
        last = rng.random() < 0.4
        x, dy, residual = rng.standard_normal((3, n, *spatial, channels) if last else (3, n, channels, *spatial)).astype(dtype)
        x += dtype(rng.choice([0, 0, 1000]) if dtype == np.float32 else 0)
        layer, whole = pair(comm, channels, dtype=dtype, axis=-1 if last else 1, activation=ACTIVATIONS[rng.integers(len(ACTIVATIONS))],
                            momentum=[0.1, None, 1.0][rng.integers(3)], affine=rng.random() < 0.8, track_running_stats=rng.random() < 0.8)
        residual = residual if rng.random() < 0.4 else None
        out = rng.random() < 0.3
        i = part_of(comm, rng, n)
        expected = whole(x, residual=residual)
        part = None if residual is None else residual[i]
        y = layer(x[i], residual=part, out=np.empty_like(x[i]) if out else None)
        scale = 100 if x.mean() > 100 else 1
        close(y, expected[i], dtype, scale)
        dx_expected = whole.backward(dy)
        dx = layer.backward(dy[i], out=np.empty_like(x[i]) if out else None)
        close(dx, dx_expected[i], dtype, 10 * scale)
        if residual is not None:
            close(layer.residual_grad, whole.residual_grad[i], dtype, 10 * scale)
        results = list(layer.state_dict().values())
        for name, a in whole.state_dict().items():
            close(layer.state_dict()[name], a, dtype, 100 * scale)
        if whole.weight is not None:
            close(layer.weight_grad, whole.weight_grad, dtype, 100 * scale)
            close(layer.bias_grad, whole.bias_grad, dtype, 100)
            results += [layer.weight_grad, layer.bias_grad]
        assert same_on_all(comm, *results)


def check_types(comm):
    """float16 and bytes; each rank's own order of memory, and its own image size."""
    rng = np.random.default_rng(8)
    for dtype in (np.float16, np.uint8):
        x = rng.integers(0, 200, (9, 5, 4, 4)).astype(dtype)
        dy = rng.standard_normal(x.shape).astype(np.float16 if dtype == np.float16 else np.float32)
        layer, whole = pair(comm, 5)
        i = part_of(comm, rng, 9)
        strided = np.asfortranarray(x[i]) if comm.Get_rank() % 2 else x[i]
        close(layer(strided).astype("f"), whole(x)[i].astype("f"), "f", 500)
        close(layer.backward(dy[i]).astype("f"), whole.backward(dy)[i].astype("f"), "f", 2500)
        close(layer.running_var, whole.running_var, "f", 200)
    layer, whole = pair(comm, 3, dtype=np.float64)      # sizes of images that differ
    parts = [rng.standard_normal((2, 3, 4 + rank)) for rank in range(comm.Get_size())]
    layer(parts[comm.Get_rank()])
    whole(np.concatenate([np.moveaxis(part, 1, 2).reshape(-1, 3) for part in parts]))
    close(layer.running_mean, whole.running_mean)
    close(layer.running_var, whole.running_var)


def check_same_bits_again(comm):
    """The same step, 100 times."""
    rng = np.random.default_rng(9)
    x, dy = rng.standard_normal((2, 4 * comm.Get_size() + 3, 19, 5)).astype("f")
    i = part_of(comm, rng, len(x))
    first, _ = pair(comm, 19)
    layers = [copy.deepcopy(first) for _ in range(100)]
    results = []
    for layer in layers:
        y = layer(x[i])
        results.append((y, layer.backward(dy[i]), layer.weight_grad, layer.running_mean, layer.running_var))
    for result in results:
        for a, b in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(a, b)
    assert same_on_all(comm, *results[0][2:])


def check_one_part(comm):
    """Where one rank has all samples, its results are those without a communicator, to the bit, and those of the others are empty."""
    rng = np.random.default_rng(10)
    x, dy = rng.standard_normal((2, 6, 7, 9)).astype("f")
    for owner in range(comm.Get_size()):
        layer, whole = pair(comm, 7)
        i = slice(None) if comm.Get_rank() == owner else slice(0)
        np.testing.assert_array_equal(layer(x[i]), whole(x)[i])
        np.testing.assert_array_equal(layer.backward(dy[i]), whole.backward(dy)[i])
        np.testing.assert_array_equal(layer.weight_grad, whole.weight_grad)
        np.testing.assert_array_equal(layer.running_var, whole.running_var)
        np.testing.assert_array_equal(layer.num_batches_tracked, 3)


def check_no_samples(comm):
    """No rank has any: as an empty batch, which is counted and changes nothing."""
    layer, whole = pair(comm, 3)
    layer(np.empty((0, 3, 2), "f"))
    whole(np.empty((0, 3, 2), "f"))
    for name, a in whole.state_dict().items():
        np.testing.assert_array_equal(layer.state_dict()[name], a)


def check_one_value(comm):
    """One value a channel in all is no batch; one on each rank is."""
    layer, _ = pair(comm, 3)
    kind, text = raised(lambda: layer(np.ones((int(comm.Get_rank() == 0), 3), "f")))
    assert kind is ValueError and "Expected more than 1 value per channel when training" in text
    if comm.Get_size() > 1:
        layer(np.full((1, 3), comm.Get_rank(), "f"))
    assert layer.num_batches_tracked == 2 + (comm.Get_size() > 1)


def check_gradients_of_this_part(comm):
    """By default, weight_grad and bias_grad are of this rank's part; those of all ranks add up to the whole's."""
    rng = np.random.default_rng(11)
    x, dy = rng.standard_normal((2, 9, 6, 4))
    layer, whole = pair(comm, 6, dtype=np.float64)
    layer.reduce_grads = False
    i = part_of(comm, rng, 9)
    layer(x[i])
    layer.backward(dy[i])
    whole(x)
    whole.backward(dy)
    for name in ("weight_grad", "bias_grad"):
        everyone = np.empty((comm.Get_size(), 6))
        comm.Allgather(getattr(layer, name), everyone)
        close(everyone.sum(axis=0), getattr(whole, name), scale=100)
    close(layer.bias_grad, dy[i].sum(axis=(0, 2)), scale=100)


def check_collectives(comm):
    """One forward, one backward, of 8 * (3 + 2 * channels) bytes each; none in eval mode, with or without running statistics, nor frozen."""
    counting, x = Counting(comm), np.random.default_rng(12).standard_normal((4, 10, 3)).astype("f")
    layer = cbn.BatchNorm1d(10, comm=counting)
    assert counting.calls == 1
    for mode in (layer.train, layer.eval, layer.freeze):
        mode()
        counting.calls = counting.bytes = 0
        layer(x)
        expected = 0 if mode != layer.train else 1
        assert (counting.calls, counting.bytes) == (expected, expected * 8 * (3 + 2 * 10))
        layer.backward(x)
        assert (counting.calls, counting.bytes) == (2 * expected, 2 * expected * 8 * (3 + 2 * 10))
    layer = cbn.BatchNorm1d(10, track_running_stats=False, comm=counting).eval()
    counting.calls = 0
    layer(x)
    layer.backward(x)
    assert counting.calls == 0


def forward_mistakes():
    """(what is done wrong, with a layer of 3 channels; the error; what it says)"""
    x = np.ones((2, 3, 4), "f")
    read_only = np.empty_like(x)
    read_only.flags.writeable = False
    return [
        (lambda layer: layer(x[:, :2]), ValueError, "should contain 2 elements"),
        (lambda layer: layer(x[0]), ValueError, "should contain"),
        (lambda layer: layer(x[0, 0]), ValueError, "x: expected at least 2 dimensions"),
        (lambda layer: layer("text"), TypeError, "x: expected an array"),
        (lambda layer: layer(None), TypeError, "x: expected an array, got None"),
        (lambda layer: layer(x.astype(int)), TypeError, "x: expected an array of float16"),
        (lambda layer: layer(x, residual=x[:1]), ValueError, "residual: expected shape (2, 3, 4)"),
        (lambda layer: layer(x, residual={}), TypeError, "residual"),
        (lambda layer: layer(x, out=x[:1]), ValueError, "out: expected shape (2, 3, 4)"),
        (lambda layer: layer(x, out=read_only), ValueError, "out: expected a writeable array"),
        (lambda layer: layer(x, out=layer.weight), ValueError, "out"),
    ]


def check_mistakes(comm):
    """What is wrong on one rank is raised on all, with the rank and the error, and changes nothing; the next step is in step again."""
    rng = np.random.default_rng(13)
    x, dy = rng.standard_normal((2, 2, 3, 4)).astype("f")
    rank, size = comm.Get_rank(), comm.Get_size()
    layer, whole = pair(comm, 3)
    state = layer.state_dict()
    for wrong in range(size):
        for mistake, kind, says in forward_mistakes():
            got, text = raised(lambda: mistake(layer) if rank == wrong else layer(x))   # noqa: B023
            assert got is kind and text.startswith(f"rank {wrong} of {size}: ") and says in text, (got, text)
            for name, a in layer.state_dict().items():
                np.testing.assert_array_equal(a, state[name])
    got, text = raised(lambda: layer(x[:, :1]))
    assert got is ValueError and all(f"rank {r} of {size}: running_mean should contain 1 elements" in text for r in range(size)), text
    planes = cbn.BatchNorm2d(3, comm=comm)
    got, text = raised(lambda: planes(x) if rank == 0 else planes(x[..., np.newaxis]))
    assert got is ValueError and text == f"rank 0 of {size}: expected 4D input (got 3D input)", text
    close(layer(x), whole(x), "f")
    for wrong in range(size):
        for bad, options, says in ((dy[:1], {}, "dy: expected shape (2, 3, 4)"), (dy.astype("d"), {}, "dy: expected dtype float32"),
                                   (dy, {"out": dy[:1]}, "out: expected shape"), (dy, {"retain": 1}, "retain: expected True or False")):
            got, text = raised(lambda: layer.backward(bad, **options) if rank == wrong else layer.backward(dy))     # noqa: B023
            assert got in (ValueError, TypeError) and text.startswith(f"rank {wrong} of {size}: ") and says in text, (got, text)
    close(layer.backward(dy, retain=True), whole.backward(dy), "f", 10)
    for wrong in range(size):
        layer.backward(dy, retain=rank != wrong)
        got, text = raised(lambda: layer.backward(dy, retain=True))
        assert got is RuntimeError and text.startswith(f"rank {wrong} of {size}: ") and "used up by the backward before" in text, (got, text)
        a = x.copy()
        layer(a, out=a if rank == wrong else None)
        got, text = raised(lambda: layer.backward(dy))
        assert got is RuntimeError and text.startswith(f"rank {wrong} of {size}: ") and "wrote its output over its input" in text, (got, text)
        layer(x)


def check_differences(comm):
    """What differs between ranks is an error on all that says who has what."""
    x = np.random.default_rng(14).standard_normal((2, 3, 3)).astype("f")
    rank, size = comm.Get_rank(), comm.Get_size()
    if size == 1:
        return
    last = size - 1
    others = "rank 0" if size == 2 else f"ranks {', '.join(map(str, range(last)))}"
    for name, value in (("axis", -1), ("eps", 1e-3), ("momentum", 0.2), ("activation", "relu"), ("on_nonfinite", "skip")):
        layer, _ = pair(comm, 3)
        usual = getattr(layer, name)
        if rank == last:
            setattr(layer, name, value)
        got, text = raised(lambda: layer(x))    # noqa: B023
        assert got is ValueError and text.endswith(f"got {name}={usual} on {others}, {name}={value} on rank {last}"), text
    layer, _ = pair(comm, 3)
    for other, says in ((x.astype("d"), f"x of float32 on {others}, x of float64 on rank {last}"),
                        (x[..., np.newaxis], f"x of 3 dimensions on {others}, x of 4 dimensions on rank {last}")):
        got, text = raised(lambda: layer(other if rank == last else x))     # noqa: B023
        assert got is ValueError and text.endswith(says), text
    got, text = raised(lambda: layer(x, residual=x if rank == last else None))
    assert got is ValueError and text.endswith(f"residual=None on {others}, residual=an array on rank {last}"), text
    got, text = raised(lambda: cbn.BatchNorm2d(3 + rank, comm=comm))
    assert got is ValueError and text == f"num_features: expected the same on all ranks of comm, got {[3 + r for r in range(size)]}", text
    second, _ = pair(comm, 3)
    got, text = raised(lambda: (second if rank == last else layer)(x))
    assert got is ValueError and text.count("layer ") == 2, text
    layer(x)
    got, text = raised(lambda: layer(x) if rank == last else layer.backward(x))
    assert got is ValueError and f"a backward call on {others}, a forward call on rank {last}" in text, text


def check_nonfinite(comm):
    """on_nonfinite goes by the statistics of all ranks: one's NaN concerns each."""
    rng = np.random.default_rng(15)
    x = rng.standard_normal((4, 3, 5)).astype("f")
    poisoned = x.copy()
    poisoned[1, 2, 3] = np.nan
    for policy in ("propagate", "skip", "raise"):
        layer, _ = pair(comm, 3, on_nonfinite=policy)
        before = layer.state_dict()
        mine = poisoned if comm.Get_rank() == comm.Get_size() - 1 else x
        out = np.zeros_like(x)
        if policy == "raise":
            got, text = raised(lambda: layer(mine, out=out))    # noqa: B023
            assert got is FloatingPointError and "variance nan for channel 2" in text and not out.any()
        else:
            layer(mine, out=out)
            assert np.isfinite(out[:, :2]).all() and np.isnan(out[:, 2]).all()
            assert np.isfinite(layer.running_var[:2]).all() and layer.num_batches_tracked == 3
        changed = {"propagate": [0, 1, 2], "skip": [0, 1], "raise": []}[policy]
        for name in ("running_mean", "running_var"):
            assert np.flatnonzero(getattr(layer, name) != before[name]).tolist() == changed


def check_copies(comm):
    """Copies synchronize as well, pickles come back alone; both show it."""
    layer, _ = pair(comm, 3)
    assert repr(layer).endswith(f", reduce_grads=True, comm=<rank {comm.Get_rank()} of {comm.Get_size()}>)")
    assert layer.comm is comm and copy.copy(layer).comm is comm and copy.deepcopy(layer).comm is comm
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.comm is None and "comm" not in repr(loaded)
    np.testing.assert_array_equal(loaded.running_mean, layer.running_mean)
    loaded(np.ones((2, 3), "f"))


def steps(layer, number, n=4):
    rng = np.random.default_rng(16)
    x, dy = rng.standard_normal((2, n, layer.num_features)).astype("f")
    for _ in range(number):
        layer(x)
        layer.backward(dy)


def check_memory(comm):
    """10,000 steps leave nothing behind, nor do communicators that were duplicated and freed. More ranks than cores would be slow."""
    if comm.Get_size() > (2 if hasattr(comm, "Dup") else 1):
        return
    layer = cbn.BatchNorm1d(64, comm=comm)
    steps(layer, 500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps(layer, 10_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024      # kB
    if not hasattr(comm, "Dup"):
        return
    for i in range(400):
        duplicate = comm.Dup()
        other = cbn.BatchNorm1d(64, comm=duplicate)
        steps(other, 2)
        other.comm = None
        duplicate.Free()
        if i == 50:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps(other, 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024


def check_parts_of_a_communicator(comm):
    """Of mpi4py: every second rank by itself, and a layer whose communicator was freed."""
    if not hasattr(comm, "Split"):
        return
    rank = comm.Get_rank()
    part = comm.Split(rank % 2, -rank)      # in the opposite order
    check_whole(part)
    layer, _ = pair(part, 3)
    assert f"comm=<rank {part.Get_rank()} of {part.Get_size()}>" in repr(layer)
    part.Free()
    kind, text = raised(lambda: layer(np.ones((2, 3), "f")))
    assert "comm" in text.lower(), (kind, text)


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


def main():
    from mpi4py import MPI

    names = sys.argv[1:]
    for check in CHECKS:
        if not names or check.__name__ in names:
            check(MPI.COMM_WORLD)
            MPI.COMM_WORLD.Barrier()


if __name__ == "__main__":
    main()
