"""What a batch with NaN or infinity does to a layer that trains: on_nonfinite="propagate", "skip" or "raise"."""

import copy
import pickle

import numpy as np
import pytest
from test_layers import NAMES, batches, same_state, trained

import cbn

POISON = [np.nan, np.inf, -np.inf]


def poisoned(*channels, value=np.nan, dtype=np.float32):
    x = batches(dtype=dtype)[0].copy()
    x[1, list(channels), 2] = value
    return x


def layer(policy, **options):
    return trained(cbn.BatchNorm1d(3, on_nonfinite=policy, **options))


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
def test_finite_batches_are_as_always(policy, momentum):
    usual, other = trained(cbn.BatchNorm1d(3, momentum=momentum)), layer(policy, momentum=momentum)
    for x in batches():
        np.testing.assert_array_equal(other(x, out=np.empty_like(x)), usual(x))
        np.testing.assert_array_equal(other(x), usual(x))
        np.testing.assert_array_equal(other.backward(x), usual.backward(x))
        same_state(other.state_dict(), usual.state_dict())


@pytest.mark.parametrize("value", POISON)
def test_propagate(value):
    usual, x = layer("propagate"), poisoned(1, value=value)
    state, finite = usual.state_dict(), trained(cbn.BatchNorm1d(3))
    y = usual(x)
    finite(batches()[0])
    assert np.isnan(y[:, 1]).all() and np.isnan(usual.running_var[1]) and not np.isfinite(usual.running_mean[1])
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_equal(getattr(usual, name)[[0, 2]], getattr(finite, name)[[0, 2]])
    assert usual.num_batches_tracked == state["num_batches_tracked"] + 1


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("value", POISON)
def test_skip_some_channels(value, out, momentum):
    """The poisoned channels' running statistics stay; the others' are updated, and the batch counts."""
    skipping, x = layer("skip", momentum=momentum), poisoned(0, 2, value=value)
    usual = copy.deepcopy(skipping)
    usual.on_nonfinite = "propagate"
    before = skipping.state_dict()
    y = skipping(x, out=np.empty_like(x) if out else None)
    np.testing.assert_array_equal(y, usual(x))
    for name in ("running_mean", "running_var"):
        assert getattr(skipping, name)[[0, 2]].tolist() == before[name][[0, 2]].tolist()
        assert getattr(skipping, name)[1] == getattr(usual, name)[1]
        assert momentum == 0 or getattr(skipping, name)[1] != before[name][1]
    assert skipping.num_batches_tracked == before["num_batches_tracked"] + 1
    np.testing.assert_array_equal(skipping.backward(x), usual.backward(x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_skip_all_channels(momentum):
    """As if the batch had not been seen: the average over all batches stays one over those that count."""
    skipping, usual = cbn.BatchNorm1d(3, momentum=momentum, on_nonfinite="skip"), cbn.BatchNorm1d(3, momentum=momentum)
    for x in batches():
        skipping(poisoned(0, 1, 2))
        np.testing.assert_array_equal(skipping(x), usual(x))
        same_state(skipping.state_dict(), usual.state_dict())


@pytest.mark.parametrize("form", ["new", "out", "in place", "no running statistics", "cumulative", "float64"])
@pytest.mark.parametrize("value", POISON)
def test_raise(value, form):
    options = {"no running statistics": {"track_running_stats": False}, "cumulative": {"momentum": None}, "float64": {"dtype": np.float64}}
    raising, x = layer("raise", **options.get(form, {})), poisoned(1, 2, value=value)
    dy, given = batches()[2], x.copy()
    expected, gradient = raising.backward(dy, retain=True), raising.weight_grad
    before = raising.state_dict()
    out = {"out": np.full_like(x, 7), "in place": x}.get(form)
    with pytest.raises(
        FloatingPointError, match=r"^x: expected a finite mean and variance .* and variance nan for channel 1 \(2 channels in all\)"
    ):
        raising(x, out=out)
    np.testing.assert_array_equal(x, given)
    assert form != "out" or (out == 7).all()
    same_state(raising.state_dict(), before)
    assert raising.weight_grad is gradient
    np.testing.assert_array_equal(raising.backward(dy), expected)
    assert raising(batches()[0]).shape == x.shape


def test_variance_beyond_all_floats():
    """Finite values whose mean is infinite, or whose variance is."""
    x = np.array([[[1e200, -1e200]], [[1.0, 2.0]]])
    raising = cbn.BatchNorm1d(1, dtype=np.float64, on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match="mean .* and variance inf for channel 0$"):
        raising(x)
    assert raising.num_batches_tracked == 0 and raising.running_var == 1


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_empty_batches_are_finite(policy):
    guarded, usual = layer(policy), layer("propagate")
    x = np.ones((0, 3, 5), np.float32)
    for of in (guarded, usual):
        assert of(x).shape == of(x, out=x).shape == x.shape
    same_state(guarded.state_dict(), usual.state_dict())
    assert cbn.BatchNorm1d(0, on_nonfinite=policy)(np.ones((4, 0), np.float32)).shape == (4, 0)


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_eval_mode_does_not_ask(policy):
    guarded, x = layer(policy).eval(), poisoned(1)
    before = guarded.state_dict()
    assert np.isnan(guarded(x)).sum() == 1
    same_state(guarded.state_dict(), before)


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_wrong_calls_change_nothing(policy):
    guarded, x = layer(policy), batches()[0]
    before, out = guarded.state_dict(), np.full_like(x, 7)
    frozen = guarded.running_var
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="^running_var: expected a writeable array"):
        guarded(x, out=out)
    frozen.flags.writeable = True
    guarded.eps = 0.0
    with pytest.raises(ValueError, match="^batch_norm eps"):
        guarded(x, out=out)
    for wrong, error in [(x[:, :2], ValueError), (x.astype(int), TypeError), (x[:1, :, :1], ValueError), (None, TypeError)]:
        with pytest.raises(error):
            guarded(wrong, out=out)
    assert (out == 7).all()
    same_state(guarded.state_dict(), before)
    assert list(before) == NAMES


def test_spelling():
    for wrong in ("rasie", None, True, ["skip"], np.array(["skip", "raise"])):
        with pytest.raises(ValueError, match='^on_nonfinite: expected "propagate", "skip" or "raise", got'):
            cbn.BatchNorm1d(3, on_nonfinite=wrong)
    later = layer("skip")
    before = later.state_dict()
    with pytest.raises(ValueError, match="^on_nonfinite: expected"):
        later.on_nonfinite = "ignore"
    assert later.on_nonfinite == "skip"
    same_state(later.state_dict(), before)


def test_kept_by_copies_and_shown():
    skipping = layer("skip")
    for other in (copy.deepcopy(skipping), pickle.loads(pickle.dumps(skipping)), eval(repr(skipping), vars(cbn))):
        assert other.on_nonfinite == "skip" and repr(other) == repr(skipping)
