"""Pixels in and out by one linear map a patch: the cheap ends of a tokenizer, for `ends="patches"`.

ViTamin's convolutions work at half, a quarter and an eighth of the image's size, which is where a small model on a CPU
spends its time. Here all layers work on the token grid, and what starts as the principal components of the patches
(train/start.py) is a transform codec that training makes better.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.blocks import InvertedBottleneck
from .config import PATCH, TokenizerConfig


class Patches(nn.Module):
    """Images (B, 3, H, W) to a feature map (B, width, H/16, W/16): a linear map of each patch with `overlap` pixels
    around it, then `grid_depth` convolution blocks."""

    def __init__(self, c: TokenizerConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, c.width, PATCH + 2 * c.overlap, stride=PATCH, padding=c.overlap)
        self.grid = _grid(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grid(self.proj(x))


class PatchesBack(nn.Module):
    """Feature map (B, width, h, w) to images (B, 3, 16h, 16w): `grid_depth` convolution blocks, then a transposed
    convolution of stride 16 whose patches overlap by 2 x `overlap` pixels and add up there."""

    def __init__(self, c: TokenizerConfig):
        super().__init__()
        self.grid = _grid(c)
        self.proj = nn.ConvTranspose2d(c.width, 3, PATCH + 2 * c.overlap, stride=PATCH, padding=c.overlap)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The transposed convolution as a matrix product and a sum of patches: the same, and faster on a CPU.
        x = self.grid(x)
        size = [PATCH * side for side in x.shape[2:]]
        patches = x.permute(0, 2, 3, 1).flatten(1, 2) @ self.proj.weight.flatten(1)  # (B, N, 3 * side * side)
        image = F.fold(
            patches.transpose(1, 2), size, self.proj.kernel_size, padding=self.proj.padding, stride=self.proj.stride
        )
        return image + self.proj.bias.view(1, 3, 1, 1)


def _grid(c: TokenizerConfig) -> nn.Sequential:
    return nn.Sequential(*[InvertedBottleneck(c.width, c.width, expansion=c.expansion) for _ in range(c.grid_depth)])
