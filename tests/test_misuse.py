"""Where a user's hand slips, nothing crashes, lies or half happens: the kinds of slips, each over all its places."""

import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
from test_layers import same_state

import cbn

RNG = np.random.default_rng(61)
X = RNG.normal(size=(8, 4, 5, 5)).astype(np.float32)
DY = RNG.normal(size=X.shape).astype(np.float32)
NOT_FLAGS = [0, 1, 1e-5, "False", "", None, [], [True], np.array(True), np.array([True]), np.int64(1), object()]


def statistics():
    return np.zeros(4, np.float32), np.ones(4, np.float32)


FLAGS = {
    "training": lambda flag: cbn.batch_norm(X, *statistics(), training=flag),
    "training of backward": lambda flag: cbn.batch_norm_backward(DY, X, statistics(), training=flag),
    "affine_grad": lambda flag: cbn.batch_norm_backward(DY, X, statistics(), affine_grad=flag),
    "unbiased": lambda flag: cbn.batch_norm(X, *statistics(), unbiased=flag),
    "unbiased in training": lambda flag: cbn.batch_norm(X, *statistics(), training=True, unbiased=flag),
    "unbiased of a layer": lambda flag: cbn.BatchNorm2d(4, unbiased=flag),
    "affine": lambda flag: cbn.BatchNorm2d(4, affine=flag),
    "bias": lambda flag: cbn.BatchNorm2d(4, bias=flag),
    "track_running_stats": lambda flag: cbn.BatchNorm2d(4, track_running_stats=flag),
    "mode": lambda flag: cbn.BatchNorm2d(4).train(flag),
    "affine of freeze": lambda flag: cbn.BatchNorm2d(4).freeze(flag),
    "training of a layer": lambda flag: setattr(cbn.BatchNorm2d(4), "training", flag),
    "affine of a layer": lambda flag: setattr(cbn.BatchNorm2d(4), "affine", flag),
    "strict": lambda flag: cbn.BatchNorm2d(4).load_state_dict(cbn.BatchNorm2d(4).state_dict(), flag),
    "retain": lambda flag: called().backward(DY, retain=flag),
    "before": lambda flag: cbn.fold_linear(np.ones((4, 4)), None, cbn.BatchNorm1d(4), before=flag),
    "before of a convolution": lambda flag: cbn.fold_conv(np.ones((4, 4, 1)), None, cbn.BatchNorm1d(4), before=flag, padding=0),
    "transposed": lambda flag: cbn.fold_conv(np.ones((4, 4, 1)), None, cbn.BatchNorm1d(4), transposed=flag),
}


def called(**options):
    layer = cbn.BatchNorm2d(4, **options)
    layer(X)
    return layer


@pytest.mark.parametrize("flag", NOT_FLAGS, ids=repr)
@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_flags(name, flag):
    with pytest.raises(TypeError, match=f"^{name.split()[0]}: expected True or False, got "):
        FLAGS[name](flag)


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_numpy(name):
    for flag in (True, False):
        FLAGS[name](flag)
        FLAGS[name](np.bool_(flag))


@pytest.mark.parametrize("stats", [(None, None), (np.zeros(4), None), (None, np.ones(4)), (200, None, None), (None,) * 3, (200, np.zeros(4), None)])
@pytest.mark.parametrize("training", [True, False])
def test_none_in_statistics(stats, training):
    with pytest.raises(TypeError, match=r"^stats\.(mean|var|count): expected .* got None"):
        cbn.batch_norm_backward(DY, X, stats, training=training)


def test_statistics_that_are_none_by_the_time_of_backward():
    """backward goes by the attributes of the call."""
    layer = called().eval()
    layer(X)
    expected = layer.backward(DY, retain=True)
    layer.running_mean = layer.running_var = layer.weight = None
    layer.eps, layer.activation, layer.axis = 1.0, "relu", -1
    np.testing.assert_array_equal(layer.backward(DY), expected)


def test_statistics_of_other_values():
    whole = cbn.batch_stats(X)
    with pytest.raises(ValueError, match=r"^stats\.count: expected 100, the values per channel of x, .* got 200"):
        cbn.batch_norm_backward(DY[:4], X[:4], whole)
    cbn.batch_norm_backward(DY[:4], X[:4], whole, training=False)  # constants, whatever they are of


def test_a_call_is_used_up():
    layer = cbn.BatchNorm2d(4)
    layer(X[:4]), layer(X[4:])
    layer.backward(DY[4:])
    grad = layer.weight_grad
    with pytest.raises(RuntimeError, match="^backward: expected a call of the layer before, .* used up .* retain=True"):
        layer.backward(DY[:4])
    assert layer.weight_grad is grad


@pytest.mark.parametrize("mode", ["training", "eval", "frozen"])
def test_outputs_beside_the_input(mode):
    """Slices of one buffer share its bounds, but no element."""
    buffer, layer = np.zeros((2, 6, 4, 4), np.float32), cbn.BatchNorm2d(3)
    buffer[:, :3] = RNG.normal(size=(2, 3, 4, 4))
    layer.running_var[...] = 2
    if mode == "frozen":
        layer.freeze(affine=False)
    layer.train(mode == "training")
    x = buffer[:, :3]
    apart = copy.deepcopy(layer)
    y = layer(x, out=buffer[:, 3:])
    np.testing.assert_array_equal(y, apart(x))
    np.testing.assert_array_equal(layer.backward(np.ones_like(y)), apart.backward(np.ones_like(y)))


# What is set, and what it becomes.
SET = {
    "running_mean": [[0, 1, 2, 3], (0.5,) * 4, np.arange(4), np.arange(4.0), np.arange(4, dtype=">f4"), np.ones((1, 4)), memoryview(np.ones(4))],
    "weight": [[0, 1, 2, 3], np.arange(4.0), np.arange(4, dtype=np.float16), np.ones((1, 4), np.float32)],
    "running_var": [np.ones(8, np.float32)[::2], np.arange(1, 5, dtype=np.float32)[::-1], [1, 1, 1, -1e-7]],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in SET.items() for value in values], ids=repr)
def test_arrays_that_are_set(name, value):
    layer = cbn.BatchNorm2d(4)
    setattr(layer, name, value)
    array = getattr(layer, name)
    assert type(array) is np.ndarray and array.dtype == np.float32 and array.dtype.isnative and array.shape == (4,)
    np.testing.assert_array_equal(array, np.asarray(value, np.float32).reshape(4))
    assert array is value or not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.ndim > 1
    expected = array * np.float32(0.9) + np.float32(0.1) * cbn.batch_stats(X).mean
    layer(X)
    if name == "running_mean":
        np.testing.assert_allclose(array, expected, rtol=1e-5)


def test_arrays_of_the_type_are_kept():
    layer, array, count = cbn.BatchNorm2d(4), np.ones(4, np.float32), np.array(3)
    layer.weight, layer.num_batches_tracked = array, count
    assert layer.weight is array and layer.num_batches_tracked is count
    for count in (5, np.int32(5), np.array([5]), np.array([1, 5])[::-1][:1]):
        layer.num_batches_tracked = count
        assert layer.num_batches_tracked.shape == () and layer.num_batches_tracked.dtype == np.int64
        layer(X)
        assert layer.num_batches_tracked == 6


WRONG = {
    "running_mean": [np.ones(3), np.ones((4, 1)), np.ones(4, object), "abc", [None] * 4, np.ones(4, complex), [1e300] * 4],
    "running_var": [np.full(4, -1.0), 1.0],
    "num_batches_tracked": [-1, 1.5, "1", [1, 2], 1 << 80],
    "momentum": [1.5, -0.1, True, "0.1", np.ones(2), float("nan")],
    "eps": [-1, "1", None, True, float("inf"), float("nan")],
    "axis": [None, 1.0, True, "1"],
    "activation": ["tanh", 1, ("clip", 1, 0), ("clip",), ["relu"]],
    "on_nonfinite": ["ignore", None],
    "frozen": ["no", True],
    "affine": ["no"],
    "track_running_stats": [1],
    "unbiased": [0],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values], ids=repr)
def test_wrong_attributes_are_refused_when_set(name, value):
    layer = called()
    before, state = dict(vars(layer)), layer.state_dict()
    with pytest.raises((TypeError, ValueError), match=f"^({name}|batch_norm {name})( should contain|:| must be)"):
        setattr(layer, name, value)
    assert all(vars(layer)[key] is value for key, value in before.items())
    same_state(layer.state_dict(), state)


@pytest.mark.parametrize("options", [{"momentum": 1.5}, {"eps": -1}, {"momentum": True}, {"affine": "no"}, {"dtype": None}, {"dtype": "x"},
                                     {"stats_dtype": int}, {"num_features": 1.5}, {"num_features": 1 << 70}, {"num_features": True}], ids=repr)  # fmt: skip
def test_wrong_constructions(options):
    with pytest.raises((TypeError, ValueError), match=f"^(batch_norm )?{next(iter(options))}"):
        cbn.BatchNorm2d(**{"num_features": 4} | options)


@pytest.mark.parametrize("locked", ["running_mean", "running_var", "weight", "bias", "num_batches_tracked"])
@pytest.mark.parametrize("method", ["load", "reset parameters"])
def test_all_is_loaded_or_nothing(method, locked):
    layer = called()
    getattr(layer, locked).flags.writeable = False
    before = layer.state_dict()
    with pytest.raises(ValueError, match=f"{locked}: expected a writeable array"):
        if method == "load":
            layer.load_state_dict(cbn.BatchNorm2d(4).state_dict())
        else:
            layer.reset_parameters()
    same_state(layer.state_dict(), before)


BAD_VALUES = [None, "abc", [1.0], np.ones(4, complex), np.ones(4, object), [1e300] * 4, object(), np.ones((4, 1))]


@pytest.mark.parametrize("strictness", ["ignore", "error"])
def test_drawn_failures_change_nothing(strictness):
    """A state dict with something wrong anywhere, with what it warns of as errors, too, and under any floating-point errors."""
    rng = np.random.default_rng(62)
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    for _ in range(500):
        layer = called()
        before = layer.state_dict()
        state = {name: rng.random(4) if name != names[4] else 3 for name in rng.permutation(names)}
        state[names[rng.integers(5)]] = BAD_VALUES[rng.integers(len(BAD_VALUES))]
        if rng.random() < 0.3:
            state["running_var"] = [1, 1, -1e-9, 1]
        with warnings.catch_warnings(), np.errstate(all="raise"):
            warnings.simplefilter(strictness)
            try:
                layer.load_state_dict(state)
            except (ValueError, UserWarning):
                same_state(layer.state_dict(), before)
            else:
                assert not any(value is bad for value in state.values() for bad in BAD_VALUES)


def test_what_is_no_mapping():
    for wrong in ([], None, 1, "abc", np.ones(4)):
        with pytest.raises(TypeError, match="^state_dict: expected a mapping"):
            cbn.BatchNorm2d(4).load_state_dict(wrong)
        with pytest.raises(TypeError, match="^other: expected BatchStats"):
            cbn.batch_stats(X).merge(wrong)


FAR = np.array([[3e20], [-3e20]], np.float32)  # of a variance beyond float32


@pytest.mark.parametrize("form", ["new", "out", "in place"])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_what_is_judged_is_what_is_stored(policy, form):
    layer, x = cbn.BatchNorm1d(1, on_nonfinite=policy), FAR.copy()
    before, out = layer.state_dict(), {"new": None, "out": np.full_like(x, 7), "in place": x}[form]
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="which float32 would store as 0.0 and inf$"):
            layer(x, out=out)
        np.testing.assert_array_equal(x, FAR)
        assert form != "out" or (out == 7).all()
    else:
        layer(x, out=out)
    same_state(layer.state_dict(), before)


@pytest.mark.parametrize("form", ["new", "out", "in place"])
def test_statistics_that_leave_their_range(form):
    x, running = FAR.copy(), (np.zeros(1, np.float32), np.ones(1, np.float32))
    layer, out = cbn.BatchNorm1d(1), {"new": None, "out": np.full_like(x, 7), "in place": x}[form]
    before = layer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in (lambda: layer(x, out=out), lambda: cbn.batch_norm(x, *running, training=True, out=out)):
            with pytest.raises(UserWarning, match="^running_var: expected variances within the range of float32, got 9.*e.40 for channel 0"):
                call()
    np.testing.assert_array_equal(x, FAR)
    assert form != "out" or (out == 7).all()
    assert running[0] == 0 and running[1] == 1
    same_state(layer.state_dict(), before)
    with pytest.warns(UserWarning, match="stats_dtype") as record:
        layer(x, out=out)
    assert record[0].filename == __file__
    assert np.isinf(layer.running_var)


def test_wide_statistics():
    layer = cbn.BatchNorm1d(1, stats_dtype=np.float64, momentum=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(FAR)
        np.testing.assert_allclose(layer.eval()(FAR).ravel(), np.array([1, -1]) / np.sqrt(2), rtol=1e-6)
    assert layer.running_var.dtype == np.float64 and layer.weight.dtype == np.float32
    for other in (pickle.loads(pickle.dumps(layer)), eval(repr(layer), vars(cbn))):
        assert other.stats_dtype == np.float64 and repr(other) == repr(layer)


@pytest.mark.parametrize("eps", [1e-5, np.array(1e-5), np.float32(1e-5)])
def test_variances_below_zero(eps):
    var = np.array([1, 1, -1e-7, 1])
    calls = {
        "running_var": lambda: cbn.batch_norm(X, np.zeros(4), var, eps=eps),
        "stats.var": lambda: cbn.batch_norm_backward(DY, X, (np.zeros(4), var), eps=eps, training=False),
        "bn.running_var": lambda: cbn.fold_linear(np.eye(4), None, (np.zeros(4), var, None, None, eps)),
    }
    for name, call in calls.items():
        with pytest.warns(UserWarning, match=f"^{name}: expected non-negative values, got -1e-07 for channel 2; computing"):
            result = call()
        assert np.isfinite(result[0]).all()
    expected = (X[:, 2].astype(float)) / np.sqrt(float(eps) - 1e-7)
    with pytest.warns(UserWarning):
        np.testing.assert_allclose(calls["running_var"]()[:, 2], expected, rtol=1e-6)
    with pytest.warns(UserWarning, match="^running_var: .* channel 2"):
        cbn.BatchNorm2d(4).load_state_dict({"running_var": var}, strict=False)


@pytest.mark.parametrize("eps", [1e-77, 1e-100, 5e-324])
def test_eps_whose_root_has_no_inverse(eps):
    for call in (
        lambda x: cbn.batch_norm(x, *statistics(), eps=eps),
        lambda x: cbn.batch_norm_train(x, eps=eps)[0],
        lambda x: cbn.batch_norm_backward(x, x, statistics(), eps=eps).x,
        lambda x: cbn.BatchNorm2d(4, eps=eps)(x),
    ):
        with pytest.raises(ValueError, match="^batch_norm eps must be at least 1e-76 where x is not float64"):
            call(np.ones_like(X))
        if eps > 1e-100:
            assert np.isfinite(call(np.ones(X.shape))).all()
    assert (cbn.batch_norm_train(np.ones_like(X), eps=1e-76)[0] == 0).all()


def test_forms_of_arrays():
    mean, var = statistics()
    expected = cbn.batch_norm(X, mean, var, mean + 2, mean)
    for of in (list, tuple, lambda a: a[None], memoryview):
        np.testing.assert_array_equal(cbn.batch_norm(X, of(mean), of(var), of(mean + 2), of(mean)), expected)
    rows = mean[None].copy(), var[None].copy()
    cbn.batch_norm(X, *rows, training=True)
    cbn.batch_norm(X, mean, var, training=True)
    np.testing.assert_array_equal(rows, (mean[None], var[None]))
    weight, bias = [[1.0, 2.0], [3.0, 4.0]], (0.0, 1.0)
    bn = [0.0, 1.0], [1.0, 2.0], None, None, 1e-5
    folded = cbn.fold_linear(weight, bias, bn)
    arrays = cbn.fold_linear(np.array(weight), np.array(bias), tuple(a if a is None else np.array(a) for a in bn))
    np.testing.assert_array_equal(folded.weight, arrays.weight)
    np.testing.assert_array_equal(folded.bias, arrays.bias)


def test_bfloat16_tensors():
    torch, ml_dtypes = pytest.importorskip("torch"), pytest.importorskip("ml_dtypes")
    x = torch.tensor(X).bfloat16()
    assert cbn.batch_norm(x, *statistics()).dtype == ml_dtypes.bfloat16
    layer = cbn.BatchNorm2d(4)
    layer.load_state_dict({name: tensor.bfloat16() if tensor.ndim else tensor for name, tensor in torch.nn.BatchNorm2d(4).state_dict().items()})
    assert cbn.fold_conv(torch.ones(4, 4, 1).bfloat16(), None, layer).weight.dtype == ml_dtypes.bfloat16
    with pytest.raises(TypeError, match=r"detach\(\)"):
        cbn.batch_stats(torch.ones(2, 3).bfloat16().requires_grad_())


def test_gradients_keep_the_residual():
    g = cbn.batch_norm_backward(DY, X, cbn.batch_stats(X), residual=X, activation="relu")
    for other in (g._replace(bias=None), copy.copy(g), cbn.Gradients(**g._asdict())):
        assert other.residual is g.residual and other.x is g.x
    assert pickle.loads(pickle.dumps(g)).residual.shape == X.shape


def while_training(layer, look, rounds=300):
    """What `look` finds, time and again, while another thread trains on batches of one mean each, which all channels show."""
    stop, found = threading.Event(), []

    def train():
        i = 0
        while not stop.is_set():
            i += 1
            layer(np.stack([np.full(channels, i - 1, np.float32), np.full(channels, i + 1, np.float32)]))

    channels = layer.num_features
    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(rounds):
            found.append(look())
    finally:
        stop.set()
        thread.join()
    return found


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state dict"])
def test_copies_are_of_one_moment(how):
    layer = cbn.BatchNorm1d(3000, momentum=1.0)
    copies = {
        "deepcopy": lambda: copy.deepcopy(layer).state_dict(),
        "pickle": lambda: pickle.loads(pickle.dumps(layer)).state_dict(),
        "state dict": layer.state_dict,
    }
    for state in while_training(layer, copies[how]):
        assert np.unique(state["running_mean"]).size == 1
        assert state["running_mean"][0] == state["num_batches_tracked"]  # a momentum of 1 takes the last batch's


@pytest.mark.parametrize("form", ["new", "out", "in place"])
def test_eval_calls_beside_loading(form):
    """Outputs are of the parameters before or after, never of some of each."""
    layer = cbn.BatchNorm1d(20_000, eps=0.0).eval()
    states = [
        {"weight": np.full(20_000, w), "bias": np.full(20_000, w), "running_mean": np.full(20_000, w), "running_var": np.full(20_000, w * w)}
        for w in (1.0, 2.0, 4.0)
    ]
    layer.load_state_dict(states[0])
    stop = threading.Event()

    def load():
        while not stop.is_set():
            for state in states:
                layer.load_state_dict(state)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(150):
            x = np.zeros((2, 20_000), np.float32)
            y = layer(x, out={"new": None, "out": np.empty_like(x), "in place": x}[form])
            assert np.unique(y).size == 1 and y[0, 0] in [-w / w * w + w for w in (1.0, 2.0, 4.0)]
    finally:
        stop.set()
        thread.join()
