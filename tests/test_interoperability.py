"""Other libraries' arrays are read where they are, or refused with an error that names the argument; results are NumPy arrays."""

import array
import ctypes
import gc
import tracemalloc

import numpy as np
import pytest

import cbn
from cbn.functional import array_of

X = np.random.default_rng(31).standard_normal((4, 3, 5)).astype(np.float32)
PARAMETERS = np.random.default_rng(32).random((4, 3)).astype(np.float32)  # mean, var, weight, bias


class Interface:
    """Has `__array_interface__` alone."""

    def __init__(self, a):
        self.a = a
        self.__array_interface__ = a.__array_interface__


class Method:
    """Has `__array__` alone."""

    def __init__(self, a):
        self.a = a

    def __array__(self, dtype=None, copy=None):
        return self.a


class Exchange:
    """Has DLPack alone."""

    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


def torch_tensor(a):
    return pytest.importorskip("torch").from_numpy(a)


def jax_array(a):
    jax = pytest.importorskip("jax")
    with jax.enable_x64(a.dtype == np.float64) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(a.dtype == np.float64):
        return jax.numpy.asarray(a)


def ctypes_array(a):
    kind = np.ctypeslib.as_ctypes_type(a.dtype)
    for n in reversed(a.shape):
        kind = kind * n
    return kind.from_buffer(a)


def array_array(a):
    """Which is of one dimension: a memoryview gives it the shape."""
    values = array.array(a.dtype.char, a.ravel().tolist())
    return values if a.ndim == 1 else memoryview(values).cast("B").cast(a.dtype.char, a.shape)


# Each makes another library's array of a contiguous one: of its memory, or a copy that is then read where it is.
OTHERS = {
    "memoryview": memoryview,
    "ctypes": ctypes_array,
    "array.array": array_array,
    "__array_interface__": Interface,
    "__array__": Method,
    "DLPack": Exchange,
    "PyTorch": torch_tensor,
    "JAX": jax_array,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("other", OTHERS)
def test_same_results(other, dtype):
    of = OTHERS[other]
    x, parameters = X.astype(dtype), PARAMETERS.astype(dtype)
    mean, var, weight, bias = parameters
    ox, (omean, ovar, oweight, obias) = of(x), [of(p.copy()) for p in parameters]
    stats, ostats = cbn.batch_stats(x), cbn.batch_stats(ox)
    pairs = [
        (cbn.batch_norm(ox, omean, ovar, oweight, obias), cbn.batch_norm(x, mean, var, weight, bias)),
        (cbn.batch_norm_train(ox, oweight, obias)[0], cbn.batch_norm_train(x, weight, bias)[0]),
        *zip(ostats[1:], stats[1:], strict=True),
        *zip(cbn.batch_norm_backward(ox, ox, (omean, ovar), oweight), cbn.batch_norm_backward(x, x, (mean, var), weight), strict=True),
    ]
    layer, olayer = cbn.BatchNorm1d(3), cbn.BatchNorm1d(3)
    pairs += [(olayer(ox), layer(x)), (olayer.backward(ox), layer.backward(x)), (olayer.weight_grad, layer.weight_grad)]
    pairs += [(olayer.eval()(ox), layer.eval()(x)), (olayer.backward(ox), layer.backward(x))]
    assert olayer.load_state_dict({"weight": oweight, "running_mean": omean}, strict=False) == (["bias", "running_var"], [])
    layer.load_state_dict({"weight": weight, "running_mean": mean}, strict=False)
    pairs += [(olayer(ox), layer(x))]
    for actual, expected in pairs:
        assert type(actual) is np.ndarray
        np.testing.assert_array_equal(actual, expected, strict=True)


@pytest.mark.parametrize("other", OTHERS)
def test_read_where_they_are(other):
    a = OTHERS[other](np.zeros((2, 3), np.float32))
    seen, again = array_of(a, "x"), array_of(a, "x")
    assert np.shares_memory(seen, again)


@pytest.mark.parametrize("other", OTHERS)
def test_no_copy(other):
    """Neither the whole nor a part is copied: calls allocate less than a sixteenth of it."""
    x = np.zeros((16, 4, 4096), np.float32)
    a, out = OTHERS[other](x), np.empty_like(x)
    mean, var = np.zeros(4), np.ones(4)
    calls = [
        lambda: cbn.batch_norm(a, mean, var, out=out),
        lambda: cbn.batch_norm_train(a, out=out),
        lambda: cbn.batch_norm_backward(a, a, (mean, var), out=out),
        lambda: cbn.BatchNorm1d(4)(a, out=out),
    ]
    for call in calls:
        call()
        gc.collect()
        tracemalloc.start()
        try:
            call()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < x.nbytes / 16


@pytest.mark.parametrize("other", ["memoryview", "ctypes", "__array_interface__", "__array__", "DLPack", "PyTorch"])
def test_output_that_overlaps_them(other):
    """The array that is written is checked against the memory that others' arrays are in, too."""
    of = OTHERS[other]
    x, mean, var = X.copy(), np.zeros(3, np.float32), np.ones(3, np.float32)
    assert cbn.batch_norm(of(x), mean, var, out=x) is x
    np.testing.assert_array_equal(x, cbn.batch_norm(X, mean, var))
    before = x.copy()
    with pytest.raises(ValueError, match="^out: .* overlaps x"):
        cbn.batch_norm(of(x), mean, var, out=x[::-1])
    for name in ("weight", "bias", "running_mean", "running_var"):
        part = {"running_mean": mean, "running_var": var, name: of(x.reshape(-1)[10:13])}
        x.reshape(-1)[10:13] = 1
        before = x.copy()
        with pytest.raises(ValueError, match=f"^out: .* overlaps {name}"):
            cbn.batch_norm(X, **part, out=x)
        np.testing.assert_array_equal(x, before)
    with pytest.raises(ValueError, match="^running_mean: .* overlaps weight"):
        cbn.batch_norm(X, mean, var, of(mean), training=True)


def test_only_numpy_arrays_are_written():
    for of in (memoryview, torch_tensor):
        with pytest.raises(TypeError, match="^out: expected a NumPy array, got (memoryview|Tensor)"):
            cbn.batch_norm(X, *PARAMETERS, out=of(X.copy()))
        with pytest.raises(TypeError, match="^running_mean: expected a NumPy array, which training updates in place, got (memoryview|Tensor)"):
            cbn.batch_norm(X, of(PARAMETERS[0].copy()), PARAMETERS[1].copy(), training=True)


def requires_grad(a):
    return torch_tensor(a).requires_grad_()


def sparse(a):
    return pytest.importorskip("scipy.sparse").csr_array(a.reshape(len(a), -1))


def sparse_tensor(a):
    return torch_tensor(a).to_sparse()


class Failing:
    def __array__(self, dtype=None, copy=None):
        raise KeyError("of its own")


REFUSED = {
    "masked": (np.ma.masked_array, "expected a plain NumPy array, got MaskedArray, whose meaning would be lost"),
    "matrix": (lambda a: np.matrix(a.reshape(len(a), -1)), "expected a plain NumPy array, got matrix, whose meaning would be lost"),
    "sparse": (sparse, "expected an array, got csr_array"),
    "sparse tensor": (sparse_tensor, "expected an array, got Tensor, which NumPy cannot read: .*parse"),
    "requires grad": (requires_grad, r"expected an array, got Tensor, which NumPy cannot read: .*Use tensor\.detach\(\)"),
    "bfloat16 that requires grad": (
        lambda a: torch_tensor(a).bfloat16().requires_grad_(),
        r"expected an array, got Tensor, which NumPy cannot read: .*Use tensor\.detach\(\)",
    ),
    "another device": (lambda a: torch_tensor(a).to("meta"), "expected an array, got Tensor, which NumPy cannot read: "),
    "failing": (lambda a: Failing(), "expected an array, got Failing, which NumPy cannot read: 'of its own'"),
    "set": (lambda a: {1.0, 2.0}, "expected an array, got set"),
    "dict": (lambda a: {"a": a}, "expected an array, got dict"),
    "ragged": (lambda a: [[1.0, 2.0], [3.0]], "expected an array, got list, which NumPy cannot read: .*inhomogeneous"),
    "objects": (lambda a: a.astype(object), "expected an array of .*, got object"),
    "strings": (lambda a: a.astype(str), "expected an array of .*, got <U"),
    "structured": (lambda a: a.astype([("f", "f4")]), r"expected an array of .*, got \[\('f'"),
    "dates": (lambda a: a.astype("M8[s]"), r"expected an array of .*, got datetime64"),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    of, message = REFUSED[kind]
    mean, var, weight, bias = PARAMETERS.copy()
    wrong_x, wrong = of(X.copy()), of(weight.copy())
    out = np.full_like(X, 7)
    calls = {
        "x": [
            lambda: cbn.batch_norm(wrong_x, mean, var, out=out),
            lambda: cbn.batch_norm(wrong_x, mean, var, training=True, out=out),
            lambda: cbn.batch_norm_train(wrong_x, out=out),
            lambda: cbn.batch_stats(wrong_x),
            lambda: cbn.batch_norm_backward(X, wrong_x, (mean, var), out=out),
            lambda: cbn.BatchNorm(3)(wrong_x, out=out),
        ],
        "dy": [lambda: cbn.batch_norm_backward(wrong_x, X, (mean, var), out=out)],
        "weight": [
            lambda: cbn.batch_norm(X, mean, var, wrong, out=out),
            lambda: cbn.batch_norm(X, mean, var, wrong, training=True, out=out),
            lambda: cbn.batch_norm_train(X, wrong, out=out),
            lambda: cbn.batch_norm_backward(X, X, (mean, var), wrong, out=out),
        ],
        "bias": [lambda: cbn.batch_norm_train(X, None, wrong, out=out)],
        "running_mean": [lambda: cbn.batch_norm(X, wrong, var, out=out)],
        "running_var": [lambda: cbn.batch_norm(X, mean, wrong, out=out)],
        "stats.mean": [lambda: cbn.batch_norm_backward(X, X, (wrong, var), out=out)],
        "stats.var": [lambda: cbn.batch_norm_backward(X, X, (mean, wrong), out=out)],
    }
    for name, failing in calls.items():
        for call in failing:
            with pytest.raises(TypeError, match=f"^{name}: {message}"):
                call()
    assert (out == 7).all()
    np.testing.assert_array_equal((mean, var, weight, bias), PARAMETERS)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_refused_to_write():
    for of in (np.ma.masked_array, np.matrix):
        x, out = X[0], of(X[0])
        with pytest.raises(TypeError, match="^out: expected a NumPy array, got (MaskedArray|matrix)"):
            cbn.batch_norm_train(x, out=out)
        np.testing.assert_array_equal(np.asarray(out), x)
        with pytest.raises(TypeError, match="^running_mean: expected a NumPy array.*, got (MaskedArray|matrix)"):
            cbn.batch_norm(x, of(np.zeros(5)), np.ones(5), training=True)


def test_refused_states():
    layer = cbn.BatchNorm1d(3)
    state = layer.state_dict()
    wrong = {**state, "weight": requires_grad(state["weight"].copy()), "bias": None, "running_mean": np.ma.masked_array(state["bias"])}
    with pytest.raises(ValueError, match=r"(?s)weight: .*detach.*bias: expected an array, got None.*running_mean: .*MaskedArray"):
        layer.load_state_dict(wrong)


def test_layers_hold_no_tensor_alive_in_eval_mode():
    layer = cbn.BatchNorm1d(3)
    layer(X)
    layer.eval()
    x = torch_tensor(X.copy())
    y = layer(x)
    np.testing.assert_array_equal(layer.backward(y, retain=True), layer.backward(torch_tensor(y), retain=True))
    del x
    with pytest.raises(RuntimeError, match="^backward: expected a call"):
        layer.backward(y)
    layer(X.tolist())
    with pytest.raises(RuntimeError, match="^backward: expected a call"):
        layer.backward(y)


def test_pointers():
    """What a call reads is what the other library wrote last: nothing is kept from an earlier call."""
    buffer = (ctypes.c_float * 6 * 2)()
    for value in (1.0, 2.0):
        buffer[1][5] = value
        assert cbn.batch_norm(buffer, np.zeros(6), np.ones(6), eps=0)[1, 5] == value
