"""Images as decoders give them, turned into what a vision network wants."""

import numpy as np

from .functional import array_of, checked_real, elements_of, new_output, normalize_into
from .words import show


def _per_channel(a, name, channels):
    array = array_of(a, name)
    if array.shape != (channels,):
        raise ValueError(f"{name}: expected shape ({channels},), a value for each channel, got {array.shape}")
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected an array of real numbers, got {array.dtype}")
    with np.errstate(all="ignore"):
        array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, got {array}")
    return array


def normalize_images(images, mean, std, *, scale=1 / 255, layout="channels_first", dtype=None, out=None):
    """The step before a vision network: y = (images * scale - mean) / std in each channel, and its layout, in one pass.

    images : array of shape (N, H, W, C) or (H, W, C), as decoders give them; uint8, or any other type but float64. May be a view: `images[..., ::-1]`
        turns BGR into RGB, and slices crop, at no cost.
    mean, std : shape (C,), in units of images * scale, as in torchvision; std > 0.
    scale : number > 0; 1/255 takes uint8 to [0, 1].
    layout : "channels_first": y has shape (N, C, H, W) or (C, H, W); "channels_last": that of `images`.
    dtype : of y: float32, float16 or bfloat16 (of ml_dtypes); None: that of `out`, or float32.
    out : array to write, which must not overlap `images`; None: a new one.
    Returns y: within 2 units in the last place of float32 (of the largest |y|), rounded once more where it is narrower.
    Raises ValueError or TypeError, having written nothing.
    """
    x = elements_of(images, "images")
    if x.dtype == np.float64:
        raise TypeError("images: expected an array of uint8, int8, uint16, int16, float16, bfloat16 or float32, got float64")
    if x.ndim not in (3, 4):
        raise ValueError(f"images: expected shape (N, H, W, C) or (H, W, C), got {x.shape}")
    channels = x.shape[-1]
    mean, std = _per_channel(mean, "mean", channels), _per_channel(std, "std", channels)
    if not (std > 0).all():
        raise ValueError(f"std: expected positive values, got {std.min()}")
    scale = checked_real(scale, "scale")
    if not 0 < scale < np.inf:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if not isinstance(layout, str) or layout not in ("channels_first", "channels_last"):
        raise ValueError(f"layout: expected 'channels_first' or 'channels_last', got {show(layout)}")
    given = dtype
    try:
        dtype = np.dtype((out.dtype if isinstance(out, np.ndarray) else np.float32) if dtype is None else dtype)
    except Exception:
        dtype = None
    if dtype is None or dtype not in (np.float32, np.float16) and dtype.name != "bfloat16":
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {show(given) if dtype is None else dtype}")
    first = layout == "channels_first"
    y = new_output((*x.shape[:-3], channels, *x.shape[-3:-1]) if first else x.shape, dtype, out, x, "images")
    as_batch = lambda a: a if a.ndim == 4 else a[None]
    with np.errstate(all="ignore"):
        mean, var = mean / scale, (std / scale) ** 2
    normalize_into(as_batch(y) if first else np.moveaxis(as_batch(y), -1, 1), np.moveaxis(as_batch(x), -1, 1), mean, var)
    return y
