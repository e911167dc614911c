"""Plain vision transformer (Dosovitskiy et al. 2021), as DINOv2 and BiomedCLIP publish it.

Sizes are read off the weights, so any patch size, width and depth of the two layouts loads. Parameter names are those
of DINOv2's release (facebookresearch/dinov2) and of timm's `vit_*` models, which differ in the layer scales only.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import BadInputError
from ..nn.attention import SelfAttention
from ..nn.blocks import EPS
from .frozen import Frozen, load_exactly

HEAD_WIDTH = 64  # of every published ViT-S, -B and -L
OFFSET = 0.1  # DINOv2 adds it to the grid before dividing, and scales coordinates by the result


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, N, width), N = (H / patch) * (W / patch) in raster order."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class LayerScale(nn.Module):
    """Learnt factor per channel (Touvron et al. 2021, CaiT)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block, (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int, heads: int, hidden: int, scaled: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = SelfAttention(width, heads)
        self.ls1 = LayerScale(width) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, hidden)
        self.ls2 = LayerScale(width) if scaled else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(Frozen):
    """Images (B, 3, H, W), already normalised, H and W multiples of the patch, to the class token (B, width)."""

    def __init__(self, width: int, depth: int, patch: int, grid: int, hidden: int, scaled: bool):
        super().__init__()
        self.patch, self.grid = patch, grid
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.blocks = nn.ModuleList(Block(width, width // HEAD_WIDTH, hidden, scaled) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Position embedding (1, 1 + height * width, C) for a grid of that many patches, resized bicubically."""
        if height == width == self.grid:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        scale = (height + OFFSET) / self.grid, (width + OFFSET) / self.grid
        grid = F.interpolate(grid.float(), scale_factor=scale, mode="bicubic").to(grid.dtype)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens before the first block, (B, 1 + N, C), the class token first."""
        height, width = (size // self.patch for size in images.shape[2:])
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.positions(height, width)

    def taps(self, images: torch.Tensor, after: tuple[int, ...]) -> list[torch.Tensor]:
        """Tokens (B, 1 + N, C) after the blocks numbered `after` (from 0), without the final norm."""
        x, found = self.embed(images), []
        for i, block in enumerate(self.blocks[: max(after) + 1]):
            x = block(x)
            if i in after:
                found.append(x)
        return found

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


def vit_from_state(state: dict[str, torch.Tensor], where, what: str) -> VisionTransformer:
    """The frozen transformer whose weights `state` holds; BadInputError where they are not one."""
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    if missing := [key for key in needed if key not in state]:
        raise BadInputError(f"{where}: not {what}: no {', '.join(missing)} among its {len(state)} tensors")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    grid = math.isqrt(state["pos_embed"].shape[1] - 1)
    depth = len({m[1] for m in (re.match(r"blocks\.(\d+)\.", key) for key in state) if m})
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    if width % HEAD_WIDTH:
        raise BadInputError(f"{where}: not {what}: width {width} is no multiple of the head width {HEAD_WIDTH}")
    model = VisionTransformer(width, depth, patch, grid, hidden, scaled="blocks.0.ls1.gamma" in state)
    return load_exactly(model, state, where, what, ignore=("mask_token", "head.")).freeze()
