"""ViTamin encoder and its mirror image, the decoder (MedITok, arXiv 2505.19225, section 3).

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.blocks import EPS, InvertedBottleneck, LayerNorm2d, transformer
from ..nn.upsample import Upsample
from .config import PATCH, TokenizerConfig
from .patches import Patches, PatchesBack
from .plan import in_parts


class Stem(nn.Module):
    """(B, 3, H, W) -> (B, width, H/2, W/2)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm1 = LayerNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.gelu(self.norm1(self.conv1(x))))


class StridedConv(nn.Module):
    """Norm and 3x3 convolution of stride 2 to the transformer's width."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.norm = LayerNorm2d(in_width)
        self.proj = nn.Conv2d(in_width, out_width, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.norm(x))


def _stage(in_width: int, out_width: int, depth: int, resample: str, expansion: int) -> nn.Sequential:
    """`depth` inverted bottlenecks; the first one resamples and changes the width."""
    first = InvertedBottleneck(in_width, out_width, resample, expansion)
    rest = [InvertedBottleneck(out_width, out_width, expansion=expansion) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


class ConvStages(nn.Module):
    """Image to feature map at 1/16 of its size: (B, 3, H, W) -> (B, C, ceil(H/16), ceil(W/16))."""

    def __init__(self, c: TokenizerConfig):
        super().__init__()
        w1, w2 = c.stage_widths
        d1, d2 = c.stage_depths
        self.stem = Stem(c.stem_width)
        self.stages = nn.Sequential(
            _stage(c.stem_width, w1, d1, "down", c.expansion), _stage(w1, w2, d2, "down", c.expansion)
        )
        self.pool = StridedConv(w2, c.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.stages(self.stem(x)))


class Encoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] to tokens (B, N, C), N = ceil(H/16) * ceil(W/16) in raster order."""

    def __init__(self, c: TokenizerConfig):
        super().__init__()
        self.config = c
        # Zero and untrained in the published models, which know positions through their convolutions' padding alone.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1, c.width), requires_grad=False)
        self.patch_embed = nn.ModuleDict({"backbone": ConvStages(c) if c.ends == "stages" else Patches(c)})
        self.blocks = transformer(c.width, c.heads, c.encoder_depth, c.drop_path)
        self.norm = nn.LayerNorm(c.width, eps=EPS)
        self.apply(_init_encoder)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        x = in_parts(self.patch_embed["backbone"], images, self.config, *images.shape[2:])
        x = x.permute(0, 2, 3, 1).flatten(1, 2) + self.pos_embed
        return self.norm(self.blocks(x))


class PixelHead(nn.Module):
    """Last doubling and the three colour channels: (B, w, H, W) -> (B, 3, 2H, 2W)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = Upsample(width, width)
        self.norm1 = LayerNorm2d(width)
        self.conv2 = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(x, self.norm1))


class Decoder(nn.Module):
    """Tokens (B, N, C) on a grid (h, w), N = h * w, to an unclamped image (B, 3, 16h, 16w)."""

    def __init__(self, c: TokenizerConfig):
        super().__init__()
        self.config = c
        self.blocks = transformer(c.width, c.heads, c.decoder_depth, c.drop_path)
        self.ends = c.ends
        if c.ends == "patches":  # no norm: a patch's pixels are linear in what the blocks sum up
            self.pixels = PatchesBack(c)
        else:
            w2, w1 = c.decoder_widths
            d2, d1 = c.decoder_depths
            self.norm = nn.LayerNorm(c.width, eps=EPS)
            self.up_conv1 = Upsample(c.width, w2)
            self.up_conv2 = _stage(w2, w2, d2, "up", c.expansion)
            self.up_conv3 = _stage(w2, w1, d1, "up", c.expansion)
            self.up_conv4 = PixelHead(w1)
        self.apply(init_weights)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        x = self.blocks(tokens)
        x = x if self.ends == "patches" else self.norm(x)
        run = self.pixels if self.ends == "patches" else self.convolve
        x = x.unflatten(1, grid).permute(0, 3, 1, 2)  # channels-last memory
        return in_parts(run, x, self.config, PATCH * grid[0], PATCH * grid[1])

    def convolve(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, h, w) -> (B, 3, 16h, 16w)
        return self.up_conv4(self.up_conv3(self.up_conv2(self.up_conv1(x))))

    @property
    def last_layer(self) -> nn.Module:
        """The layer that makes the pixels."""
        return self.pixels.proj if self.ends == "patches" else self.up_conv4.conv2

    def convolution_blocks(self) -> list[nn.Module]:
        if self.ends == "patches":
            return list(self.pixels.grid)
        return [*self.up_conv2, *self.up_conv3, self.up_conv4]


def init_weights(module: nn.Module) -> None:
    """Start of training for decoder and bottlenecks: linears truncated normal 0.02, convolutions Xavier of gain 0.5."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_normal_(module.weight, gain=0.5)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _init_encoder(module: nn.Module) -> None:
    """As init_weights, but convolutions are normal with variance 2 / fan-out; the strided one keeps torch's default."""
    if isinstance(module, nn.Linear):
        init_weights(module)
    elif isinstance(module, Stem | InvertedBottleneck):
        for conv in (m for m in module.modules() if isinstance(m, nn.Conv2d)):
            fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
            nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
            nn.init.zeros_(conv.bias)
