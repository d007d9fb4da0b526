"""Any call does what the reference does, in its result or its error, on any CPU level, with any number of threads: drawn by Hypothesis."""

import math

import calls
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cbn
from cbn import dispatch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of casts of what was drawn


@settings(max_examples=2000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(dispatch.isa_available()), st.sampled_from([1, 2, 3, 7]), st.booleans(), st.sampled_from([1, 1000, 12288]))
def test_any_call(restored, data, isa, threads, stream, grain):
    call = calls.draw(lambda options: options[data.draw(st.integers(0, len(options) - 1))])
    dispatch.set_isa(isa)
    dispatch.set_stream_bytes(0 if stream else math.inf)
    cbn.threads.set_grain(grain)
    cbn.set_num_threads(threads)
    before, again = ({name: p.copy() for name, p in call.placed.items()} for _ in range(2))
    results = calls.run(call, call.placed)
    calls.judge(call, call.placed, before, results)
    if call.errors:
        return
    calls.compare_with_reference(call, before, results)
    dispatch.set_isa("baseline")
    cbn.set_num_threads(1)
    for name, a in calls.run(call, again).items():
        assert calls.same(results[name], a), f"{name}: other bits with {threads} threads on {isa} than with one on baseline"


def test_the_space_has_everything():
    """What is drawn covers the operations, layouts, errors and forms of output; a check of the checks."""
    rng = np.random.default_rng(0)
    drawn = [calls.draw(lambda options: options[int(rng.random() * len(options))]) for _ in range(3000)]
    fine = [call for call in drawn if not call.errors]
    assert 1500 < len(fine) < 2700
    assert {call.operation for call in fine} == set(calls.OPERATIONS)
    assert {call.out for call in fine} == {None, "out", "x", "dy", "residual"}
    assert {len(call.placed["x"].shape) for call in fine} == {2, 3, 4, 5, 6}
    assert {error for call in drawn for error in call.errors} == {ValueError, TypeError}
    arrays = [call.placed["x"].array for call in fine if call.placed["x"].array.size > 1]
    for kind in (
        lambda a: a.flags.c_contiguous,
        lambda a: not a.flags.c_contiguous,
        lambda a: not a.flags.aligned,
        lambda a: not a.dtype.isnative,
        lambda a: min(a.strides) < 0,
        lambda a: 0 in a.strides,
        lambda a: a.itemsize == 8,
        lambda a: a.dtype.kind in "iu",
        lambda a: a.itemsize == 2 and a.dtype.kind not in "iu",
    ):
        assert sum(map(kind, arrays)) > 30
    assert sum(call.placed["x"].array.size == 0 for call in fine) > 30
    assert sum(call.poison for call in fine) > 30
    assert {call.others.get("activation") for call in fine} == {None, *calls.ACTIVATIONS}
    for operation in set(calls.OPERATIONS) - {"stats"}:
        fused = [call for call in fine if call.operation == operation and "residual" in call.placed and call.others["activation"]]
        assert len(fused) > 15


WRONG_RESULTS = {
    "one element": lambda y, x: y.reshape(-1).__setitem__(-1, 3),
    "one bit": lambda y, x: y.reshape(-1)[:1].view(np.uint32).__ixor__(1 << 14),
    "the input": lambda y, x: x.reshape(-1).__setitem__(0, 3),
}


@pytest.mark.parametrize("left_out", ["activation", "residual"])
@pytest.mark.parametrize("operation", ["inference", "train", "backward", "frozen"])
def test_what_is_left_out_is_noticed(operation, left_out):
    """A check of the checks: results of a call that forgot what was to be fused."""
    rng, made = np.random.default_rng(2), 0
    while made < 10:
        call = calls.draw(lambda options: options[int(rng.random() * len(options))])
        if call.operation != operation or call.errors or call.poison or call.out or call.placed["x"].array.size < 50:
            continue
        if call.placed["x"].dtype != np.float32 or call.others["activation"] != "relu" or "residual" not in call.placed:
            continue
        made += 1
        before = {name: p.copy() for name, p in call.placed.items()}
        right = calls.run(call, {name: p.copy() for name, p in before.items()})
        calls.compare_with_reference(call, before, right)
        kept = dict(call.others), dict(call.placed)
        if left_out == "activation":
            call.others["activation"] = None
        else:
            del call.placed["residual"]
        wrong = calls.run(call, call.placed)
        call.others, call.placed = kept
        if not calls.same(np.array(wrong["y"]), np.array(right["y"])):
            with pytest.raises(AssertionError):
                calls.compare_with_reference(call, before, wrong)


@pytest.mark.parametrize("wrong", WRONG_RESULTS)
def test_what_is_wrong_is_noticed(wrong, monkeypatch):
    """A check of the checks: a function that gets one value wrong, or writes to its input, fails them."""
    rng, noticed, right = np.random.default_rng(1), 0, cbn.batch_norm_train

    def function(x, *args, out=None, **kwargs):
        y, stats = right(x, *args, out=out, **kwargs)
        WRONG_RESULTS[wrong](y, x)
        return y, stats

    monkeypatch.setattr(cbn, "batch_norm_train", function)
    made = 0
    while made < 50:
        call = calls.draw(lambda options: options[int(rng.random() * len(options))])
        x = call.placed["x"].array
        fused = call.others.get("activation") or "residual" in call.placed  # which may hide it
        if call.operation != "train" or call.errors or call.out or fused or x.dtype != np.float32 or x.size == 0 or not x.flags.c_contiguous:
            continue
        made += 1
        before = {name: p.copy() for name, p in call.placed.items()}
        try:
            results = calls.run(call, call.placed)
            calls.judge(call, call.placed, before, results)
            calls.compare_with_reference(call, before, results)
        except AssertionError:
            noticed += 1
    assert noticed >= 45  # a bit more or less leaves a NaN a NaN
