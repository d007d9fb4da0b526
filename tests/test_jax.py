"""cbn.jax under jit, grad and vmap: the bits of cbn's functions, the gradients of JAX's own expressions."""

import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from interpreter import output

import cbn

jax = pytest.importorskip("jax", reason="the arrays are JAX's")
import jax.numpy as jnp
from jax.test_util import check_grads

import cbn.jax

DTYPES = ["float32", "float64", "bfloat16", "float16"]
ACTIVATIONS = [None, "relu", ("leaky_relu", 0.1), "hard_swish", "silu"]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def drawn(seed, dtype="float32"):
    """An array of a drawn shape, and the keywords of a call."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 6, rng.integers(2, 6)))
    axis = int(rng.integers(-len(shape), len(shape)))
    if np.prod(shape) == shape[axis]:
        shape = tuple(2 * n if i != axis % len(shape) else n for i, n in enumerate(shape))
    x = rng.normal(3, 2, shape).astype(jnp.dtype(dtype))
    parameters = rng.random((4, shape[axis])).astype(np.float32) + 0.1
    how = {"eps": float(10.0 ** rng.integers(-5, 0)), "axis": axis, "activation": ACTIVATIONS[seed % len(ACTIVATIONS)]}
    return rng, x, parameters, how


def same(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), expected, strict=True)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_same_bits(seed, dtype, jit):
    _, x, (mean, var, weight, bias), how = drawn(seed, dtype)
    wrap = jax.jit if jit else lambda f: f
    same(wrap(lambda *a: cbn.jax.batch_norm(*a, **how))(x, mean, var, weight, bias), cbn.batch_norm(x, mean, var, weight, bias, **how))
    same(wrap(lambda *a: cbn.jax.batch_norm(*a, **how))(x, mean, var), cbn.batch_norm(x, mean, var, **how))
    for parameters in ((), (weight,), (None, bias), (weight, bias)):
        y, mean, var = wrap(lambda *a: cbn.jax.batch_norm_train(*a, **how))(x, *parameters)
        y_, stats = cbn.batch_norm_train(x, *parameters, **how)
        same(y, y_)
        same(mean, stats.mean.astype(np.float64 if dtype == "float64" else np.float32))
        same(var, stats.var.astype(np.float64 if dtype == "float64" else np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_same_gradients(seed, dtype):
    """Those of cbn.batch_norm_backward, and of an offset of 1e4 as well: the mean is handed over in full."""
    rng, x, (mean, var, weight, bias), how = drawn(seed, dtype)
    x = (x.astype(float) + (1e4 if dtype == "float32" else 0)).astype(x.dtype)
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    y, vjp = jax.vjp(jax.jit(lambda *a: cbn.jax.batch_norm_train(*a, **how)[0]), x, weight, bias)
    _, stats = cbn.batch_norm_train(x, weight, bias, **how)
    expected = cbn.batch_norm_backward(dy, x, stats, weight, bias, **how)
    for a, b in zip(vjp(dy), expected, strict=True):
        assert a.dtype == b.dtype
        b = b.astype(float)
        tolerance = 2.0 ** -{"float32": 22, "float64": 50, "bfloat16": 7, "float16": 10}[dtype]
        np.testing.assert_allclose(np.asarray(a, float), b, rtol=tolerance, atol=tolerance * abs(b).max(initial=0))
    y, vjp = jax.vjp(jax.jit(lambda *a: cbn.jax.batch_norm(*a, **how)), x, mean, var, weight, bias)
    dx, _, _, dweight, dbias = vjp(dy)
    for a, b in zip((dx, dweight, dbias), cbn.batch_norm_backward(dy, x, (mean, var), weight, bias, training=False, **how), strict=True):
        same(a, b)


@pytest.mark.parametrize("seed", range(5))
def test_gradients_by_differences(seed):
    """Of every argument, in float64. Those of the statistics of training are constants."""
    _, x, parameters, how = drawn(seed, "float64")
    how["activation"] = [None, "silu"][seed % 2]
    mean, var, weight, bias = parameters.astype(float)
    check_grads(lambda *a: cbn.jax.batch_norm(*a, **how), (x, mean, var, weight, bias), order=1, modes="rev")
    check_grads(lambda *a: cbn.jax.batch_norm_train(*a, **how)[0], (x, weight, bias), order=1, modes="rev")
    gradient = jax.grad(lambda x: sum(a.sum() for a in cbn.jax.batch_norm_train(x, **how)[1:]))(x)
    assert not gradient.any()


def test_parameters_of_other_types_and_shapes():
    _, x, (mean, var, weight, bias), _ = drawn(0)
    x = x.reshape(-1, weight.size)
    half, row = jnp.asarray(weight, jnp.bfloat16), jnp.asarray(bias)[None]
    same(cbn.jax.batch_norm(x, mean, var, half, row), cbn.batch_norm(x, mean, var, np.asarray(half), bias))
    dhalf, drow = jax.grad(lambda w, b: (cbn.jax.batch_norm(x, mean, var, w, b) ** 2).sum(), (0, 1))(half, row)
    assert (dhalf.dtype, dhalf.shape, drow.dtype, drow.shape) == (half.dtype, half.shape, row.dtype, row.shape)
    whole = np.arange(weight.size, dtype=np.int32)
    same(cbn.jax.batch_norm(x, mean, var, whole), cbn.batch_norm(x, mean, var, whole.astype(np.float32)))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
def test_integers(dtype):
    x = np.random.default_rng(0).integers(0, 100, (5, 3, 4)).astype(dtype)
    weight, bias = np.ones(3, np.float32), np.zeros(3, np.float32)
    same(cbn.jax.batch_norm(x, bias, weight), cbn.batch_norm(x, bias, weight))
    same(cbn.jax.batch_norm_train(x)[0], cbn.batch_norm_train(x)[0])
    dweight = jax.grad(lambda w, x: (cbn.jax.batch_norm_train(x, w)[0] ** 2).sum())(weight, x)
    y, stats = cbn.batch_norm_train(x, weight)
    same(dweight, cbn.batch_norm_backward(2 * y, x, stats, weight).weight)


def test_vmap_scan_and_no_elements():
    _, _, (mean, var, weight, bias), _ = drawn(0)
    xs = np.random.default_rng(1).standard_normal((3, 6, weight.size, 2)).astype(np.float32)
    each = [cbn.batch_norm_train(x, weight, bias) for x in xs]
    y, means, _ = jax.vmap(lambda x: cbn.jax.batch_norm_train(x, weight, bias))(xs)
    same(y, np.stack([y for y, _ in each]))
    same(means, np.stack([stats.mean for _, stats in each]).astype(np.float32))
    same(jax.vmap(cbn.jax.batch_norm, (None, 0, None))(xs[0], np.stack([mean, bias]), var),
         np.stack([cbn.batch_norm(xs[0], m, var) for m in (mean, bias)]))
    _, y = jax.lax.scan(lambda carry, x: (carry, cbn.jax.batch_norm(x, mean, var)), 0, xs)
    same(y, np.stack([cbn.batch_norm(x, mean, var) for x in xs]))
    empty = xs[0, :0]
    same(cbn.jax.batch_norm(empty, mean, var), empty)
    same(jax.grad(lambda x: cbn.jax.batch_norm_train(x)[0].sum())(empty), empty)


def test_errors():
    """Before anything runs, in cbn's words; what only values tell, when it runs."""
    x, ones = jnp.ones((4, 3, 2)), jnp.ones(3)
    for call, error, message in (
        (lambda: cbn.jax.batch_norm(x, ones, ones[:2]), ValueError, "running_var should contain 3 elements not 2"),
        (lambda: cbn.jax.batch_norm(x, None, ones), ValueError, "running_mean and running_var must either both be None or neither"),
        (lambda: cbn.jax.batch_norm(x, ones, ones, axis=3), ValueError, "^axis: "),
        (lambda: cbn.jax.batch_norm(x, ones, ones, activation="tanh"), ValueError, "^activation: "),
        (lambda: cbn.jax.batch_norm_train(x, ones[:2]), ValueError, r"expected shape \(3,\), got \(2,\) \[x has shape \(4, 3, 2\)"),
        (lambda: cbn.jax.batch_norm_train(x, eps=0.0), ValueError, "eps must be positive during training"),
        (lambda: jax.jit(cbn.jax.batch_norm_train)(x, eps=1e-3), TypeError, "^eps: expected a real number, got JitTracer"),
        (lambda: cbn.jax.batch_norm_train(x.astype(complex)), TypeError, "^x: "),
        (lambda: cbn.jax.batch_norm_train(x[0, 0]), ValueError, "^x: "),
        (lambda: cbn.jax.batch_norm_train(x[:1, :, :1]), ValueError, r"Expected more than 1 value per channel .*, got input size \(1, 3, 1\)"),
    ):  # fmt: skip
        for wrap in (lambda f: f, jax.jit):
            with pytest.raises(error, match=message):
                wrap(call)()
    with pytest.raises(jax.errors.JaxRuntimeError, match="ValueError: running_var: .* got -1.0 for channel 1"):
        jax.block_until_ready(jax.jit(cbn.jax.batch_norm)(x, ones, jnp.asarray([1.0, -1.0, 1.0])))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(jax.grad(lambda x: cbn.jax.batch_norm_train(x)[0][0, 0, 0]))(x)


def test_from_threads():
    """That trace the same call at once, and run it."""
    x = np.random.default_rng(0).standard_normal((6, 3, 50)).astype(np.float32)
    with ThreadPoolExecutor(8) as pool:
        ys = list(pool.map(lambda n: jax.jit(lambda x: cbn.jax.batch_norm_train(x, eps=0.03)[0])(x[: n % 4 + 1]), range(64)))
    for n, y in enumerate(ys):
        same(y, cbn.batch_norm_train(x[: n % 4 + 1], eps=0.03)[0])


def test_without_x64():
    """As JAX comes: statistics are float32, and so are float64 arrays."""
    output("""
import cbn.jax
x = np.random.default_rng(0).standard_normal((4, 3)) + 1e3
y, mean, var = cbn.jax.batch_norm_train(x)
stats = cbn.batch_stats(x.astype(np.float32))
assert y.dtype == mean.dtype == var.dtype == np.float32
assert (np.asarray(y) == cbn.batch_norm_train(x.astype(np.float32))[0]).all() and (mean == stats.mean.astype(np.float32)).all()
""")


def test_training_in_a_loop():
    """Two hundred calls, forward and backward, with arrays beyond what is copied or computed at once: each returns, and all agree."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8, 32, 32)), jnp.float32)
    step = jax.jit(jax.grad(lambda x: (cbn.jax.batch_norm_train(x, activation="relu")[0] ** 2).sum()))
    first = np.asarray(step(x))
    for _ in range(200):
        last = step(x)
    same(last, first)


def test_example():
    for name in ("flax", "optax", "sklearn", "tqdm"):
        pytest.importorskip(name, reason="the example imports it")
    example = pathlib.Path(__file__).parents[1] / "examples" / "flax_network.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=True)
    assert "100.0% of the predictions are the same" in done.stdout
