"""Flax' networks, drawn: weights taken over, outputs and training that goes on agree with Flax' own; and weights handed back."""

import numpy as np
import perceptron
import pytest

import cbn

jax = pytest.importorskip("jax", reason="compares with Flax' networks")
pytest.importorskip("flax", reason="compares with Flax' networks")
from flax import linen, nnx
from jax import numpy as jnp


@pytest.fixture(autouse=True)
def in_float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


class Net(linen.Module):
    hidden: tuple

    @linen.compact
    def __call__(self, x, train):
        options = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        for width, eps, momentum, scale, bias in self.hidden:
            x = linen.Dense(width, **options)(x)
            x = linen.relu(linen.BatchNorm(not train, epsilon=eps, momentum=1 - momentum, use_scale=scale, use_bias=bias, **options)(x))
        return linen.Dense(perceptron.OUTPUTS, **options)(x)


def train(net, variables, data):
    def loss(params, stats, x, target):
        y, changed = net.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        return ((y - target) ** 2).mean(), changed["batch_stats"]

    @jax.jit
    def step(params, *others):
        gradients, stats = jax.grad(loss, has_aux=True)(params, *others)
        return jax.tree.map(lambda a, g: a - perceptron.RATE * g, params, gradients), stats

    params, stats = variables["params"], variables["batch_stats"]
    for x, target in data:
        params, stats = step(params, stats, x, target)
    return {"params": params, "batch_stats": stats}


@pytest.mark.parametrize("seed", range(5))
def test_training_goes_on(seed):
    rng, hidden = perceptron.drawn(seed)
    net = Net(tuple(hidden))
    x = rng.normal(1, 2, (5, perceptron.INPUTS))
    infer = jax.jit(lambda variables, x: net.apply(variables, x, False))
    init = jax.jit(lambda key, x: net.init(key, x, True))
    variables = train(net, init(jax.random.key(seed), x), perceptron.batches(rng))
    norms, layers = cbn.from_flax(variables), {}
    assert len(norms) == len(hidden)
    for i, (_, eps, momentum, _, _) in enumerate(hidden):
        norm = norms[f"BatchNorm_{i}"]
        norm.eps, norm.momentum, norm.activation = eps, momentum, "relu"  # of which variables say nothing
        layers |= {
            f"Dense_{i}": perceptron.Dense(*(variables["params"][f"Dense_{i}"][key] for key in ("kernel", "bias"))),
            f"BatchNorm_{i}": norm,
        }
    last = f"Dense_{len(hidden)}"
    layers[last] = perceptron.Dense(*(variables["params"][last][key] for key in ("kernel", "bias")))
    perceptron.close(perceptron.forward(layers, x), infer(variables, x))
    data = perceptron.batches(rng)
    perceptron.train(layers, data)
    variables = train(net, variables, data)
    back = cbn.to_flax(norms)
    for collection in ("params", "batch_stats"):
        for name, arrays in back[collection].items():
            assert arrays.keys() == variables[collection][name].keys()
            for key, array in arrays.items():
                perceptron.close(array, variables[collection][name][key], 1e-8)
    perceptron.close(perceptron.forward(layers, x), infer(variables, x), 1e-8)
    handed_back = {"params": variables["params"] | back["params"], "batch_stats": back["batch_stats"]}
    perceptron.close(infer(handed_back, x), infer(variables, x), 1e-8)


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"axis": 1}, {"param_dtype": jnp.bfloat16}], ids=str)
def test_nnx(options):
    class Block(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
            self.bn = nnx.BatchNorm(4, rngs=nnx.Rngs(0), use_running_average=False, **options)

    block = Block()
    x = np.random.default_rng(1).normal(1, 2, (5, 4, 4, 4)).astype(np.float32)
    block.bn(x)
    for state in (nnx.state(block), nnx.to_pure_dict(nnx.state(block))):
        layer = cbn.from_flax(state, axis=options.get("axis", -1))["bn"]
        assert (layer.weight is None) == ("use_scale" in options)
        perceptron.close(layer(x), block.bn(x, use_running_average=True), 1e-5)
        layer.train()(x)
    block.bn(x)
    perceptron.close(layer.running_var, block.bn.var[...], 1e-5)
