"""Self-attention of the transformer blocks and of the bottlenecks, over the `attention_qkv` op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from .linear import Linear, norm_linear


class SelfAttention(nn.Module):
    """Multi-head self-attention, (B, N, C) -> (B, N, C); one packed projection ordered (3, heads, C / heads)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: torch.Tensor, norm: nn.LayerNorm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """proj(attention(qkv(norm(x)))) + residual, x (B, N, C)."""
        qkv = norm_linear(x, self.qkv, norm).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D)
        return norm_linear(ops.attention_qkv(qkv), self.proj, residual=residual)


class ProjectionAttention(nn.Module):
    """Attention that also changes the width, (B, N, in_width) -> (B, N, out_width).

    Heads work at the wider of the two widths. Narrowing averages over the heads (and pools the channels where a
    head is not out_width wide); widening concatenates them. `causal` lets token t see tokens 0..t in raster order,
    as MedITok does; UniTok's later checkpoints attend fully with the very same weights.
    """

    def __init__(self, in_width: int, out_width: int, heads: int, causal: bool = True):
        super().__init__()
        wide = max(in_width, out_width)
        if wide % heads or (in_width % out_width and out_width % in_width):
            raise ValueError(
                f"bottleneck of {in_width} -> {out_width} with {heads} heads: widths must divide each other"
            )
        self.heads, self.causal, self.narrowing = heads, causal, in_width > out_width
        self.out_width = out_width
        self.qkv = nn.Linear(in_width, 3 * wide, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(wide))
        self.v_bias = nn.Parameter(torch.zeros(wide))
        self.register_buffer("zero_k_bias", torch.zeros(wide))
        self.proj = Linear(out_width, out_width)

    def forward(self, x: torch.Tensor, norm: nn.LayerNorm | None = None) -> torch.Tensor:
        """Of norm(x), x (B, N, in_width)."""
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = norm_linear(x, self.qkv, norm, bias=bias).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D)
        y = ops.attention_qkv(qkv, is_causal=self.causal, reduce="mean" if self.narrowing else None)
        if y.shape[-1] != self.out_width:
            y = F.adaptive_avg_pool1d(y, self.out_width)
        return self.proj(y)
