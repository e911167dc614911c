"""The ops of transformer and convolution layers in plain PyTorch: the second half of `meditok.ops.reference`.

attention is F.scaled_dot_product_attention with rules for rows that see no key; the others fuse what stands around a
linear layer, a depthwise convolution and the doubling of a map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- attention ---------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """q (B, H, N, D), k, v (B, H, M, D) -> (B, H, N, D), strided as (B, N, H, D); a fully masked row is 0."""
    attended = None
    if attn_mask is not None:
        open_ = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        attended = open_.any(-1, keepdim=True)
        # A row without a key attends to all of them for a moment, so that no NaN arises; its result is
        # dropped below.
        attn_mask = attn_mask | ~attended if attn_mask.dtype == torch.bool else attn_mask.where(attended, 0)
    if k.shape[-2] == 0:
        out = torch.zeros_like(q) + 0 * (k.sum() + v.sum())
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    if attended is not None:
        out = out.where(attended, 0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def attention_qkv(
    qkv: Tensor, *, is_causal: bool = False, scale: float | None = None, reduce: str | None = None
) -> Tensor:
    """qkv (B, N, 3, H, D) -> (B, N, H * D), or (B, N, D) with reduce="mean" over the heads."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    out = attention(q, k, v, is_causal=is_causal, scale=scale).transpose(1, 2)  # (B, N, H, D)
    return out.mean(2) if reduce == "mean" else out.flatten(2)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask_needed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention` to q, k, v and an additive mask (empty unless needed), written out."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, keys, values, g = (x.to(wide) for x in (q, k, v, grad))
    scores = rows @ keys.transpose(-1, -2) * scale  # (B, H, N, M)
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        added = scores + attn_mask if attn_mask.is_floating_point() else scores
        open_ = attn_mask > -torch.inf if attn_mask.is_floating_point() else attn_mask
        scores = torch.where(open_, added, -torch.inf)
    attended = (scores != -torch.inf).any(-1, keepdim=True)
    p = torch.where(attended, scores.where(attended, 0).softmax(-1), 0)
    dp = g @ values.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    grads = (ds @ keys * scale, ds.transpose(-1, -2) @ rows * scale, p.transpose(-1, -2) @ g)
    grad_mask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype) if mask_needed else q.new_empty(0)
    return *(x.to(q.dtype) for x in grads), grad_mask


def attention_qkv_backward(
    grad: Tensor, qkv: Tensor, *, is_causal: bool = False, scale: float | None = None, reduce: str | None = None
) -> Tensor:
    """Gradient of `attention_qkv` to qkv (B, N, 3, H, D)."""
    heads = qkv.shape[3]
    if reduce == "mean":
        grad = (
            (grad.to(torch.promote_types(grad.dtype, torch.float32)) / heads)
            .unsqueeze(2)
            .expand(*qkv.shape[:2], *qkv.shape[3:])
        )
    else:
        grad = grad.unflatten(-1, (heads, -1))
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    *grads, _ = attention_backward(grad.transpose(1, 2), q, k, v, is_causal=is_causal, scale=scale)
    return torch.stack([x.transpose(1, 2) for x in grads], 2)


# ---- linear layers -----------------------------------------------------------------------------------------


def linear(x, weight, bias=None, residual=None, gate=None, gate_bias=None, norms=(), eps=(), activation="none"):
    """See meditok/ops/linear.py; norms: gain and bias of each norm in turn, eps: one a norm."""
    for gain, shift, e in zip(norms[::2], norms[1::2], eps, strict=True):
        x = F.layer_norm(x, gain.shape, gain, shift, e)
    y = F.linear(x, weight, bias)
    if gate is not None:
        y = F.gelu(y, approximate="tanh") * F.linear(x, gate, gate_bias)
    elif activation == "gelu":
        y = F.gelu(y)
    return y if residual is None else y + residual


# ---- convolutions, channels last ---------------------------------------------------------------------------


def depthwise_gelu(x, weight, bias, stride=1):
    """See meditok/ops/convolution.py."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, 1, groups=len(weight))
    return F.gelu(y).permute(0, 2, 3, 1).contiguous()


def upsample_differences(x):
    """See meditok/ops/convolution.py."""
    tall = F.pad(x, (0, 0, 0, 0, 1, 1))
    tall = tall[:, 1:] - tall[:, :-1]  # (B, h+1, w, C)
    wide, both = (F.pad(a, (0, 0, 1, 1)) for a in (x, tall))
    return tall, wide[:, :, 1:] - wide[:, :, :-1], both[:, :, 1:] - both[:, :, :-1]


def upsample_gather(level, tall, wide, both, gain=None, bias=None, eps=0.0):
    """See meditok/ops/convolution.py."""
    batch, h, w, width = level.shape
    tall, wide, both = tall.unflatten(-1, (2, width)), wide.unflatten(-1, (2, width)), both.unflatten(-1, (4, width))
    rows = []
    for p in (0, 1):  # output row 2i + p, column 2j + q
        row = level + tall[:, p : p + h, :, p]
        rows.append([row + wide[:, :, q : q + w, q] + both[:, p : p + h, q : q + w, 2 * p + q] for q in (0, 1)])
    y = torch.stack([torch.stack(row, 3) for row in rows], 2).view(batch, 2 * h, 2 * w, width)
    return y if gain is None else F.gelu(F.layer_norm(y, (width,), gain, bias, eps))
