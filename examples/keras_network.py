"""Trains a convolutional network for handwritten digits in Keras, with cbn's layer, and runs it in NumPy alone: the predictions are the same.

Keras' backend is PyTorch, unless KERAS_BACKEND names another one: JAX. (On NumPy, Keras only predicts.)
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from network import CLASSES, convolutional_of, digits

import cbn.keras


def in_keras(normalization):
    """The network of network.convolutional, with batch normalizations of this class."""
    return keras.Sequential([
        keras.Input((8, 8, 1)),
        keras.layers.ZeroPadding2D(),
        keras.layers.Conv2D(16, 3),
        normalization(momentum=0.9),
        keras.layers.ReLU(),
        keras.layers.ZeroPadding2D(),
        keras.layers.Conv2D(32, 3, strides=2),
        normalization(momentum=0.9),
        keras.layers.ReLU(),
        keras.layers.Flatten(),
        keras.layers.Dense(CLASSES),
    ])  # fmt: skip


def in_numpy(model):
    """That network with the weights of a Keras model."""
    kernels = [layer.get_weights() for layer in model.layers if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))]
    return convolutional_of(cbn.from_keras(model).values(), kernels)


def main():
    keras.utils.set_random_seed(0)
    x_train, labels_train, x_test, labels_test = digits(seed=0)
    images = x_test.reshape(-1, 8, 8, 1)
    model = in_keras(cbn.keras.BatchNormalization)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x_train.reshape(-1, 8, 8, 1), labels_train, batch_size=60, epochs=5, verbose=2)
    scores = model.predict(images, verbose=0)
    print(f"Keras with cbn's layer: {np.mean(scores.argmax(axis=1) == labels_test):.1%} of {len(images)} digits are right")

    own = in_keras(keras.layers.BatchNormalization)
    own.set_weights(model.get_weights())
    for name, others in (("Keras with its own layer", own.predict(images, verbose=0)), ("NumPy", in_numpy(model).infer(x_test))):
        same = np.mean(others.argmax(axis=1) == scores.argmax(axis=1))
        apart = abs(others - scores).max() / abs(scores).max()
        print(f"{name}: {same:.1%} of the predictions are the same, the scores at most {apart:.1e} of the largest apart")


if __name__ == "__main__":
    main()
