from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .statistics import BatchStats, GradientSums

class _Gradients(NamedTuple):
    x: NDArray[Any]
    weight: NDArray[Any] | None
    bias: NDArray[Any] | None

class Gradients(_Gradients):
    residual: NDArray[Any] | None
    def __new__(
        cls, x: NDArray[Any], weight: NDArray[Any] | None, bias: NDArray[Any] | None, residual: NDArray[Any] | None = None
    ) -> Gradients: ...

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
    unbiased: bool = True,
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
    stats: BatchStats | None = None,
    out: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], BatchStats]: ...
def gradient_sums(
    dy: ArrayLike,
    x: ArrayLike,
    stats: BatchStats,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    activation: Activation = None,
    residual: ArrayLike | None = None,
) -> GradientSums: ...
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
    sums: GradientSums | None = None,
    out: NDArray[Any] | None = None,
) -> Gradients: ...
def batch_stats(x: ArrayLike, *, axis: int = 1) -> BatchStats: ...
def array_of(a: ArrayLike, name: str) -> NDArray[Any]: ...
def elements_of(a: ArrayLike, name: str) -> NDArray[Any]: ...
def overlap(a: NDArray[Any], b: NDArray[Any]) -> bool: ...
def checked_flag(value: bool, name: str) -> bool: ...
def checked_number(value: float, name: str) -> float: ...
def checked_real(value: float, name: str) -> float: ...
def checked_integer(value: int, name: str) -> int: ...
def checked_activation(activation: Activation) -> Activation: ...
def plan_of(
    shape: tuple[int, ...], dtype: DTypeLike = ..., axis: int = 1, threads: int = 1, operation: str = "training"
) -> dict[str, int | str | bool]: ...
def check_writeable(a: NDArray[Any], name: str) -> None: ...
def store(pairs: list[tuple[NDArray[Any], NDArray[Any]]]) -> None: ...
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
    foresee: bool = False,
    unbiased: bool = True,
) -> tuple[NDArray[Any], BatchStats]: ...
