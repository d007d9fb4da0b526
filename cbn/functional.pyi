from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .statistics import BatchStats

class _Gradients(NamedTuple):
    x: NDArray[Any]
    weight: NDArray[Any] | None
    bias: NDArray[Any] | None

class Gradients(_Gradients):
    residual: NDArray[Any] | None

Activation = str | tuple[str, float] | tuple[str, float, float] | None

def batch_norm(
    x: ArrayLike,
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]: ...
def batch_norm_train(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], BatchStats]: ...
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    stats: BatchStats | tuple[ArrayLike, ArrayLike],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    training: bool = True,
    affine_grad: bool = True,
    activation: Activation = None,
    residual: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> Gradients: ...
def batch_stats(x: ArrayLike, *, axis: int = 1) -> BatchStats: ...
def array_of(a: ArrayLike, name: str) -> NDArray[Any]: ...
def forward_training(
    x: ArrayLike,
    running_mean: NDArray[np.floating[Any]] | None,
    running_var: NDArray[np.floating[Any]] | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    momentum: float,
    eps: float,
    axis: int,
    activation: Activation,
    residual: ArrayLike | None,
    out: NDArray[Any] | None,
    batches: NDArray[np.int64] | None = None,
    accept: Callable[[BatchStats, NDArray[Any] | None, NDArray[Any] | None], bool] | None = None,
) -> tuple[NDArray[Any], BatchStats]: ...
