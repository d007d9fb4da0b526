"""Code as users write it, with the types that checkers must find in it; it is checked by test_stubs.py and also runs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import cbn

x32: NDArray[np.float32] = np.ones((4, 3, 2, 2), np.float32)
x64: NDArray[np.float64] = np.ones((4, 3, 2, 2))
x8: NDArray[np.uint8] = np.ones((4, 3, 2, 2), np.uint8)
mean, var = np.zeros(3), np.ones(3)

assert_type(cbn.batch_norm(x32, mean, var), NDArray[np.float32])
assert_type(cbn.batch_norm(x64, mean, var, activation=("clip", 0, 1), residual=x64), NDArray[np.float64])
assert_type(cbn.batch_norm(x8, mean, var), NDArray[np.float32])
assert_type(cbn.batch_norm([[1.0, 2.0], [3.0, 4.0]], None, None, training=True), NDArray[Any])

y, stats = cbn.batch_norm_train(x32, [1, 2, 3], eps=1e-3, out=np.empty_like(x32))
assert_type(y, NDArray[np.float32])
assert_type(stats, cbn.BatchStats)
assert_type(stats.merge(cbn.batch_stats(x32)).unbiased_var, NDArray[np.float64])
gradients = cbn.batch_norm_backward(y, x32, stats)
dx, dweight, dbias = gradients
assert_type(gradients, cbn.Gradients)
assert_type(cbn.gradient_sums(y, x32, stats).dy, NDArray[np.float64])

layer = cbn.BatchNorm2d(3, momentum=None, activation="silu", on_nonfinite="skip").train()
assert_type(layer, cbn.BatchNorm2d)
assert_type(layer(x32), NDArray[np.float32])
assert_type(layer.backward(y), NDArray[np.float32])
layer.weight -= 0.1 * layer.weight_grad
layer.weight = [1, 2, 3]
layer.momentum, layer.activation = 0.1, None
assert_type(layer.eps, float)
assert_type(layer.state_dict(), dict[str, NDArray[Any]])
missing, unexpected = layer.load_state_dict({"running_mean": [0, 0, 0]}, strict=False)
assert_type(missing, list[Any])

with cbn.num_threads(2):
    folded = cbn.fold_linear(np.ones((5, 3), np.float32), None, layer.eval(), before=True)
assert_type(folded.change, float)
assert_type(cbn.normalize_images(x8.reshape(4, 2, 2, 3), [0, 0, 0], [1, 1, 1], layout="channels_last"), NDArray[Any])
