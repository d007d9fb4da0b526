"""Any array gives what its contiguous copy gives: every view, memory order, byte order, sub-class, empty arrays; also to write to."""

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import check, largest

import cbn

PARAMETERS = np.random.default_rng(15).random((4, 70))  # mean, var, weight, bias


def reordered(a, order):
    """Equal to a, with its axes in another order in memory."""
    return np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))


def spaced(a, steps):
    """Equal to a, with gaps between its elements; negative steps run backwards in memory."""
    view = np.full([n * abs(step) for n, step in zip(a.shape, steps, strict=True)], np.nan, a.dtype)
    view = view[tuple(slice(None, None, step) for step in steps)]
    view[...] = a
    return view


def misaligned(a):
    view = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    assert not view.flags.aligned
    return view


class SubClass(np.ndarray):
    pass


# Each makes an array that is equal to a contiguous one of 4 dimensions.
VIEWS = {
    "contiguous": np.array,
    "Fortran order": np.asfortranarray,
    "channels last in memory": lambda a: reordered(a, (0, 2, 3, 1)),
    "channels first in memory": lambda a: reordered(a, (1, 0, 2, 3)),
    "images transposed": lambda a: reordered(a, (0, 1, 3, 2)),
    "batch last in memory": lambda a: reordered(a, (2, 1, 3, 0)),
    "every second sample": lambda a: spaced(a, (2, 1, 1, 1)),
    "every third channel": lambda a: spaced(a, (1, 3, 1, 1)),
    "every second line": lambda a: spaced(a, (1, 1, 2, 1)),
    "every second element": lambda a: spaced(a, (1, 1, 1, 2)),
    "samples reversed": lambda a: spaced(a, (-1, 1, 1, 1)),
    "channels reversed": lambda a: spaced(a, (1, -1, 1, 1)),
    "elements reversed": lambda a: spaced(a, (1, 1, 1, -1)),
    "everything reversed": lambda a: spaced(a, (-1, -1, -1, -1)),
    "a part of more": lambda a: np.pad(a, 1)[1:-1, 1:-1, 1:-1, 1:-1],
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "misaligned": misaligned,
    "sub-class": lambda a: a.view(SubClass),
    "list": lambda a: a.tolist(),
}
SHAPES = [
    ((3, 5, 4, 7), 1), ((1, 5, 9, 11), 1), ((15, 3, 10, 14), 1), ((2, 65, 3, 3), 1), ((9, 10, 7, 3), -1), ((3, 4, 17, 1), 2), ((20, 7, 1, 1), 1),
    ((1, 70, 1, 1), 1),
]  # fmt: skip


def run(x, dy, axis, out=None):
    """Results of every function: of inference, and of those that take sums."""
    a = np.asarray(x)
    mean, var, weight, bias = PARAMETERS[:, : a.shape[axis]]
    new = lambda: None if out is None else out(a)
    exact = [cbn.batch_norm(x, mean, var, weight, bias, axis=axis, out=new())]
    exact += [cbn.batch_norm_backward(dy, x, (mean, var), weight, bias, axis=axis, training=False, out=new()).x]
    y, stats = cbn.batch_norm_train(x, weight, bias, axis=axis, out=new()) if a.size > a.shape[axis] else (exact[0], (1, mean, var))
    g = cbn.batch_norm_backward(dy, x, stats, weight, bias, axis=axis, out=new())
    assert y.shape == g.x.shape == a.shape
    return exact, [y, g.x, *stats[1:], g.weight, g.bias]


def agree(actual, expected):
    """Inference to the bit; what takes sums, whose order follows the memory's, to rounding."""
    for a, b in zip(actual[0], expected[0], strict=True):
        assert type(a) is np.ndarray and a.dtype.isnative
        np.testing.assert_array_equal(a, b, strict=True)
    eps = np.finfo(expected[0][0].dtype).eps
    for a, b in zip(actual[1], expected[1], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * eps * (4 + abs(b).max(initial=0)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape, axis", SHAPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_views(view, shape, axis, dtype, threads):
    if view == "list":
        dtype = np.float64  # what NumPy makes of it
    x, dy = np.random.default_rng(16).standard_normal((2, *shape)).astype(dtype)
    expected = run(x, dy, axis)
    agree(run(VIEWS[view](x), VIEWS[view](dy), axis), expected)
    agree(run(VIEWS[view](x), dy, axis), expected)
    agree(run(x, VIEWS[view](dy), axis), expected)


@pytest.mark.parametrize("shape, axis", SHAPES, ids=str)
@pytest.mark.parametrize("view", [name for name in VIEWS if name != "list"])
def test_views_to_write(view, shape, axis, threads):
    x, dy = np.random.default_rng(17).standard_normal((2, *shape)).astype(np.float32)
    written = []

    def out(a):
        written.append(VIEWS[view](np.full_like(a, np.nan)))
        return written[-1]

    exact, others = run(x, dy, axis)
    exact_out, others_out = run(x, dy, axis, out)
    assert all(any(a is b for b in written) for a in exact_out)
    native = lambda arrays: [np.array(a, a.dtype.newbyteorder("=")) for a in arrays]
    agree((native(exact_out), native(others_out)), (exact, others))
    for a in written:  # nothing between the elements of a view
        if a.base is not None and a.base.dtype == a.dtype:
            assert np.isfinite(a.base).sum() == a.size + (view == "a part of more") * (a.base.size - a.size)
    y = VIEWS[view](x)  # in place
    assert cbn.batch_norm(y, *PARAMETERS[:, : shape[axis]], axis=axis, out=y) is y
    np.testing.assert_array_equal(y, exact[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("images", [1, 3])
def test_planes_of_any_length(images, dtype, isa):
    """The same bits where they are as where they are copied piece by piece."""
    rng = np.random.default_rng(21)
    weight, bias = rng.standard_normal((2, 3)).astype(np.float32)
    whole = [16 * rows + rest for rows in (*range(1, 10), 15, 63) for rest in (0, 1, 15)]
    for length in (*whole, 1023, 1024, 1025, 1040, 1041, 2048, 3136, 5000, 20_005):
        arrays = (rng.standard_normal((3, images, 3, length)) + 2).astype(dtype)
        spaced_out = np.repeat(arrays, 2, -1)[..., ::2]
        results = []
        for x, dy, residual in (arrays, spaced_out):
            y, stats = cbn.batch_norm_train(x, weight, bias)
            plain = cbn.batch_norm_backward(dy, x, stats, weight, bias)
            gated = cbn.batch_norm_backward(dy, x, stats, weight, bias, activation="relu")
            added = cbn.batch_norm_backward(dy, x, stats, weight, bias, activation="relu", residual=residual)
            results.append((y, *stats[1:], *plain, *gated, *added, added.residual))
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_broadcast(dtype):
    row = np.random.default_rng(18).standard_normal((1, 5, 1, 7)).astype(dtype)
    for x in (np.broadcast_to(row, (3, 5, 4, 7)), np.broadcast_to(row[:, :1], (3, 5, 1, 7)), np.broadcast_to(row[..., :1], (1, 5, 64, 9))):
        agree(run(x, x, 1), run(x.copy(), x.copy(), 1))


@pytest.mark.parametrize(
    "shape, axis", [((0, 3), 1), ((0, 3, 5), 1), ((2, 3, 0), 1), ((4, 0), 1), ((4, 0, 5), 1), ((0, 0), 1), ((2, 0, 3), -1)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_elements(shape, axis, dtype):
    x, channels = np.ones(shape, dtype), shape[axis]
    mean, var = np.full(channels, 3.0), np.full(channels, 2.0)
    assert cbn.batch_norm(x, mean, var, axis=axis).shape == shape
    assert cbn.batch_norm(x, mean, var, training=True, axis=axis, out=x) is x
    assert (mean == 3).all() and (var == 2).all()
    y, stats = cbn.batch_norm_train(x, axis=axis)
    assert y.shape == shape and y.dtype == dtype
    count = int(np.prod([n for i, n in enumerate(shape) if i != axis % len(shape)]))
    for of in (stats, cbn.batch_stats(x, axis=axis)):
        assert of.count == count and of.mean.shape == of.var.shape == (channels,)
        assert np.isnan(of.mean).all() and np.isnan(of.var).all()
    for training in (True, False):
        g = cbn.batch_norm_backward(x, x, stats, axis=axis, training=training)
        assert g.x.shape == shape
        assert g.weight.tolist() == g.bias.tolist() == [0] * channels


@pytest.mark.parametrize(
    "of", [np.array, np.ndarray.tolist, lambda a: a.astype(">f4"), lambda a: np.repeat(a, 2)[::2], lambda a: a[::-1].copy()[::-1]]
)
def test_parameters_of_any_kind(of):
    x = np.random.default_rng(19).standard_normal((3, 5, 7))
    parameters = PARAMETERS[:, :5].astype(np.float32)
    expected = cbn.batch_norm(x, *parameters.astype(np.float64))
    np.testing.assert_array_equal(cbn.batch_norm(x, *map(of, parameters)), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.uint16, np.int64, np.longdouble])
def test_parameters_of_any_dtype(dtype):
    x = np.random.default_rng(20).standard_normal((3, 5, 7))
    parameters = np.random.default_rng(20).integers(1, 9, (4, 5))
    np.testing.assert_array_equal(cbn.batch_norm(x, *parameters.astype(dtype)), cbn.batch_norm(x, *parameters.astype(float)))


@pytest.mark.parametrize(
    "of", [np.array, lambda a: a.astype(">f4"), lambda a: np.repeat(a, 2)[::2], lambda a: a[::-1].copy()[::-1], misaligned]
)
def test_running_statistics_of_any_kind(of):
    x = np.random.default_rng(21).standard_normal((3, 5, 7))
    expected = PARAMETERS[:2, :5].astype(np.float32)
    running = [of(a) for a in expected]
    cbn.batch_norm(x, *expected, training=True)
    cbn.batch_norm(x, *running, training=True)
    np.testing.assert_array_equal(running, expected)
    assert not np.array_equal(expected, PARAMETERS[:2, :5].astype(np.float32))


@st.composite
def arbitrary_views(draw):
    """A view of 2 to 5 dimensions with a random order of its axes in memory, random steps, and a channel axis."""
    shape = draw(st.lists(st.sampled_from([1, 1, 2, 3, 4, 5, 8, 17]), min_size=2, max_size=5))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, -1, -3]), min_size=len(shape), max_size=len(shape)))
    order = draw(st.permutations(range(len(shape))))
    x = np.random.default_rng(len(shape)).standard_normal(shape).astype(draw(st.sampled_from([np.float32, np.float64])))
    view = reordered(x, order)
    if any(step != 1 for step in steps):
        memory = spaced(np.ascontiguousarray(x.transpose(order)), [steps[i] for i in order])
        view = memory.transpose(np.argsort(order))
    return x, view, draw(st.integers(-len(shape), len(shape) - 1))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(arbitrary_views())
def test_arbitrary_views(arguments):
    x, view, axis = arguments
    np.testing.assert_array_equal(view, x)
    agree(run(view, x, axis), run(x, x, axis))
    mean, var, weight, bias = PARAMETERS[:, : x.shape[axis]]
    y = np.asfortranarray(np.empty_like(x))
    cbn.batch_norm(view, mean, var, weight, bias, axis=axis, out=y)
    expected = reference.batch_norm(x, mean, var, weight, bias, axis=axis)
    check(y, expected, largest(expected, axis) + 1, 4)


def drawn_view(rng):
    """An array of shape up to 5 axes whose elements lie in drawn places: cropped, stepped, reversed, broadcast, its axes in any order of memory."""
    rank = int(rng.integers(2, 6))
    shape = rng.choice((1, 1, 2, 3, 5, 9, 17, 20), rank)
    order = rng.permutation(rank) if rng.random() < 0.3 else np.arange(rank)
    more = rng.integers(0, 2, rank) * rng.integers(0, 3, rank)
    steps = rng.choice((1, 1, 1, 1, 2, -1), rank)
    memory = rng.normal(30, 8, tuple((shape * abs(steps) + more)[order])).astype(np.float32)
    view = memory.transpose(np.argsort(order))[tuple(slice(None, n * abs(s), abs(s)) for n, s in zip(shape, steps, strict=True))]
    view = view[tuple(slice(None, None, -1 if s < 0 else 1) for s in steps)]
    if rng.random() < 0.2:
        axis = int(rng.integers(rank))
        view = np.broadcast_to(view.take([0], axis), shape)
    return view


def moved_channels(view, axis):
    """Whether the view is that of an array whose other axes follow one another in memory as here, but whose channels lie elsewhere."""
    others = [i for i in range(view.ndim) if i != axis and view.shape[i] > 1]
    strides = [view.strides[i] for i in others]
    place = sum(stride > abs(view.strides[axis]) for stride in strides)
    return view.shape[axis] > 1 and strides == sorted(strides, reverse=True) and place != sum(i < axis for i in others)


def test_bits_of_a_copy():
    """Gaps, directions and orders of memory don't show in a reduction's bits, but for the place of the channels."""
    rng, moved, same = np.random.default_rng(15), 0, 0
    for _ in range(3000):
        view = drawn_view(rng)
        axis = int(rng.integers(view.ndim))
        if view.size == view.shape[axis]:
            continue
        dy = rng.standard_normal(view.shape).astype(np.float32)
        if moved_channels(view, axis):
            moved += 1
            continue
        same += 1
        copy = np.array(view, order="C")
        stats = cbn.batch_stats(copy, axis=axis)
        for one, other in zip(cbn.batch_stats(view, axis=axis), stats, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"{view.shape} {view.strides} {axis}")
        np.testing.assert_array_equal(cbn.batch_norm_train(copy, axis=axis, out=np.empty_like(view))[0], cbn.batch_norm_train(copy, axis=axis)[0])
        for one, other in zip(cbn.batch_norm_backward(dy, view, stats, axis=axis), cbn.batch_norm_backward(dy, copy, stats, axis=axis), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"{view.shape} {view.strides} {axis}")
    assert same > 2000 and moved > 50


def test_bits_of_moved_channels():
    """A dense array's, with the channels where they are in memory."""
    rng = np.random.default_rng(16)
    for _ in range(300):
        shape, place, axis = rng.choice((1, 2, 3, 5, 9, 20), 4), int(rng.integers(4)), int(rng.integers(4))
        dense = rng.normal(30, 8, shape).astype(np.float32)
        if dense.size > dense.shape[place] > 1:
            expected = cbn.batch_stats(dense, axis=place)
            np.testing.assert_array_equal(cbn.batch_stats(np.moveaxis(dense, place, axis), axis=axis).var, expected.var, err_msg=f"{shape} {place} {axis}")
