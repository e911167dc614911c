"""`pack_codebook`: a codebook in the layout the kernels read, made once instead of in every call.

Equals the codebook itself in every op; only the time differs. Stale packing is the caller's duty: pack again
after the codebook changes (modules drop theirs on update and load).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meditok import native
from meditok.ops import _native
from meditok.ops._cupy import on_torch
from meditok.ops._library import check_float, check_metric, check_rank, kind_of, library, plain


@dataclass(eq=False)
class PackedCodebook:
    """codebook (G, K, C) of any kind, its metric, and the packed bytes (None where the reference runs)."""

    codebook: Any
    metric: str
    packed: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codebook.shape)

    @property
    def dtype(self) -> Any:
        return self.codebook.dtype

    @property
    def device(self) -> Any:
        return self.codebook.device


library.define("vq_pack(Tensor codebook, *, str metric) -> Tensor")


def _bytes_needed(codebook: Tensor) -> int:
    on_kernel = native.backend == "native" and (
        codebook.device.type == "cpu"
        or (codebook.device.type == "cuda" and native.cuda_usable(codebook.device.index or 0))
    )
    return _native.packed_bytes(*codebook.shape) if on_kernel else 0


def _pack(codebook: Tensor, *, metric: str) -> Tensor:
    packed = torch.empty(_bytes_needed(codebook), dtype=torch.uint8, device=codebook.device)
    if packed.numel():
        _native.pack(codebook, metric, packed)
    return packed


library.impl("vq_pack", _pack, "CompositeExplicitAutograd")


@torch.library.register_fake("meditok::vq_pack", lib=library)
def _pack_fake(codebook: Tensor, *, metric: str) -> Tensor:
    return torch.empty(_bytes_needed(codebook), dtype=torch.uint8, device=codebook.device)


def pack_codebook(codebook: Any, *, metric: str = "cosine") -> PackedCodebook:
    """codebook (G, K, C) -> PackedCodebook, accepted wherever a codebook is (with the same metric).

    Raises ShapeError, DtypeError, or ValueError for an unknown metric.
    """
    check_metric(metric)
    kind = kind_of(codebook)
    check_rank("codebook", codebook, "(G, K, C)")
    check_float("codebook", codebook)
    if kind == "torch":
        return PackedCodebook(codebook, metric, torch.ops.meditok.vq_pack(codebook.detach(), metric=metric))
    if kind == "numpy":
        return PackedCodebook(codebook, metric, pack_numpy(codebook, metric))
    return PackedCodebook(codebook, metric, on_torch(torch.ops.meditok.vq_pack, codebook, metric=metric))


def pack_numpy(codebook: np.ndarray, metric: str) -> np.ndarray | None:
    if native.backend != "native":
        return None
    size = _native.packed_bytes(*codebook.shape)
    packed = np.empty(size + 64, dtype=np.uint8)
    start = -packed.__array_interface__["data"][0] % 64  # vectors are read 64 bytes at a time
    packed = packed[start : start + size]
    _native.pack(plain(codebook), metric, packed)
    return packed


def split(codebook: Any, metric: str) -> tuple[Any, Any]:
    """(codebook array, its packed bytes or None) of an array or a PackedCodebook."""
    if not isinstance(codebook, PackedCodebook):
        return codebook, None
    if codebook.metric != metric:
        raise ValueError(f"the codebook was packed for metric={codebook.metric!r}, but metric={metric!r} was asked for")
    return codebook.codebook, codebook.packed
