"""Trains a convolutional network for handwritten digits in Flax, and runs it in NumPy alone, by cbn: the predictions are the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from network import BATCH, CLASSES, convolutional_of, digits
from tqdm import tqdm

import cbn

EPOCHS = 5


class InFlax(nn.Module):
    """The network of network.convolutional."""

    @nn.compact
    def __call__(self, x, training):
        x = nn.Conv(16, (3, 3), padding=1)(x)
        x = nn.relu(nn.BatchNorm(momentum=0.9, use_running_average=not training)(x))
        x = nn.Conv(32, (3, 3), 2, padding=1)(x)
        x = nn.relu(nn.BatchNorm(momentum=0.9, use_running_average=not training)(x))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


def train(x, labels):
    """Flax' variables, trained on the images x."""
    model, optimizer = InFlax(), optax.adam(3e-3)
    variables = model.init(jax.random.key(0), x[:1], training=False)

    @jax.jit
    def step(variables, state, x, labels):
        def loss(params):
            scores, updates = model.apply({**variables, "params": params}, x, training=True, mutable="batch_stats")
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean(), updates

        gradients, updates = jax.grad(loss, has_aux=True)(variables["params"])
        changes, state = optimizer.update(gradients, state)
        return {"params": optax.apply_updates(variables["params"], changes), **updates}, state

    state = optimizer.init(variables["params"])
    rng = np.random.default_rng(0)
    for _ in tqdm(range(EPOCHS), desc="epochs"):
        for batch in rng.permutation(len(x)).reshape(-1, BATCH):
            variables, state = step(variables, state, x[batch], labels[batch])
    return variables


def in_numpy(variables):
    """That network with Flax' variables."""
    kernels = [(variables["params"][name]["kernel"], variables["params"][name]["bias"]) for name in ("Conv_0", "Conv_1", "Dense_0")]
    return convolutional_of(cbn.from_flax(variables, momentum=0.9).values(), kernels)


def main():
    x_train, labels_train, x_test, labels_test = digits(seed=0)
    variables = train(x_train.reshape(-1, 8, 8, 1), labels_train)
    scores = InFlax().apply(variables, jnp.asarray(x_test.reshape(-1, 8, 8, 1)), training=False)
    scores = np.asarray(scores)
    print(f"Flax: {np.mean(scores.argmax(axis=1) == labels_test):.1%} of {len(x_test)} digits are right")
    others = in_numpy(variables).infer(x_test)
    same = np.mean(others.argmax(axis=1) == scores.argmax(axis=1))
    apart = abs(others - scores).max() / abs(scores).max()
    print(f"NumPy: {same:.1%} of the predictions are the same, the scores at most {apart:.1e} of the largest apart")


if __name__ == "__main__":
    main()
