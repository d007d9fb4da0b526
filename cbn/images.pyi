from typing import Any, Literal

from numpy.typing import ArrayLike, DTypeLike, NDArray

def normalize_images(
    images: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike,
    *,
    scale: float = ...,
    layout: Literal["channels_first", "channels_last"] = "channels_first",
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]: ...
