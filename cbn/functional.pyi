from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, overload

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

# Results are of x's type; those of small integers are float32. What type checkers know nothing of (lists, bfloat16) gives any.
_Float = TypeVar("_Float", np.float16, np.float32, np.float64)

_Activation = str | tuple[str, float] | tuple[str, float, float] | None

@overload
def batch_norm(
    x: NDArray[_Float],
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
    activation: _Activation = None,
    residual: ArrayLike | None = None,
    out: NDArray[_Float] | None = None,
) -> NDArray[_Float]: ...
@overload
def batch_norm(
    x: NDArray[np.integer[Any]],
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
    activation: _Activation = None,
    residual: ArrayLike | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]: ...
@overload
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
    activation: _Activation = None,
    residual: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]: ...
@overload
def batch_norm_train(
    x: NDArray[_Float],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    activation: _Activation = None,
    residual: ArrayLike | None = None,
    stats: BatchStats | Callable[[BatchStats], BatchStats] | None = None,
    out: NDArray[_Float] | None = None,
) -> tuple[NDArray[_Float], BatchStats]: ...
@overload
def batch_norm_train(
    x: NDArray[np.integer[Any]],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    activation: _Activation = None,
    residual: ArrayLike | None = None,
    stats: BatchStats | Callable[[BatchStats], BatchStats] | None = None,
    out: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], BatchStats]: ...
@overload
def batch_norm_train(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    activation: _Activation = None,
    residual: ArrayLike | None = None,
    stats: BatchStats | Callable[[BatchStats], BatchStats] | None = None,
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
    activation: _Activation = None,
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
    activation: _Activation = None,
    residual: ArrayLike | None = None,
    sums: GradientSums | Callable[[GradientSums], GradientSums] | None = None,
    out: NDArray[Any] | None = None,
) -> Gradients: ...
def activate(
    x: ArrayLike,
    activation: _Activation,
    *,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    axis: int = 1,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]: ...
def activate_backward(
    dy: ArrayLike,
    x: ArrayLike,
    activation: _Activation,
    *,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    axis: int = 1,
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
def checked_activation(activation: _Activation) -> _Activation: ...
def plan_of(
    shape: tuple[int, ...], dtype: DTypeLike = ..., axis: int = 1, threads: int = 1, operation: str = "training"
) -> dict[str, int | str | bool]: ...
def new_output(
    shape: tuple[int, ...], dtype: DTypeLike, out: NDArray[Any] | None, read: NDArray[Any], name: str
) -> NDArray[Any]: ...
def normalize_into(y: NDArray[Any], x: NDArray[Any], mean: NDArray[Any], var: NDArray[Any]) -> None: ...
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
    activation: _Activation,
    residual: ArrayLike | None,
    out: NDArray[Any] | None,
    batches: NDArray[np.int64] | None = None,
    accept: Callable[[BatchStats, NDArray[Any] | None, NDArray[Any] | None], bool] | None = None,
    foresee: bool = False,
    unbiased: bool = True,
    merge: Callable[[BatchStats], BatchStats] | None = None,
) -> tuple[NDArray[Any], BatchStats]: ...
