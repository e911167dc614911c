"""Attention over packed or separate projections.

attention(q, k, v) == F.scaled_dot_product_attention(q, k, v), a fully masked row giving 0 with zero gradient
attention_qkv(qkv) == the same for qkv (B, N, 3, H, D), heads joined to (B, N, H * D) or averaged to (B, N, D)
with q (B, H, N, D), k and v (B, H, M, D).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from meditok import native
from meditok.errors import DtypeError, ShapeError
from meditok.ops import _native, reference
from meditok.ops._cupy import on_torch
from meditok.ops._library import (
    check_float,
    check_rank,
    check_same_device,
    dtype_name,
    kind_of,
    library,
    plain,
    refuse_second_derivative,
    to_torch,
)
from meditok.ops.quantize import one_by_one

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
    if attn_mask is not None and dtype_name(attn_mask) not in ("bool", dtype_name(q)):
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


# ---- which backend -----------------------------------------------------------------------------------------


def _by_kernel(array: Any, mask_needed: bool = False) -> bool:
    """Whether the compiled kernels take this input; PyTorch's own attention, by the reference, takes the others."""
    if dtype_name(array) == "float64" or mask_needed:
        return False  # MKL's products in float64, and the gradient to an additive mask, are PyTorch's
    if isinstance(array, Tensor) and array.device.type == "cuda":
        return array.shape[-1] <= 128 and _cuda_kernels(array.device.index)  # wider heads: PyTorch's
    return native.backend == "native" and native.isa != "neon"  # on Arm PyTorch beats the scalar loop


def _cuda_kernels(device: int) -> bool:
    return native.cuda_backend(device) == "native"


# What torch.compiler.assume_constant_result sets; calling it would import all of dynamo with meditok.
_cuda_kernels._dynamo_marked_constant = True


# ---- schema and kernels ------------------------------------------------------------------------------------
# Beside the result come the row statistics lse (B, H, N) float32, log sum exp of the scores, for the backward; empty,
# (B, H, 0), where PyTorch's attention ran, whose backward runs it again.

library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask=None, *, "
    "bool is_causal=False, float? scale=None) -> (Tensor, Tensor)"
)
library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor out, Tensor lse, *, "
    "bool is_causal, float? scale, bool mask_needed=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "attention_qkv(Tensor qkv, *, bool is_causal=False, float? scale=None, str? reduce=None) -> (Tensor, Tensor)"
)
library.define(
    "attention_qkv_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, *, "
    "bool is_causal, float? scale, str? reduce) -> Tensor"
)


def _by_heads(out: Tensor, heads: int) -> Tensor:
    """(B, N, H * D) seen as (B, H, N, D); a mean over heads (B, N, D) as it is."""
    return out.unflatten(-1, (heads, -1)).transpose(1, 2)


def _settings(
    width: int, *, is_causal: bool = False, scale: float | None = None, reduce: str | None = None
) -> dict[str, Any]:
    if scale is None:
        scale = width**-0.5 if width else 1.0
    return {"is_causal": is_causal, "scale": float(scale), "mean": reduce == "mean"}


def _expanded(mask: Any, q: Any, k: Any) -> Any:
    """The mask as (B, H, N, M), its broadcast axes with stride 0."""
    shape = (*q.shape[:3], k.shape[2])
    if mask is None:
        return None
    return mask.expand(shape) if isinstance(mask, Tensor) else np.broadcast_to(mask, shape)


def _no_lse(q: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:2], 0), dtype=torch.float32)


# The kernels take the options of the schema, whose defaults the dispatcher leaves out.


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    if not _by_kernel(q):
        return reference.attention(q, k, v, attn_mask, **options), _no_lse(q)
    batch, heads, queries, width = q.shape
    out = q.new_empty((batch, queries, heads, width)).transpose(1, 2)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    _native.attention(q, k, v, _expanded(attn_mask, q, k), _settings(width, **options), out, lse)
    return out, lse


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    mask_needed: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _by_kernel(q, mask_needed):
        return reference.attention_backward(grad, q, k, v, attn_mask, mask_needed=mask_needed, **options)
    grads = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))
    inputs = (q, k, v, _expanded(attn_mask, q, k))
    _native.attention_backward(grad, inputs, _settings(q.shape[3], **options), out, lse, grads, _scratch(q))
    return *grads, q.new_empty(0)


def _attention_qkv(qkv: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    if not _by_kernel(qkv):
        lse = qkv.new_empty((batch, heads, 0), dtype=torch.float32)
        return reference.attention_qkv(qkv, **options), lse
    settings = _settings(width, **options)
    out = qkv.new_empty((batch, tokens, width if settings["mean"] else heads * width))
    lse = qkv.new_empty((batch, heads, tokens), dtype=torch.float32)
    _native.attention(*_unpacked(qkv), None, settings, out if settings["mean"] else _by_heads(out, heads), lse)
    return out, lse


def _attention_qkv_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, **options: Any) -> Tensor:
    if not _by_kernel(qkv):
        return reference.attention_qkv_backward(grad, qkv, **options)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    settings = _settings(qkv.shape[4], **options)
    if not settings["mean"]:
        grad, out = (_by_heads(tensor, qkv.shape[3]) for tensor in (grad, out))
    _native.attention_backward(grad, (*_unpacked(qkv), None), settings, out, lse, _unpacked(grad_qkv), _scratch(qkv))
    return grad_qkv


def _unpacked(qkv: Any) -> tuple[Any, Any, Any]:
    """Views (B, H, N, D) of q, k and v in (B, N, 3, H, D)."""
    if isinstance(qkv, Tensor):
        return qkv.permute(2, 0, 3, 1, 4).unbind()
    return tuple(qkv.transpose(2, 0, 3, 1, 4))


def _scratch(tensor: Tensor) -> Any:
    return lambda size: torch.empty(size, dtype=torch.uint8, device=tensor.device)


KERNELS = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_qkv": _attention_qkv,
    "attention_qkv_backward": _attention_qkv_backward,
}
for _name, _kernel in KERNELS.items():
    library.impl(_name, _kernel, "CompositeExplicitAutograd")

# ---- fake --------------------------------------------------------------------------------------------------


def _lse_fake(like: Tensor, batch: Any, heads: Any, rows: Any) -> Tensor:
    return like.new_empty((batch, heads, rows if _by_kernel(like) else 0), dtype=torch.float32)


@torch.library.register_fake("meditok::attention", lib=library)
def _attention_fake(q, k, v, attn_mask=None, *, is_causal=False, scale=None):
    batch, heads, queries, width = q.shape
    return q.new_empty((batch, queries, heads, width)).transpose(1, 2), _lse_fake(q, batch, heads, queries)


@torch.library.register_fake("meditok::attention_backward", lib=library)
def _attention_backward_fake(grad, q, k, v, attn_mask, out, lse, *, is_causal, scale, mask_needed=False):
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(attn_mask.shape if mask_needed else (0,))


@torch.library.register_fake("meditok::attention_qkv", lib=library)
def _attention_qkv_fake(qkv, *, is_causal=False, scale=None, reduce=None):
    batch, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty((batch, tokens, width if reduce == "mean" else heads * width))
    return out, _lse_fake(qkv, batch, heads, tokens)


@torch.library.register_fake("meditok::attention_qkv_backward", lib=library)
def _attention_qkv_backward_fake(grad, qkv, out, lse, *, is_causal, scale, reduce):
    return qkv.new_empty(qkv.shape)


# ---- autograd and vmap -------------------------------------------------------------------------------------


def _setup(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)
    ctx.settings = dict(keyword_only_inputs)


def _attention_gradient(ctx, grad, _):
    needed = ctx.saved_tensors[3] is not None and ctx.needs_input_grad[3]
    *grads, grad_mask = torch.ops.meditok.attention_backward(
        grad, *ctx.saved_tensors, mask_needed=needed, **ctx.settings
    )
    return *grads, grad_mask if needed else None


def _attention_qkv_gradient(ctx, grad, _):
    return torch.ops.meditok.attention_qkv_backward(grad, *ctx.saved_tensors, **ctx.settings)


torch.library.register_autograd("meditok::attention", _attention_gradient, setup_context=_setup, lib=library)
torch.library.register_autograd("meditok::attention_qkv", _attention_qkv_gradient, setup_context=_setup, lib=library)
refuse_second_derivative("attention_backward")
refuse_second_derivative("attention_qkv_backward")


for _name in KERNELS:
    torch.library.register_vmap(f"meditok::{_name}", one_by_one(getattr(torch.ops.meditok, _name)), lib=library)

# ---- public ------------------------------------------------------------------------------------------------


def attention(
    q: Any, k: Any, v: Any, attn_mask: Any = None, *, is_causal: bool = False, scale: float | None = None
) -> Any:
    """Scaled dot-product attention: q (B, H, N, D), k and v (B, H, M, D) -> (B, H, N, D), strided as (B, N,
    H, D).

    attn_mask broadcasts to (B, H, N, M): bool with True = attend, or floats added to the scores, -inf = do not. A row
    without any key gives 0 with zero gradient; a key that is not attended has no part, even if it holds NaN. Causal
    masks align at the top left; scale is D ** -0.5 unless given. Sums in float32. On CPU the same bits whatever the
    batch and the thread count. Raises ShapeError, DtypeError, TypeError.
    """
    kind = kind_of(q, k, v, attn_mask)
    _check_attention(q, k, v, attn_mask, is_causal)
    settings = dict(is_causal=is_causal, scale=scale)
    if kind == "cupy":
        out = on_torch(torch.ops.meditok.attention, q, k, v, attn_mask, **settings)
        return out[0]
    if kind == "numpy":
        return _numpy_attention(q, k, v, attn_mask, **settings)
    check_same_device(q=q, k=k, v=v, attn_mask=attn_mask)
    mask_needed = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
    if _by_kernel(q, mask_needed):
        return torch.ops.meditok.attention(q, k, v, attn_mask, **settings)[0]
    return reference.attention(q, k, v, attn_mask, **settings)


def attention_qkv(qkv: Any, *, is_causal: bool = False, scale: float | None = None, reduce: str | None = None) -> Any:
    """Self-attention of packed projections: qkv (B, N, 3, H, D) -> (B, N, H * D), or (B, N, D) with
    reduce="mean".

    As `attention`, reading qkv in place; its gradient is one packed array. Raises ShapeError, DtypeError, and
    ValueError for another `reduce`.
    """
    kind = kind_of(qkv)
    check_rank("qkv", qkv, "(B, N, 3, H, D)")
    check_float("qkv", qkv)
    if qkv.shape[2] != 3:
        raise ShapeError(f"qkv has shape {tuple(qkv.shape)}; (B, N, 3, H, D) is needed")
    if reduce not in (None, "mean"):
        raise ValueError(f"reduce={reduce!r} is not one of None, 'mean'")
    settings = dict(is_causal=is_causal, scale=scale, reduce=reduce)
    if kind == "cupy":
        return on_torch(torch.ops.meditok.attention_qkv, qkv, **settings)[0]
    if kind == "numpy":
        return _numpy_attention_qkv(qkv, **settings)
    if _by_kernel(qkv):
        return torch.ops.meditok.attention_qkv(qkv, **settings)[0]
    return reference.attention_qkv(qkv, **settings)


def _numpy_attention(q, k, v, mask, *, is_causal, scale):
    if not _by_kernel(q):
        mask = None if mask is None else to_torch(mask)
        tensors = (to_torch(array) for array in (q, k, v))
        return reference.attention(*tensors, mask, is_causal=is_causal, scale=scale).numpy()
    q, k, v = plain(q), plain(k), plain(v)
    mask = None if mask is None else _expanded(plain(mask), q, k)
    batch, heads, queries, width = q.shape
    out = np.empty((batch, queries, heads, width), q.dtype).swapaxes(1, 2)
    _native.attention(q, k, v, mask, _settings(width, is_causal=is_causal, scale=scale), out, None)
    return out


def _numpy_attention_qkv(qkv, *, is_causal, scale, reduce):
    if not _by_kernel(qkv):
        return reference.attention_qkv(to_torch(qkv), is_causal=is_causal, scale=scale, reduce=reduce).numpy()
    qkv = plain(qkv)
    batch, tokens, _, heads, width = qkv.shape
    settings = _settings(width, is_causal=is_causal, scale=scale, reduce=reduce)
    out = np.empty((batch, tokens, *(() if settings["mean"] else (heads,)), width), qkv.dtype)
    _native.attention(*_unpacked(qkv), None, settings, out if settings["mean"] else out.swapaxes(1, 2), None)
    return out.reshape(batch, tokens, -1) if width else out.reshape(batch, tokens, 0)
