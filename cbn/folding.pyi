from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .layers import BatchNorm

DEPTHWISE: str

_Normalization = BatchNorm | tuple[ArrayLike, ArrayLike, ArrayLike | None, ArrayLike | None, float]

class Folded(NamedTuple):
    weight: NDArray[Any]
    bias: NDArray[Any]
    change: float

def rounded(a: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]: ...
def at_inference(bn: _Normalization, channels: int, where: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]: ...
def fold_conv(
    weight: ArrayLike,
    bias: ArrayLike | None,
    bn: _Normalization,
    *,
    order: Literal["torch", "tensorflow", "tensorflow_depthwise"] = "torch",
    groups: int = 1,
    transposed: bool = False,
    before: bool = False,
    padding: int | Sequence[int] | str | None = None,
) -> Folded: ...
def fold_linear(
    weight: ArrayLike, bias: ArrayLike | None, bn: _Normalization, *, order: Literal["torch", "tensorflow"] = "torch", before: bool = False
) -> Folded: ...
