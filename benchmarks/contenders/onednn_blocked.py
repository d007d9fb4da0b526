"""oneDNN in its own layout nChw16c, blocks of 16 channels: a mark to compare with, since NumPy arrays would have to be reordered for it."""

import ctypes

import numpy as np

from . import Cannot, aligned, onednn
from .onednn import F32, Dims, create, dnnl, versions  # noqa: F401

dnnl.dnnl_fmt_tag2str.restype = ctypes.c_char_p
BLOCK = 16


def descriptor(cell):
    tag = next(number for number in range(2000) if dnnl.dnnl_fmt_tag2str(number) == b"aBcd16b")  # the number depends on the version
    return create("dnnl_memory_desc_create_with_tag", 4, Dims(cell.batch, cell.channels, cell.spatial, 1), F32, tag)


def prepare(cell):
    if cell.spatial == 1:
        raise Cannot("has no blocked layout for (N, C)")
    n, c, s = cell.batch, cell.channels, cell.spatial
    blocks = -(-c // BLOCK)

    def load(array):
        """Reorder to (N, C / 16, S, 16); the last block is filled up with zeros, as oneDNN expects."""
        padded = np.zeros((n, s, blocks * BLOCK), np.float32)
        padded[..., :c] = array.reshape(n, s, c) if cell.layout == "last" else array.reshape(n, c, s).transpose(0, 2, 1)
        reordered = aligned((n, blocks, s, BLOCK))
        reordered[...] = padded.reshape(n, s, blocks, BLOCK).transpose(0, 2, 1, 3)
        return reordered

    def unload(array):
        rows = array.transpose(0, 2, 1, 3).reshape(n, s, blocks * BLOCK)[..., :c]
        return rows if cell.layout == "last" else rows.transpose(0, 2, 1)

    return onednn.prepare(cell, descriptor, load, unload)
