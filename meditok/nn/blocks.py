"""Building blocks of ViTamin (Chen et al. 2024, "ViTamin") as MedITok uses it: normalisation, MLPs, convolutions.

Feature maps are (B, channels, height, width), tokens (B, N, channels). Norms have eps 1e-6 unless they say otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.convolution import depthwise_gelu
from .attention import ProjectionAttention, SelfAttention
from .linear import Linear, norm_linear
from .upsample import Upsample

EPS = 1e-6
BOTTLENECK_EPS = 1e-5  # the three norms that belong directly to a bottleneck block


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a feature map, at each pixel."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x (B, C, H, W)
        x = x.permute(0, 2, 3, 1)  # free for channels-last memory, which the convolutions keep
        return super().forward(x).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a whole branch per sample while training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class GeGLU(nn.Module):
    """Gated MLP with its own norm (Shazeer 2020): w2(gelu_tanh(w0(y)) * w1(y)), y = norm(x); hidden width 2C."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.w0 = nn.Linear(width, 2 * width)
        self.w1 = nn.Linear(width, 2 * width)
        self.w2 = nn.Linear(2 * width, width)

    def forward(
        self, x: torch.Tensor, norm: nn.LayerNorm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of norm(x), plus the residual; x (B, N, C)."""
        return norm_linear(norm_linear(x, self.w0, norm, self.norm, gate=self.w1), self.w2, residual=residual)


class TransformerBlock(nn.Module):
    """Pre-norm block, (B, N, C) -> (B, N, C). The MLP input is normalised twice (norm2, then the MLP's own norm)."""

    def __init__(self, width: int, heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = GeGLU(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x (B, N, C)
        if self.training and self.drop_path.rate:
            x = x + self.drop_path(self.attn(x, self.norm1))
            return x + self.drop_path(self.mlp(x, self.norm2))
        x = self.attn(x, self.norm1, residual=x)
        return self.mlp(x, self.norm2, residual=x)


def transformer(width: int, heads: int, depth: int, drop_path: float) -> nn.Sequential:
    """`depth` blocks whose drop-path rate grows linearly from 0 to `drop_path`."""
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    return nn.Sequential(*[TransformerBlock(width, heads, rate) for rate in rates])


class BottleneckBlock(nn.Module):
    """Maps tokens to and from the quantiser's width: a = proj(norm3(x)) + attn(norm1(x)); a + mlp(norm2(a))."""

    def __init__(self, in_width: int, out_width: int, heads: int, causal: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_width, eps=BOTTLENECK_EPS)
        self.attn = ProjectionAttention(in_width, out_width, heads, causal)
        self.proj = Linear(in_width, out_width)
        self.norm3 = nn.LayerNorm(in_width, eps=BOTTLENECK_EPS)
        self.norm2 = nn.LayerNorm(out_width, eps=BOTTLENECK_EPS)
        self.mlp = GeGLU(out_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x (B, N, in_width)
        a = self.proj(self.norm3(x)) + self.attn(x, self.norm1)
        return a + self.mlp(a, self.norm2)


class Downsample(nn.Module):
    """Shortcut of a halving block: 3x3 average that leaves the padding out, then a 1x1 conv where widths differ."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.expand = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, in, H, W) -> (B, out, ceil(H/2), ceil(W/2))
        x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        if isinstance(self.expand, nn.Identity):
            return x
        return norm_linear(x.permute(0, 2, 3, 1), self.expand).permute(0, 3, 1, 2)


class InvertedBottleneck(nn.Module):
    """MobileNetV2-style block: norm, 1x1 expansion, depthwise 3x3, 1x1 projection, plus the un-normalised input.

    `resample` is "none", "down" (the depthwise convolution has stride 2) or "up" (an upsampling dense 3x3
    convolution stands between expansion and depthwise convolution).
    """

    def __init__(self, in_width: int, out_width: int, resample: str = "none", expansion: int = 4):
        super().__init__()
        hidden = expansion * out_width
        self.pre_norm = LayerNorm2d(in_width)
        self.conv1_1x1 = nn.Conv2d(in_width, hidden, 1)
        self.up = Upsample(hidden, hidden) if resample == "up" else nn.Identity()
        self.conv2_kxk = nn.Conv2d(hidden, hidden, 3, stride=2 if resample == "down" else 1, padding=1, groups=hidden)
        self.conv3_1x1 = nn.Conv2d(hidden, out_width, 1)
        shortcuts = {"none": nn.Identity, "down": Downsample, "up": Upsample}
        self.shortcut = shortcuts[resample](in_width, out_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # x (B, in, H, W)
        y = norm_linear(x.permute(0, 2, 3, 1), self.conv1_1x1, self.pre_norm, activation="gelu").permute(0, 3, 1, 2)
        y, depthwise = self.up(y).permute(0, 2, 3, 1), self.conv2_kxk
        y = depthwise_gelu(y, depthwise.weight, depthwise.bias, depthwise.stride[0])
        y = norm_linear(y, self.conv3_1x1, residual=self.shortcut(x).permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)  # channels-last memory
