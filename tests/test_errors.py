"""Every wrong argument gets an error that names it, in the words people search for, and nothing is written."""

import inspect
from decimal import Decimal

import numpy as np
import pytest

import cbn

X = np.random.default_rng(11).standard_normal((4, 3, 5)).astype(np.float32)


def padded(a):
    """A copy of an array, at the beginning of a larger buffer."""
    buffer = np.zeros(a.size + 8, a.dtype)
    buffer[: a.size] = a.ravel()
    return buffer[: a.size].reshape(a.shape)


def base(function):
    """Valid arguments, new ones at each call; arrays to be written hold something to recognize them by."""
    x = padded(X)
    parameters = {"weight": np.full(3, 2, np.float32), "bias": np.ones(3, np.float32)}
    running = {"running_mean": np.full(3, 0.5, np.float32), "running_var": np.full(3, 1.5, np.float32)}
    common = dict(x=x, eps=1e-5, axis=1, out=np.full_like(x, 7), **parameters)
    return {
        "inference": dict(common, **running, training=False),
        "training": dict(common, **running, training=True, momentum=0.1),
        "train": common,
        "backward": dict(common, dy=padded(X + 1), stats=(np.zeros(3), np.ones(3)), training=True),
        "stats": {"x": x, "axis": 1},
    }[function]


FUNCTIONS = {
    "inference": cbn.batch_norm,
    "training": cbn.batch_norm,
    "train": cbn.batch_norm_train,
    "backward": cbn.batch_norm_backward,
    "stats": cbn.batch_stats,
}
FORWARD_TRAINING = "training", "train"


def shifted(a):
    """The memory of an array, but 4 elements further."""
    return np.ndarray(a.shape, a.dtype, a.base, offset=4 * a.itemsize)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


# What is changed of the valid arguments (a function is called with them), the error, its message, and the functions that it applies to, if not
# to all that take the argument.
WRONG = [
    # x
    ({"x": X.astype(int)}, TypeError, r"^x: expected an array of float16, .* got int64"),
    ({"x": X.astype(np.complex64)}, TypeError, r"^x: expected .* got complex64"),
    ({"x": X > 0}, TypeError, r"^x: expected .* got bool"),
    ({"x": X.astype(object)}, TypeError, r"^x: expected .* got object"),
    ({"x": X.astype(str)}, TypeError, r"^x: expected .* got <U"),
    ({"x": X.astype([("a", "f4")])}, TypeError, r"^x: expected .* got \[\('a'"),
    ({"x": X.astype(np.longdouble)}, TypeError, r"^x: expected .* got "),
    ({"x": None}, TypeError, r"^x: expected an array, got None"),
    ({"x": np.ma.masked_array(X, X > 0)}, TypeError, r"^x: .* MaskedArray"),
    ({"x": lambda a: np.matrix(X[0])}, TypeError, r"^x: .* matrix"),
    ({"x": X[0, 0]}, ValueError, r"^x: expected at least 2 dimensions.* got shape \(5,\)"),
    ({"x": X[0, 0, 0]}, ValueError, r"^x: expected at least 2 dimensions.* got shape \(\)"),
    (
        {"x": X[:1, :, :1], "out": None},
        ValueError,
        r"^Expected more than 1 value per channel when training, got input size \(1, 3, 1\)",
        *FORWARD_TRAINING,
    ),
    # axis
    ({"axis": 3}, ValueError, r"^axis: expected -3 to 2 for x of shape \(4, 3, 5\), got 3"),
    ({"axis": -4}, ValueError, r"^axis: expected -3 to 2 .* got -4"),
    ({"axis": 2**70}, ValueError, r"^axis: expected -3 to 2 .* got 1180591620717411303424"),
    ({"axis": 1.0}, TypeError, r"^axis: expected an integer, got 1.0"),
    ({"axis": None}, TypeError, r"^axis: expected an integer, got None"),
    ({"axis": True}, TypeError, r"^axis: expected an integer, got True"),
    ({"axis": np.True_}, TypeError, r"^axis: expected an integer, got .*True"),
    ({"axis": "1"}, TypeError, r"^axis: expected an integer, got '1'"),
    ({"axis": (0, 1)}, TypeError, r"^axis: expected an integer, got \(0, 1\)"),
    ({"axis": np.array([0, 1])}, TypeError, r"^axis: expected an integer, got array"),
    # eps
    *[
        ({"eps": eps}, ValueError, rf"^batch_norm eps must be positive during training, but got {eps}", *FORWARD_TRAINING, "backward")
        for eps in (0.0, -1.0, np.nan, np.inf)
    ],
    *[
        ({"eps": eps}, ValueError, rf"^batch_norm eps must be non-negative and finite, but got {eps}", "inference")
        for eps in (-1e-5, np.nan, np.inf)
    ],
    ({"eps": 10**400}, ValueError, r"^batch_norm eps must be"),
    *[({"eps": eps}, TypeError, r"^eps: expected a real number, got") for eps in ("1e-5", None, True, 1e-5j, Decimal(1), np.ones(3), [1e-5])],
    # momentum
    *[({"momentum": m}, ValueError, rf"^momentum: expected a number in \[0, 1\], got {m}") for m in (-0.1, 1.1, np.nan, np.inf, 10**400)],
    *[({"momentum": m}, TypeError, r"^momentum: expected a .*number.* got") for m in (None, "0.1", True, np.zeros(2))],
    # weight, bias
    *[
        change
        for name in ("weight", "bias")
        for change in [
            ({name: np.ones(4)}, ValueError, rf"^{name} should contain 3 elements not 4: .* got \(4,\) \[x has shape \(4, 3, 5\), axis=1\]"),
            ({name: np.ones((3, 1))}, ValueError, rf"^{name}: expected shape \(3,\), got \(3, 1\)"),
            ({name: np.ones((1, 4))}, ValueError, rf"^{name} should contain 3 elements not 4: .* got \(1, 4\)"),
            ({name: np.ones((1, 1, 3))}, ValueError, rf"^{name}: expected shape \(3,\), got \(1, 1, 3\)"),
            ({name: 1.0}, ValueError, rf"^{name} should contain 3 elements not 1"),
            ({name: np.ones(3, complex)}, TypeError, rf"^{name}: expected an array of real numbers, got complex128"),
            ({name: np.ones(3, bool)}, TypeError, rf"^{name}: expected .* got bool"),
            ({name: ["a", "b", "c"]}, TypeError, rf"^{name}: expected .* got <U"),
            ({name: [None] * 3}, TypeError, rf"^{name}: expected .* got object"),
            ({name: np.ma.masked_array(np.ones(3))}, TypeError, rf"^{name}: .* MaskedArray"),
        ]
    ],
    # running_mean, running_var
    *[
        change
        for name in ("running_mean", "running_var")
        for change in [
            ({name: np.ones(4, np.float32)}, ValueError, rf"^{name} should contain 3 elements not 4"),
            ({name: np.ones(2, np.float32)}, ValueError, rf"^{name} should contain 3 elements not 2"),
            ({name: np.ones((3, 1), np.float32)}, ValueError, rf"^{name}: expected shape \(3,\), got \(3, 1\)"),
            ({name: None}, ValueError, r"^running_mean and running_var must either both be None or neither be None"),
            ({name: np.ones(3, complex)}, TypeError, rf"^{name}: expected .* got complex128"),
            ({name: np.ma.masked_array(np.ones(3, np.float32))}, TypeError, rf"^{name}: expected .* MaskedArray"),
            ({name: [0.0, 1.0, 2.0]}, TypeError, rf"^{name}: expected a NumPy array, which training updates in place, got list", "training"),
            ({name: np.ones(3, int)}, TypeError, rf"^{name}: expected an array of float32 or float64, got int64", "training"),
            ({name: read_only(np.ones(3))}, ValueError, rf"^{name}: expected a writeable array.* got a read-only one", "training"),
            (
                {name: np.lib.stride_tricks.as_strided(np.ones(3), (3,), (0,))},
                ValueError,
                rf"^{name}: expected memory of its own for each element",
                "training",
            ),
            ({name: lambda a: a["x"][0, 0, :3]}, ValueError, rf"^{name}: .* overlaps x", "training"),
            ({name: lambda a: a["weight"]}, ValueError, rf"^{name}: .* overlaps weight", "training"),
            ({name: lambda a: a["bias"][::-1]}, ValueError, rf"^{name}: .* overlaps bias", "training"),
        ]
    ],
    ({"running_mean": None, "running_var": None}, ValueError, r"^running_mean must be defined in evaluation mode", "inference"),
    ({"running_var": [1, -1, 1]}, ValueError, r"^running_var: expected non-negative values, got -1.0 for channel 1", "inference"),
    ({"running_mean": lambda a: a["running_var"]}, ValueError, r"^running_mean: .* overlaps running_var", "training"),
    # stats
    ({"stats": [np.zeros(3), np.ones(3)]}, TypeError, r"^stats: expected BatchStats or a pair \(mean, var\), got list"),
    ({"stats": np.zeros((2, 3))}, TypeError, r"^stats: expected .* got ndarray"),
    ({"stats": None}, TypeError, r"^stats: expected .* got NoneType"),
    ({"stats": (np.zeros(3),)}, TypeError, r"^stats: expected"),
    ({"stats": (np.zeros(4), np.ones(3))}, ValueError, r"^stats.mean should contain 3 elements not 4"),
    ({"stats": (np.zeros(3), np.ones((3, 1)))}, ValueError, r"^stats.var: expected shape \(3,\), got \(3, 1\)"),
    ({"stats": (None, None)}, TypeError, r"^stats.mean: expected an array of shape \(3,\), got None"),
    ({"stats": (np.zeros(3), None)}, TypeError, r"^stats.var: expected an array of shape \(3,\), got None"),
    ({"stats": (21, np.zeros(3), np.ones(3))}, ValueError, r"^stats.count: expected 20, the values per channel of x, .* got 21"),
    ({"stats": (None, np.zeros(3), np.ones(3))}, TypeError, r"^stats.count: expected an integer, got None"),
    *[({"training": flag}, TypeError, r"^training: expected True or False, got") for flag in (1, 1e-5, "False", None, np.ones(1) > 0)],
    *[({"affine_grad": flag}, TypeError, r"^affine_grad: expected True or False, got") for flag in (0, "no", None)],
    ({"stats": (np.zeros(3), np.array([1, 1, -2.5]))}, ValueError, r"^stats.var: expected non-negative values, got -2.5 for channel 2"),
    ({"stats": (np.zeros(3, complex), np.ones(3))}, TypeError, r"^stats.mean: expected .* got complex128"),
    # dy
    ({"dy": X[:3]}, ValueError, r"^dy: expected shape \(4, 3, 5\), that of x, got \(3, 3, 5\)"),
    ({"dy": X.astype(np.float64)}, TypeError, r"^dy: expected dtype float32, that of x, got float64"),
    ({"dy": X.astype(int)}, TypeError, r"^dy: expected .* got int64"),
    ({"dy": None}, TypeError, r"^dy: expected an array, got None"),
    # out
    ({"out": X[:, :, :4].copy()}, ValueError, r"^out: expected shape \(4, 3, 5\), got \(4, 3, 4\)"),
    ({"out": X.astype(np.float64)}, TypeError, r"^out: expected dtype float32, that of x, got float64"),
    ({"out": X.tolist()}, TypeError, r"^out: expected a NumPy array, got list"),
    ({"out": np.ma.masked_array(X.copy())}, TypeError, r"^out: expected a NumPy array, got MaskedArray"),
    ({"out": read_only(X)}, ValueError, r"^out: expected a writeable array, got a read-only one"),
    (
        {"out": np.lib.stride_tricks.as_strided(X.copy(), X.shape, (60, 0, 4))},
        ValueError,
        r"^out: expected memory of its own for each element, got shape \(4, 3, 5\) with strides \(60, 0, 4\)",
    ),
    ({"out": lambda a: shifted(a["x"])}, ValueError, r"^out: expected memory of its own or exactly that of x, got an array that overlaps x"),
    ({"out": lambda a: a["x"][::-1]}, ValueError, r"^out: .* overlaps x"),
    ({"out": lambda a: a["x"][:, :, ::-1]}, ValueError, r"^out: .* overlaps x"),
    ({"out": lambda a: a["x"].reshape(5, 3, 4).transpose(2, 1, 0)}, ValueError, r"^out: .* overlaps x"),
    ({"out": lambda a: shifted(a["dy"])}, ValueError, r"^out: .* exactly that of dy, got an array that overlaps dy", "backward"),
]


def overlapping(name):
    """`out`, and a parameter that is 3 elements in the middle of it."""
    out = X.copy()
    part = out.reshape(-1)[20:23]
    part[...] = 1
    stats = {"stats.mean": (part, np.ones(3)), "stats.var": (np.zeros(3), part)}
    return {"out": out, "stats": stats[name]} if name in stats else {"out": out, name: part}


WRONG += [
    (overlapping(name), ValueError, rf"^out: expected memory of its own, got an array that overlaps {name}")
    for name in ("weight", "bias", "running_mean", "running_var", "stats.mean", "stats.var")
]
CASES = [
    pytest.param(name, changes, error, message, id=f"{name} {', '.join(changes)} {message[:70]}")
    for changes, error, message, *only in WRONG
    for name in FUNCTIONS
    if changes.keys() <= base(name).keys() and (not only or name in only)
]


def arrays(arguments):
    for a in arguments.values():
        yield from (b for b in (a if isinstance(a, tuple) else (a,)) if isinstance(b, np.ndarray))


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("name, changes, error, message", CASES)
def test_wrong_arguments(name, changes, error, message):
    arguments = base(name)
    arguments.update({key: value(arguments) if inspect.isfunction(value) else value for key, value in changes.items()})
    before = [a.copy() for a in arrays(arguments)]
    with pytest.raises(error, match=message):
        FUNCTIONS[name](**arguments)
    for a, b in zip(arrays(arguments), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_arguments_that_are_changed_above_are_valid(name):
    arguments = base(name)
    result = FUNCTIONS[name](**arguments)
    if name != "stats":
        assert (arguments["out"] != 7).all() and (result if name in ("inference", "training") else result[0]) is arguments["out"]
    assert name != "training" or (arguments["running_mean"] != 0.5).all()
