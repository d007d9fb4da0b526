"""Mistakes that type checkers must find, one on each line that ends with "# error"; not run."""

import numpy as np

import cbn

x = np.ones((4, 3), np.float32)
cbn.batch_norm(x)  # error
cbn.batch_norm(x, None, None, axes=1)  # error
cbn.batch_norm_train(x, activation=1.5)  # error
cbn.batch_stats(x, 1)  # error
cbn.BatchNorm1d("3")  # error
layer = cbn.BatchNorm1d(3, on_nonfinite="ignore")  # error
layer.training = "yes"  # error
layer.freeze(3, 4)  # error
cbn.fold_linear(x, None, layer, order="caffe")  # error
cbn.set_num_threads("all")  # error
