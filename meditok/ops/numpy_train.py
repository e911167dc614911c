"""The training ops on NumPy arrays: read and written in place by the compiled core, never through torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from meditok import native
from meditok.ops import _native
from meditok.ops._library import plain
from meditok.ops.packed import pack_numpy


def quantize(x: np.ndarray, codebook: np.ndarray, packed: Any, mask: Any, settings: dict[str, Any]) -> tuple:
    """z (N, G, C), ids (N, G) int64, loss float32, counts (G, K) int64 of `vq_quantize`."""
    x, codebook = plain(x), plain(codebook)
    outputs = (
        np.empty(x.shape, x.dtype),
        np.empty(x.shape[:2], np.int64),
        np.empty((), np.float32),
        np.empty(codebook.shape[:2], np.int64),
    )
    packed = pack_numpy(codebook, settings["metric"]) if packed is None else packed
    _native.quantize(x, codebook, packed, mask, settings, outputs, np.empty)
    z, ids, loss, counts = outputs
    return z, ids, loss[()], counts


def stats(x: np.ndarray, ids: np.ndarray, codes: int) -> tuple[np.ndarray, np.ndarray]:
    """counts (G, K) int64 and sums (G, K, C) float32 of `vq_stats`."""
    x, ids = plain(x), plain(ids)
    counts = np.empty((x.shape[1], codes), np.int64)
    sums = np.empty((x.shape[1], codes, x.shape[2]), np.float32)
    _native.stats(x, ids, counts, sums, np.empty)
    return counts, sums


def update(codebook: np.ndarray, arrays: tuple[np.ndarray, ...], settings: dict[str, Any]) -> bool:
    """`vq_update_` with arrays = ema_counts, ema_sums, counts, sums; False, and nothing done, where the core does
    not take them: other types than it reads, foreign byte order or alignment, read-only state."""
    types = (np.float32, np.float32, np.int64, np.float32)
    in_place = all(plain(array) is array for array in (codebook, *arrays))
    writable = all(array.flags.writeable for array in (codebook, *arrays[:2]))
    if native.backend != "native" or not (in_place and writable):
        return False
    if any(array.dtype != wanted for array, wanted in zip(arrays, types, strict=True)):
        return False
    _native.update(codebook, *arrays, settings, np.empty)
    return True
