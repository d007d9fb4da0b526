"""cbn.jax beside JAX's own expressions under jit, on layers of ResNet-50: python benchmarks/jax_callbacks.py [--batch N] [--rounds N]

For each layer and operation the median times of both, in milliseconds, and the median of the rounds' ratios: above 1 cbn.jax is faster. The two
take turns. Outputs are new arrays, as is JAX's way.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from contenders.jax import inference, training

import cbn.jax

LAYERS = [(64, 112, 112), (64, 56, 56), (256, 56, 56), (512, 28, 28), (256, 14, 14), (2048, 7, 7)]
AXES, CHANNEL = (0, 2, 3), (1, -1, 1, 1)

FUNCTIONS = {
    "inference": (
        lambda x, weight, bias, mean, var, dy: inference(AXES, CHANNEL, False, x, weight, bias, mean, var),
        lambda x, weight, bias, mean, var, dy: cbn.jax.batch_norm(x, mean, var, weight, bias),
    ),
    "training": (
        lambda x, weight, bias, mean, var, dy: training(AXES, CHANNEL, False, x, weight, bias),
        lambda x, weight, bias, mean, var, dy: cbn.jax.batch_norm_train(x, weight, bias),
    ),
    "training and gradients": (
        lambda x, weight, bias, mean, var, dy: jax.vjp(lambda *a: training(AXES, CHANNEL, False, *a)[0], x, weight, bias)[1](dy),
        lambda x, weight, bias, mean, var, dy: jax.vjp(lambda *a: cbn.jax.batch_norm_train(*a)[0], x, weight, bias)[1](dy),
    ),
}


def seconds(function, arguments, least=0.02):
    """The median time of at least three calls."""
    times = []
    while len(times) < 3 or sum(times) < least:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return np.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rng, ratios = np.random.default_rng(0), {operation: [] for operation in FUNCTIONS}
    print(f"JAX {jax.__version__}, {cbn.get_num_threads()} threads")
    print(f"{'array':>18}  {'operation':<24}{'JAX ms':>10}{'cbn.jax ms':>12}{'ratio':>8}")
    for layer in LAYERS:
        x, dy = (jnp.asarray(rng.standard_normal((arguments.batch, *layer)), jnp.float32) for _ in range(2))
        operands = (x, *jnp.asarray(rng.random((4, layer[0])) + 0.5, jnp.float32), dy)
        for operation, functions in FUNCTIONS.items():
            compiled = [jax.jit(function) for function in functions]
            for a, b in zip(*(jax.tree.leaves(f(*operands)) for f in compiled), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(abs(b).max()))
            times = np.array([[seconds(f, operands) for f in compiled] for _ in range(arguments.rounds)])
            ratio = np.median(times[:, 0] / times[:, 1])
            ratios[operation].append(ratio)
            own, ours = 1e3 * np.median(times, axis=0)
            print(f"{'x'.join(map(str, x.shape)):>18}  {operation:<24}{own:10.3f}{ours:12.3f}{ratio:8.2f}", flush=True)
    for operation, each in ratios.items():
        print(f"{operation}: {np.exp(np.mean(np.log(each))):.2f} in the geometric mean")


if __name__ == "__main__":
    main()
