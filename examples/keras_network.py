"""Trains a convolutional network for handwritten digits in Keras, with cbn's layer, and runs it in NumPy alone: the predictions are the same.

Keras' backend is PyTorch, unless KERAS_BACKEND names another one: JAX. (On NumPy, Keras only predicts.)
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from network import CLASSES, convolutional, digits

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
    """That network with the weights of a Keras model: its arrays are taken as they are, but for the kernels' order of axes."""
    network = convolutional(seed=0)
    trained = [layer for layer in model.layers if layer.weights]
    for (_, layer), kept in zip(network.trained, trained, strict=True):
        if isinstance(kept, keras.layers.BatchNormalization):
            layer.eps = kept.epsilon        # 1e-3, where PyTorch and cbn have 1e-5
            layer.weight, layer.bias, layer.running_mean, layer.running_var = kept.get_weights()
        else:
            kernel, layer.bias = kept.get_weights()
            kernel = kernel.transpose(2, 0, 1, 3) if kernel.ndim == 4 else kernel     # network.Convolution has the inputs first
            layer.weight = kernel.reshape(-1, kernel.shape[-1])
    return network


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
        print(f"{name}: {same:.1%} of the predictions are the same, the scores at most {abs(others - scores).max():.1e} apart (of {abs(scores).max():.1f})")


if __name__ == "__main__":
    main()
