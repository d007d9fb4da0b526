"""One layer in many threads: calls that train come one after the other, whole; calls in eval mode and functions run together, exactly."""

import functools
import itertools
import os
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from interpreter import output

import cbn

pytestmark = pytest.mark.usefixtures("restored")

# Large enough that threads meet within a call, small enough that they often come and go.
XS = np.random.default_rng(51).normal(2, 3, (4, 8, 33, 24, 24)).astype(np.float32)
DY = np.random.default_rng(52).standard_normal(XS.shape[1:]).astype(np.float32)
POLICIES = ["propagate", "skip", "raise"]


def state(layer):
    return [a.tobytes() for a in layer.state_dict().values()]


def together(*calls):
    """What calls return that begin at once, each in a thread."""
    meet = threading.Barrier(len(calls), timeout=60)

    def run(call):
        meet.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("policy", POLICIES)
def test_training_is_in_some_order(policy, momentum):
    """One batch a thread: the state is, to the bit, that of one of the orders the calls may have come in."""

    def layer():
        return cbn.BatchNorm2d(33, momentum=momentum, on_nonfinite=policy)

    orders = []
    for order in itertools.permutations(XS):
        serial = layer()
        ys = {x.ctypes.data: serial(x) for x in order}
        orders.append(state(serial))
    for _ in range(50):
        shared = layer()
        actual = together(*[functools.partial(shared, x) for x in XS])
        assert state(shared) in orders
        for x, y in zip(XS, actual, strict=True):
            np.testing.assert_array_equal(y, ys[x.ctypes.data])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_batch_counts_and_states_are_whole(policy):
    """With momentum 1 the running statistics are the last batch's: never the mean of one and the variance of another, whoever looks."""
    layer = cbn.BatchNorm2d(33, momentum=1.0, on_nonfinite=policy)
    whole = []
    for x in XS:
        layer(x)
        whole.append(state(layer)[:4])
    layer.reset_running_stats()
    layer(XS[0])
    training, seen = threading.Event(), []

    def train(x):
        for _ in range(50):
            layer(x)

    def look():
        while not training.is_set():
            seen.append(state(layer)[:4])

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        together(*[functools.partial(train, x) for x in [*XS, *XS]])
        training.set()
        looking.result()
    assert layer.num_batches_tracked == 1 + 8 * 50
    assert seen and all(s in whole for s in seen)


@pytest.mark.parametrize("training", [True, False])
def test_backward_is_that_of_one_call(training):
    """Of whichever thread's: the gradients of input, weight and bias belong to one batch."""
    layer = cbn.BatchNorm2d(33)
    layer(XS[0])
    layer.train(training)
    right = []
    for x in XS:
        layer(x)
        right.append([a.tobytes() for a in (layer.backward(DY, retain=True), layer.weight_grad, layer.bias_grad)])

    def both(x):
        grads = []
        for _ in range(30):
            layer(x)
            grads.append(layer.backward(DY, retain=True).tobytes())  # which another thread may go back through, too
        return grads

    for grads in together(*[functools.partial(both, x) for x in [*XS, *XS]]):
        assert all(dx in [r[0] for r in right] for dx in grads)
    assert [layer.weight_grad.tobytes(), layer.bias_grad.tobytes()] in [r[1:] for r in right]


def test_eval_waits_for_calls_that_train():
    """Once eval() has returned, no call changes the running statistics."""
    for _ in range(50):
        layer = cbn.BatchNorm2d(33)
        layer(XS[0])

        def stop(layer=layer):
            before = layer.eval().state_dict()
            y = layer(XS[0])
            return np.array_equal(y, cbn.batch_norm(XS[0], before["running_mean"], before["running_var"], layer.weight, layer.bias))

        results = together(stop, *[functools.partial(layer, x) for x in XS])
        assert results[0] is True


@pytest.mark.parametrize("n", [1, 2])
def test_functions_and_eval_mode_in_16_threads(n):
    cbn.set_num_threads(n)
    cbn.threads.set_grain(1)
    layer = cbn.BatchNorm(33, activation="relu")
    layer(XS[0])
    layer.eval()
    others = cbn.BatchNorm(33), cbn.BatchNorm(33, track_running_stats=False)
    rng = np.random.default_rng(53)
    xs = [rng.standard_normal((2, 33, 5 + i, 7)).astype(np.float32) for i in range(16)]

    def work(x):
        mean, var = np.zeros(33), np.ones(33)
        y, st = cbn.batch_norm_train(x, activation="hard_swish", residual=x)
        z = cbn.batch_norm(x, mean, var, training=True)
        g = cbn.batch_norm_backward(x, x, st, activation="relu", residual=y)
        from_layers = [layer(x, residual=y), *(other(x) for other in others)]
        return [y, z, mean, var, *g, g.residual, *cbn.batch_stats(x), *from_layers, cbn.batch_norm(x, *st[1:])]

    expected = [work(x) for x in xs]
    for actual in together(*[lambda x=x: [work(x) for _ in range(20)] for x in xs]):
        (right,) = [e for e in expected if e[0].shape == actual[0][0].shape]
        for results in actual:
            for a, b in zip(results, right, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="a Python with a GIL")
def test_import_leaves_the_gil_off(monkeypatch):
    monkeypatch.delenv("PYTHON_GIL", raising=False)
    assert output("import sys; print(sys._is_gil_enabled())") == "False"


TRAIN_IN_A_THREAD = """
import threading, time
xs = np.random.default_rng(54).standard_normal((4, 8, 33, 24, 24)).astype(np.float32)
layer = cbn.BatchNorm2d(33, momentum=1.0)
def state():
    return [a.tobytes() for a in (layer.running_mean, layer.running_var)]
whole = []
for x in xs:
    layer(x)
    whole.append(state())
stop = threading.Event()
def train(x):
    while not stop.is_set():
        layer(x)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_while_threads_train():
    """The child's layer is as between two calls, and the child can train it at once; threads that fork at the same time don't wait for ever."""
    assert output(TRAIN_IN_A_THREAD + """
def exit_code(child):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(child, 9)
    return "hangs"
def fork():
    for _ in range(100):
        child = os.fork()
        if child == 0:
            count, fine = int(layer.num_batches_tracked), state() in whole
            layer(xs[0])
            os._exit(0 if fine and state() == whole[0] and layer.num_batches_tracked == count + 1 else 1)
        codes.add(exit_code(child))
codes = set()
training = [threading.Thread(target=train, args=(x,)) for x in xs[1:3]]
forking = [threading.Thread(target=fork) for _ in range(2)]
for t in training + forking:
    t.start()
for t in forking:
    t.join()
stop.set()
print(codes)
""") == "{0}"
