"""Discriminator on the features of a frozen network (Sauer et al. 2021, "Projected GANs", arXiv 2111.01007).

    build_discriminator("dinov2-s", weights=FILE)      as MedITok: DINOv2 ViT-S/14 after blocks 0, 2, 5, 8 and 11
    build_discriminator("efficientnet-lite0")          offline: the package's EfficientNet-Lite0 after five blocks

The state dict holds the trained heads (and the input's normalisation), as published; the backbone is read again.
"""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import BadInputError, UsageError
from .efficientnet import load_efficientnet
from .frozen import Frozen, affine_to_imagenet, given_file, read_state
from .teachers import CARDS
from .vit import VisionTransformer, vit_from_state

GROUPS = 32  # of the group norms, or as many of them as divide the width


class Dino(Frozen):
    """Patch tokens plus class token after chosen blocks, each (B, C, N); images of any size, normalised."""

    TAPS = (0, 2, 5, 8, 11)

    def __init__(self, network: VisionTransformer):
        super().__init__()
        self.network = network
        self.widths = [network.norm.weight.shape[0]] * len(self.TAPS)
        self.freeze()

    def forward(self, images: torch.Tensor, generator: torch.Generator | None = None) -> list[torch.Tensor]:
        tokens = self.network.taps(self.trim(images, generator), self.TAPS)
        return [(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in tokens]

    def trim(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """To whole patches: where both sides are too long, a random crop or an area average, evenly likely; where one
        is, a bicubic resize."""
        patch = self.network.patch
        height, width = images.shape[2:]
        size = height // patch * patch, width // patch * patch
        spare = height - size[0], width - size[1]
        if not (spare[0] and spare[1]):
            return F.interpolate(images, size, mode="bicubic") if any(spare) else images
        if torch.rand((), generator=generator) <= 0.5:
            top, left = (int(torch.randint(n + 1, (), generator=generator)) for n in spare)
            return images[:, :, top : top + size[0], left : left + size[1]]
        return F.interpolate(images, size, mode="area")


class LiteFeatures(Frozen):
    """Maps of EfficientNet-Lite0 at strides 4, 8, 16, 16 and 32, each (B, C, N).

    All are brought to the grid of stride 16, so that every depth has an equal share of the logits.
    """

    TAPS = (2, 4, 7, 10, 15)

    def __init__(self):
        super().__init__()
        self.network = load_efficientnet()
        self.widths = [self.network._blocks[i]._project_conv.out_channels for i in self.TAPS]
        self.network.scale.fill_(1), self.network.shift.zero_()  # the discriminator normalises
        self.freeze()

    def forward(self, images: torch.Tensor, generator: torch.Generator | None = None) -> list[torch.Tensor]:
        maps = self.network.maps(images)
        grid = maps[self.TAPS[2]].shape[2:]
        return [F.adaptive_avg_pool2d(maps[i], grid).flatten(2) for i in self.TAPS]


class Residual(nn.Module):
    """(f(x) + x) / sqrt(2)."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.fn(x) + x) / math.sqrt(2)


def _block(width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular"),
        nn.GroupNorm(math.gcd(GROUPS, width), width, eps=1e-6),
        nn.LeakyReLU(0.2),
    )


class Discriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to logits (B, taps * N), positive for real ones; N tokens a tap.

    The backbone moves with the module, but is no submodule: it is not saved, trained, wrapped or averaged with it.
    """

    def __init__(self, backbone: Frozen):
        super().__init__()
        object.__setattr__(self, "backbone", backbone)
        scale, shift = affine_to_imagenet()
        self.register_buffer("x_scale", scale)
        self.register_buffer("x_shift", shift)
        self.heads = nn.ModuleList(
            nn.Sequential(_block(width, 1), Residual(_block(width, 9)), nn.Conv1d(width, 1, 1))
            for width in backbone.widths
        )
        self.apply(_init)

    def _apply(self, fn, recurse: bool = True):
        self.backbone._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """generator: on the CPU, decides how images are trimmed to whole patches; torch's global one by default."""
        x = images.to(self.x_scale.dtype) * self.x_scale + self.x_shift
        taps = self.backbone(x, generator)
        return torch.cat([head(tap.to(x.dtype)).flatten(1) for head, tap in zip(self.heads, taps, strict=True)], dim=1)


def _init(module: nn.Module) -> None:
    """Start of training: Xavier normal of gain 0.5, zero biases; norms stay 1 and 0."""
    if isinstance(module, nn.Conv1d):
        nn.init.xavier_normal_(module.weight, gain=0.5)
        nn.init.zeros_(module.bias)


def build_discriminator(name: str, weights: str | os.PathLike = "") -> Discriminator:
    """ "dinov2-s" (weights: the release's file) or "efficientnet-lite0", heads fresh, on the CPU.

    MissingPartError: file or package not there; BadInputError: weights that do not fit; UsageError: unknown name.
    """
    if name == "efficientnet-lite0":
        return Discriminator(LiteFeatures())
    if name == "dinov2-s":
        passed = "--discriminator-weights=FILE, or use efficientnet-lite0"
        path = given_file(weights, "discriminator dinov2-s", CARDS["dinov2-s"].source, passed)
        network = vit_from_state(read_state(path), path, "a DINOv2 transformer")
        if len(network.blocks) <= max(Dino.TAPS):
            raise BadInputError(
                f"{path}: not DINOv2 ViT-S/14: {len(network.blocks)} blocks, and block {max(Dino.TAPS)} is read"
            )
        return Discriminator(Dino(network))
    raise UsageError(f"discriminator {name!r}: unknown; choose dinov2-s or efficientnet-lite0")
