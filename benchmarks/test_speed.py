"""The speed of cbn alone, to be followed from commit to commit: pytest benchmarks/test_speed.py --benchmark-autosave --benchmark-compare."""

import numpy as np
import pytest

import cbn

# Early, middle and late layers of ResNet-50, one that is larger than caches, rows of a perceptron, and next to nothing.
SHAPES = [(1, 64, 56, 56), (8, 256, 14, 14), (8, 2048, 7, 7), (8, 256, 56, 56), (256, 1024), (1, 64, 1, 1)]


@pytest.fixture(params=["first", "last"])
def axis(request):
    return 1 if request.param == "first" else -1


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def x(request, axis):
    shape = request.param
    if axis == -1:
        if len(shape) == 2:
            pytest.skip("(N, C) is the same array in both layouts")
        shape = (shape[0], *shape[2:], shape[1])
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.fixture
def channel(x, axis):
    """One vector for weight, bias, mean and variance."""
    return np.linspace(0.5, 1.5, x.shape[axis], dtype=np.float32)


def several_values(x, axis):
    if x.size == x.shape[axis]:
        pytest.skip("one value a channel has no variance")


def test_inference(benchmark, x, channel, axis):
    benchmark(cbn.batch_norm, x, channel, channel, channel, channel, axis=axis, out=np.zeros_like(x))


def test_inference_allocated(benchmark, x, channel, axis):
    benchmark(cbn.batch_norm, x, channel, channel, channel, channel, axis=axis)


def test_training(benchmark, x, channel, axis):
    several_values(x, axis)
    benchmark(cbn.batch_norm_train, x, channel, channel, axis=axis, out=np.zeros_like(x))


def test_backward(benchmark, x, channel, axis):
    several_values(x, axis)
    stats = cbn.batch_stats(x, axis=axis)
    benchmark(cbn.batch_norm_backward, x[::-1].copy(), x, stats, channel, axis=axis, out=np.zeros_like(x))


def test_statistics(benchmark, x, axis):
    benchmark(cbn.batch_stats, x, axis=axis)
