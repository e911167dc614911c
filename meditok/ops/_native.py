"""Calls into `meditok._core`: pointers, element strides and dtype codes of torch, NumPy and CuPy arrays.

Nothing is converted and nothing checked here; results are allocated contiguous by the caller's kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from meditok import native
from meditok.ops._library import FLOAT_NAMES, FLOATS, METRICS


def _view(array: Any) -> tuple[int, tuple[int, ...]]:
    """(address, strides in elements) of any array."""
    if isinstance(array, Tensor):
        return array.data_ptr(), array.stride()
    size = array.dtype.itemsize
    if isinstance(array, np.ndarray):
        return array.__array_interface__["data"][0], tuple(stride // size for stride in array.strides)
    return array.data.ptr, tuple(stride // size for stride in array.strides)  # CuPy


def _dtype(array: Any) -> int:
    return FLOATS[array.dtype] if isinstance(array, Tensor) else FLOAT_NAMES[array.dtype.name]


def _place(array: Any) -> tuple[int, int] | None:
    """(device, stream) of a CUDA array, None for one in main memory."""
    if isinstance(array, Tensor):
        if not array.is_cuda:
            return None
        return array.device.index, torch.cuda.current_stream(array.device).cuda_stream
    if isinstance(array, np.ndarray):
        return None
    import cupy

    return array.device.id, cupy.cuda.get_current_stream().ptr


def packed_bytes(groups: int, codes: int, width: int) -> int:
    """Size of a packed codebook; the same formula as `packed_layout` in csrc/vq/vq.h, asserted by a test."""
    align = 64
    tiles = -(-codes // 32)

    def padded(count: int) -> int:
        return -(-count // align) * align

    per_group = (
        align + padded(tiles * width * 32 * 4) + 2 * padded(tiles * 32 * 4) + padded(tiles * 4) + padded(codes * 8)
    )
    return align + groups * per_group


def pack(codebook: Any, metric: str, out: Any) -> None:
    """codebook (G, K, C) -> out, uint8 of `packed_bytes`."""
    address, strides = _view(codebook)
    arguments = (address, _dtype(codebook), *codebook.shape, *strides, METRICS[metric], _view(out)[0])
    place = _place(codebook)
    if place is None:
        native.core.vq_pack(*arguments, native.threads())
    else:
        native.core.vq_pack_cuda(*arguments, *place)


def assign(x: Any, codebook: Any, packed: Any, metric: str, ids: Any) -> None:
    """x (N, G, C), codebook (G, K, C), packed bytes of it -> ids (N, G) int64 contiguous."""
    x_address, x_strides = _view(x)
    address, strides = _view(codebook)
    arguments = (
        *(x_address, _dtype(x), *x.shape, *x_strides),
        *(address, _dtype(codebook), codebook.shape[1], *strides),
        *(_view(packed)[0], METRICS[metric], _view(ids)[0]),
    )
    place = _place(x)
    if place is None:
        native.core.vq_assign(*arguments, native.threads())
    else:
        native.core.vq_assign_cuda(*arguments, *place)


def lookup(ids: Any, codebook: Any, metric: str, out: Any) -> None:
    """ids (N, G) int64, codebook (G, K, C) -> out (N, G, C) contiguous, of the codebook's dtype."""
    ids_address, ids_strides = _view(ids)
    address, strides = _view(codebook)
    arguments = (
        *(ids_address, ids.shape[0], *ids_strides),
        *(address, _dtype(codebook), *codebook.shape, *strides),
        *(METRICS[metric], _view(out)[0]),
    )
    place = _place(codebook)
    if place is None:
        native.core.vq_lookup(*arguments, native.threads())
    else:
        native.core.vq_lookup_cuda(*arguments, *place)
