from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from typing_extensions import Self

from .functional import _Activation, _Float
from .states import IncompatibleKeys

_Got = TypeVar("_Got")
_Given = TypeVar("_Given")

class _Checked(Generic[_Got, _Given]):
    def __get__(self, layer: object, owner: type | None = None) -> _Got: ...
    def __set__(self, layer: object, value: _Given) -> None: ...

# None where there is none; or Any, so that code that knows that there is one need not say so.
_Array = NDArray[Any] | Any
_Policy = Literal["propagate", "skip", "raise"]
_Frozen = Literal["statistics", "all"] | None

class BatchNorm:
    num_features: _Checked[int, int]
    dtype: _Checked[np.dtype[Any], DTypeLike]
    stats_dtype: _Checked[np.dtype[Any], DTypeLike]
    weight: _Checked[_Array, ArrayLike | None]
    bias: _Checked[_Array, ArrayLike | None]
    running_mean: _Checked[_Array, ArrayLike | None]
    running_var: _Checked[_Array, ArrayLike | None]
    num_batches_tracked: _Checked[_Array, ArrayLike | None]
    affine: _Checked[bool, bool]
    track_running_stats: _Checked[bool, bool]
    training: _Checked[bool, bool]
    unbiased: _Checked[bool, bool]
    reduce_grads: _Checked[bool, bool]
    eps: _Checked[float, float]
    momentum: _Checked[float | None, float | None]
    axis: _Checked[int, int]
    activation: _Checked[_Activation, _Activation]
    on_nonfinite: _Checked[_Policy, _Policy]
    frozen: _Checked[_Frozen, _Frozen]
    weight_grad: _Array
    bias_grad: _Array
    residual_grad: _Array
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        weight: bool = True,
        bias: bool = True,
        axis: int = 1,
        unbiased: bool = True,
        activation: _Activation = None,
        dtype: DTypeLike = ...,
        stats_dtype: DTypeLike | None = None,
        on_nonfinite: _Policy = "propagate",
        frozen: _Frozen = None,
        comm: Any = None,
        reduce_grads: bool = False,
    ) -> None: ...
    @property
    def comm(self) -> Any: ...
    @comm.setter
    def comm(self, comm: Any) -> None: ...
    def config(self) -> dict[str, Any]: ...
    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self: ...
    @overload
    def __call__(self, x: NDArray[_Float], *, residual: ArrayLike | None = None, out: NDArray[_Float] | None = None) -> NDArray[_Float]: ...
    @overload
    def __call__(
        self, x: NDArray[np.integer[Any]], *, residual: ArrayLike | None = None, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]: ...
    @overload
    def __call__(self, x: ArrayLike, *, residual: ArrayLike | None = None, out: NDArray[Any] | None = None) -> NDArray[Any]: ...
    @overload
    def backward(self, dy: NDArray[_Float], *, out: NDArray[_Float] | None = None, retain: bool = False) -> NDArray[_Float]: ...
    @overload
    def backward(self, dy: ArrayLike, *, out: NDArray[Any] | None = None, retain: bool = False) -> NDArray[Any]: ...
    def freeze(self, affine: bool = True) -> Self: ...
    def unfreeze(self) -> Self: ...
    def train(self, mode: bool = True) -> Self: ...
    def eval(self) -> Self: ...
    def reset_running_stats(self) -> None: ...
    def reset_parameters(self) -> None: ...
    def state_dict(self) -> dict[str, NDArray[Any]]: ...
    def load_state_dict(self, state_dict: Mapping[str, ArrayLike], strict: bool = True) -> IncompatibleKeys: ...
    def __copy__(self) -> Self: ...
    def __getstate__(self) -> dict[str, Any]: ...
    def __setstate__(self, state: dict[str, Any]) -> None: ...

class BatchNorm1d(BatchNorm): ...
class BatchNorm2d(BatchNorm): ...
class BatchNorm3d(BatchNorm): ...

def overwritten(out: NDArray[Any] | None, *arrays: NDArray[Any] | None) -> bool: ...
