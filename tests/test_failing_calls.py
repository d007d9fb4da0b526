"""A call of a layer that fails changes nothing: not the output, the state, the gradients, or what `backward` goes back through."""

import warnings

import numpy as np
import pytest
from test_layers import batches, same_state, trained

import cbn

X = batches((4, 3, 5, 2))[-1]
HUGE = np.broadcast_to(np.float32(1), (1 << 23, 3, 1 << 12, 1 << 12))  # more than there are addresses


def nan_somewhere():
    x = X.copy()
    x[1, 2, 3, 1] = np.nan
    return x


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def own_overlap(a):
    """Of a's shape, but all samples in one place."""
    return np.lib.stride_tricks.as_strided(a.copy(), a.shape, (0, *a.strides[1:]))


# What is set on the layer before the call, the input, the output, and the error. `layer` stands for the layer itself.
CALLS = {
    "rank": ({}, X[0], None, ValueError),
    "channels": ({}, X[:, :2], None, ValueError),
    "dtype": ({}, X.astype(int), None, TypeError),
    "none": ({}, None, None, TypeError),
    "masked": ({}, np.ma.masked_array(X, X > 0), None, TypeError),
    "memory": ({}, HUGE, None, MemoryError),
    "output of another shape": ({}, X, X[:2].copy(), ValueError),
    "output of another dtype": ({}, X, X.astype(float), TypeError),
    "read-only output": ({}, X, read_only(X), ValueError),
    "output that overlaps x": ({}, X, X[::-1], ValueError),
    "output that overlaps itself": ({}, X, own_overlap(X), ValueError),
    "list as output": ({}, X, X.tolist(), TypeError),
    "eps": ({"eps": -1.0}, X, "new", ValueError),
    "eps of another type": ({"eps": "1e-5"}, X, "new", TypeError),
    "axis": ({"axis": 4}, X, "new", ValueError),
    "axis of another type": ({"axis": True}, X, "new", TypeError),
    "axis None": ({"axis": None}, X, "new", TypeError),
    "weight": ({"weight": np.ones(2, np.float32)}, X, "new", ValueError),
    "bias of another type": ({"bias": np.ones(3, complex)}, X, "new", TypeError),
    "running variance": ({"running_var": np.ones(4)}, X, "new", ValueError),
    "running mean of another type": ({"running_mean": np.ones(3, "U1")}, X, "new", TypeError),
}
TRAINING_CALLS = {
    "one value": ({}, X[:1, :, :1, :1], None, ValueError),
    "momentum": ({"momentum": 1.5}, X, "new", ValueError),
    "momentum of another type": ({"momentum": "0.1"}, X, "new", TypeError),
    "read-only running mean": ({"running_mean": read_only(np.zeros(3, np.float32))}, X, "new", ValueError),
    "read-only running variance": ({"running_var": read_only(np.ones(3, np.float32))}, X, "new", ValueError),
    "read-only number of batches": ({"num_batches_tracked": read_only(np.zeros((), np.int64))}, X, "new", ValueError),
    "running mean that overlaps itself": ({"running_mean": np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (3,), (0,))}, X, "new", ValueError),
    "running statistics that overlap": (dict.fromkeys(("running_mean", "running_var"), np.ones(3, np.float32)), X, "new", ValueError),
    "not finite": ({"on_nonfinite": "raise"}, nan_somewhere(), None, FloatingPointError),
    "not finite, to be written elsewhere": ({"on_nonfinite": "raise"}, nan_somewhere(), "new", FloatingPointError),
    "not finite, in place": ({"on_nonfinite": "raise"}, nan_somewhere(), "x", FloatingPointError),
    "policy": ({"on_nonfinite": "ignore"}, X, "new", ValueError),
}


@pytest.mark.parametrize("before", ["training", "eval"])
@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
@pytest.mark.parametrize(
    "mode, call", [(mode, call) for mode in ("training", "eval") for call in CALLS] + [("training", c) for c in TRAINING_CALLS]
)
def test_calls(mode, call, policy, before):
    changes, x, out, error = (CALLS | TRAINING_CALLS)[call]
    layer = trained(cbn.BatchNorm2d(3, on_nonfinite=policy), (4, 3, 5, 2)).train(before == "training")
    dy, last = X + 1, X.copy()
    layer(last)
    dx, weight_grad, bias_grad = layer.backward(dy, retain=True), layer.weight_grad, layer.bias_grad
    gradients, attributes, state = (weight_grad.copy(), bias_grad.copy()), dict(vars(layer)), layer.state_dict()

    layer.train(mode == "training")
    out = {"new": np.full_like(X, 7), "x": x}.get(out, out) if isinstance(out, str) else out
    given = {name: np.array(a) for name, a in {"x": x, "out": out, **changes}.items() if isinstance(a, np.ndarray) and a is not HUGE}
    with pytest.raises(error):
        for name, value in changes.items():  # which is where most are noticed
            setattr(layer, name, value)
        layer(x, out=out)
    for name, a in given.items():
        np.testing.assert_array_equal({"x": x, "out": out, **changes}[name], a)

    for name in changes:
        setattr(layer, name, attributes[name])
    layer.train(before == "training")
    assert vars(layer).keys() == attributes.keys()
    assert all(getattr(layer, name) is value for name, value in attributes.items())
    same_state(layer.state_dict(), state)
    np.testing.assert_array_equal((layer.weight_grad, layer.bias_grad), gradients)
    np.testing.assert_array_equal(layer.backward(dy), dx)


BACKWARD_CALLS = {
    "shape": (X[:2], None, ValueError),
    "dtype": (X.astype(float), None, TypeError),
    "none": (None, None, TypeError),
    "masked": (np.ma.masked_array(X), None, TypeError),
    "output of another shape": (X, X[:2].copy(), ValueError),
    "read-only output": (X, read_only(X), ValueError),
    "output that overlaps dy": (X, X[::-1], ValueError),
    "output that overlaps itself": (X, own_overlap(X), ValueError),
    "tuple as output": (X, (X,), TypeError),
}


@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize("call", BACKWARD_CALLS)
def test_backward(call, mode):
    dy, out, error = BACKWARD_CALLS[call]
    layer = trained(cbn.BatchNorm2d(3), (4, 3, 5, 2)).train(mode == "training")
    last = X.copy()
    layer(last)
    dx = layer.backward(X + 1, retain=True)
    gradients, attributes, state = (layer.weight_grad.copy(), layer.bias_grad.copy()), dict(vars(layer)), layer.state_dict()
    given = np.array(out) if isinstance(out, np.ndarray) else None
    with pytest.raises(error):
        layer.backward(dy, out=out)
    assert given is None or np.array_equal(out, given)
    assert all(getattr(layer, name) is value for name, value in attributes.items())
    same_state(layer.state_dict(), state)
    np.testing.assert_array_equal((layer.weight_grad, layer.bias_grad), gradients)
    np.testing.assert_array_equal(layer.backward(X + 1), dx)


@pytest.mark.parametrize("out", [None, "new"])
def test_failing_calls_use_up_no_warning(out):
    layer = cbn.BatchNorm2d(3).eval()
    out = np.full_like(X, 7) if out else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for wrong in (X[0], X[:, :2], X.astype(int)):
            with pytest.raises((ValueError, TypeError)):
                layer(wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # the warning itself may be what fails
            with pytest.raises(UserWarning, match="never updated"):
                layer(X, out=out)
        assert out is None or (out == 7).all()
    with pytest.warns(UserWarning, match="never updated"):
        layer(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(X)


# Views without overlaps, some of them far from any order of memory, and views with.
APART = {
    "every second": lambda a: a[:, ::2],
    "reversed": lambda a: a[::-1, :, ::-1],
    "transposed": lambda a: a.transpose(2, 0, 1),
    "diagonal": lambda a: np.einsum("iji->ji", a[:4]),
    "other diagonal": lambda a: np.einsum("iji->ji", a[:4][::-1]),
    "one element": lambda a: np.lib.stride_tricks.as_strided(a, (1, 1), (0, 0)),
    "no elements": lambda a: np.lib.stride_tricks.as_strided(a, (0, 3), (0, 0)),
    "a length of 1 with any stride": lambda a: np.lib.stride_tricks.as_strided(a, (1, 3), (0, 4)),
}
TOGETHER = {
    "zero stride, first axis": lambda a: np.lib.stride_tricks.as_strided(a, (3, 4), (0, 4)),
    "zero stride, last axis": lambda a: np.lib.stride_tricks.as_strided(a, (3, 4), (16, 0)),
    "windows": lambda a: np.lib.stride_tricks.sliding_window_view(a.reshape(-1), 5, writeable=True),
    "parts of elements": lambda a: np.lib.stride_tricks.as_strided(a, (3, 4), (16, 2)),
    "rows that begin in the one before": lambda a: np.lib.stride_tricks.as_strided(a, (3, 4), (12, 4)),
    "backwards": lambda a: np.lib.stride_tricks.as_strided(a[1], (3, 4), (-12, 4)),
}


@pytest.mark.parametrize("view", APART | TOGETHER)
def test_outputs_that_overlap_themselves(view):
    buffer = np.full((5, 6, 4), 7, np.float32)
    out = (APART | TOGETHER)[view](buffer)
    x = np.random.default_rng(41).standard_normal(out.shape).astype(np.float32)
    call = lambda: cbn.batch_norm(x, np.zeros(x.shape[1]), np.ones(x.shape[1]), eps=0, out=out)
    if view in APART:
        np.testing.assert_array_equal(call(), x)
    else:
        with pytest.raises(ValueError, match=r"^out: expected memory of its own for each element, got shape \(\d+, \d\) with strides \("):
            call()
        assert (buffer == 7).all()


def test_empty_batches_count_as_in_pytorch():
    torch = pytest.importorskip("torch")
    module, layer = torch.nn.BatchNorm1d(3), cbn.BatchNorm1d(3)
    empty = np.ones((0, 3, 5), np.float32)
    for x in (empty, *batches(), empty):
        module(torch.tensor(x)), layer(x)
        assert layer.num_batches_tracked == module.num_batches_tracked.item()
    np.testing.assert_allclose(layer.running_var, module.running_var, rtol=1e-6)
