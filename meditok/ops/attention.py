"""Attention over packed or separate projections.

attention(q, k, v) == F.scaled_dot_product_attention(q, k, v), a fully masked row giving 0 with zero gradient
attention_qkv(qkv) == the same for qkv (B, N, 3, H, D), heads joined to (B, N, H * D) or averaged to (B, N, D)
with q (B, H, N, D), k and v (B, H, M, D).
"""

from __future__ import annotations

from typing import Any

import torch

from meditok.errors import DtypeError, ShapeError
from meditok.ops import reference
from meditok.ops._cupy import on_torch
from meditok.ops._library import check_float, check_rank, check_same_device, kind_of, library, to_torch
from meditok.ops.quantize import _arrays

# ---- checks ------------------------------------------------------------------------------------------------


def _check_attention(q: Any, k: Any, v: Any, attn_mask: Any, is_causal: bool) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_rank(name, array, "(B, H, N, D)")
        check_float(name, array)
    if not q.dtype == k.dtype == v.dtype:
        raise DtypeError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; one dtype is needed")
    same = q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == k.shape[3] == v.shape[3]
    if not same or k.shape[2] != v.shape[2]:
        raise ShapeError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; "
            "(B, H, N, D), (B, H, M, D) and (B, H, M, D) are needed"
        )
    if attn_mask is not None and is_causal:
        raise ShapeError("attn_mask and is_causal=True were both given; fold the causal part into the mask")
    if attn_mask is not None and str(attn_mask.dtype) not in ("torch.bool", "bool", str(q.dtype)):
        raise DtypeError(f"attn_mask has dtype {attn_mask.dtype}; bool (True = attend) or {q.dtype} is needed")
    scores = (*q.shape[:3], k.shape[2])
    if attn_mask is not None and not _broadcasts(tuple(attn_mask.shape), scores):
        raise ShapeError(
            f"attn_mask has shape {tuple(attn_mask.shape)}; two to four axes that broadcast to {scores}, "
            "(B, H, N, M), are needed"
        )


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether `shape` has two axes at least and expands to `target`."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return 2 <= len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in pairs)


# ---- schema and kernels ------------------------------------------------------------------------------------

library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask=None, *, "
    "bool is_causal=False, float? scale=None) -> Tensor"
)
library.define("attention_qkv(Tensor qkv, *, bool is_causal=False, float? scale=None, str? reduce=None) -> Tensor")
# Composite: PyTorch derives fake, autograd and vmap from the reference itself.
library.impl("attention", reference.attention, "CompositeImplicitAutograd")
library.impl("attention_qkv", reference.attention_qkv, "CompositeImplicitAutograd")

# ---- public ------------------------------------------------------------------------------------------------


def attention(
    q: Any, k: Any, v: Any, attn_mask: Any = None, *, is_causal: bool = False, scale: float | None = None
) -> Any:
    """Scaled dot-product attention: q (B, H, N, D), k and v (B, H, M, D) -> (B, H, N, D), strided as (B, N,
    H, D).

    attn_mask broadcasts to (B, H, N, M): bool with True = attend, or floats added to the scores. A row
    without any key gives 0 with zero gradient. Causal masks align at the top left. Raises ShapeError,
    DtypeError, TypeError.
    """
    kind = kind_of(q, k, v, attn_mask)
    _check_attention(q, k, v, attn_mask, is_causal)
    if kind == "cupy":
        return on_torch(torch.ops.meditok.attention, q, k, v, attn_mask, is_causal=is_causal, scale=scale)
    if kind == "numpy":
        mask = None if attn_mask is None else to_torch(attn_mask)
        out = reference.attention(to_torch(q), to_torch(k), to_torch(v), mask, is_causal=is_causal, scale=scale)
        return _arrays((out,))[0]
    check_same_device(q=q, k=k, v=v, attn_mask=attn_mask)
    return torch.ops.meditok.attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale)


def attention_qkv(qkv: Any, *, is_causal: bool = False, scale: float | None = None, reduce: str | None = None) -> Any:
    """Self-attention of packed projections: qkv (B, N, 3, H, D) -> (B, N, H * D), or (B, N, D) with
    reduce="mean".

    Raises ShapeError, DtypeError, and ValueError for another `reduce`.
    """
    kind = kind_of(qkv)
    check_rank("qkv", qkv, "(B, N, 3, H, D)")
    check_float("qkv", qkv)
    if qkv.shape[2] != 3:
        raise ShapeError(f"qkv has shape {tuple(qkv.shape)}; (B, N, 3, H, D) is needed")
    if reduce not in (None, "mean"):
        raise ValueError(f"reduce={reduce!r} is not one of None, 'mean'")
    if kind == "cupy":
        return on_torch(torch.ops.meditok.attention_qkv, qkv, is_causal=is_causal, scale=scale, reduce=reduce)
    if kind == "numpy":
        out = reference.attention_qkv(to_torch(qkv), is_causal=is_causal, scale=scale, reduce=reduce)
        return _arrays((out,))[0]
    return torch.ops.meditok.attention_qkv(qkv, is_causal=is_causal, scale=scale, reduce=reduce)
