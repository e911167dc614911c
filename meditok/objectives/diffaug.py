"""Differentiable augmentation of a discriminator's input (Zhao et al. 2020, arXiv 2006.10738), with the fading blur of
StyleGAN-T (Sauer et al. 2023, arXiv 2301.09515).

What is drawn is kept apart from what is done, so the same augmentation can be applied to real and to fake images:

    drawn = draw(len(images), *images.shape[2:], generator=g)
    augment(images, drawn, fade), augment(reconstruction, drawn, fade)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from . import wide

SHIFT, CUTOUT = 0.125, 0.2  # shares of a side


@dataclass(frozen=True)
class Drawn:
    """Parameters of one batch, per image and on the CPU; None where a part was left out."""

    shift: torch.Tensor | None  # (B, 2) int64: pixels down and right
    colour: torch.Tensor | None  # (B, 3): added brightness, factor of saturation, factor of contrast
    cutout: torch.Tensor | None  # (B, 2) int64: row and column of the rectangle's centre

    def __getitem__(self, rows: slice) -> Drawn:
        """Those of some images: a rank draws for the joined batch and takes its own rows."""
        parts = (getattr(self, field.name) for field in fields(self))
        return Drawn(*[part if part is None else part[rows] for part in parts])


def draw(
    batch: int,
    height: int,
    width: int,
    *,
    generator: torch.Generator | None = None,
    probability: float = 1.0,
) -> Drawn:
    """Draw for a batch; each of the three parts is used with `probability`, decided once for the batch.

    generator: on the CPU; the same state gives the same augmentation.
    """
    used = torch.rand(3, generator=generator) < probability
    share = torch.rand(batch, 7, generator=generator)  # in [0, 1); drawn whole, so that no part shifts another's draws
    sizes = torch.tensor([height, width])
    reach = torch.tensor([round(side * SHIFT) for side in (height, width)])
    spots = sizes + 1 - torch.tensor(cutout_size(height, width)) % 2  # an even square may be centred on either edge
    return Drawn(
        shift=(share[:, :2] * (2 * reach + 1)).long() - reach if used[0] else None,
        colour=share[:, 2:5] * torch.tensor([1, 2, 1]) + torch.tensor([-0.5, 0, 0.5]) if used[1] else None,
        cutout=(share[:, 5:] * spots).long() if used[2] else None,
    )


def augment(images: torch.Tensor, drawn: Drawn, fade: float = 0.0) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] blurred by `fade`, shifted, recoloured and cut out, in that order.

    Differentiable with respect to the images. The result is float32 (or float64) and not clamped.
    """
    x = blur(wide(images), fade)
    if drawn.shift is not None:
        x = translate(x, drawn.shift)
    if drawn.colour is not None:
        x = recolour(x, drawn.colour)
    return x if drawn.cutout is None else cut_out(x, drawn.cutout)


def blur(images: torch.Tensor, fade: float) -> torch.Tensor:
    """Separable blur with weights 2^(-(i / sigma)^2), sigma = sqrt(H / 2) * fade pixels, |i| <= floor(3 sigma); borders
    are reflected. fade runs from 1 down to 0, which is no blur."""
    sigma = math.sqrt(images.shape[2] / 2) * fade
    radius = math.floor(3 * sigma)
    if radius < 1:
        return images
    weights = torch.exp2(-((torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device) / sigma) ** 2))
    weights = (weights / weights.sum()).expand(images.shape[1], 1, -1)
    x = F.pad(images, [radius] * 4, mode="reflect")
    x = F.conv2d(x, weights.unsqueeze(-1), groups=x.shape[1])
    return F.conv2d(x, weights.unsqueeze(-2), groups=x.shape[1])


def translate(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Move each image by shift (B, 2) pixels (down, right); 0 comes in at the edges."""
    height, width = images.shape[2:]
    reach = int(shift.abs().max())
    padded = F.pad(images, [reach] * 4)
    return torch.stack(
        [
            padded[i, :, reach - dy : reach - dy + height, reach - dx : reach - dx + width]
            for i, (dy, dx) in enumerate(shift.tolist())
        ]
    )


def recolour(images: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Add brightness, scale the distance from each pixel's mean over channels, then from the image's mean."""
    brightness, saturation, contrast = colour.to(images).view(-1, 3, 1, 1, 1).unbind(1)
    x = images + brightness
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * saturation + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * contrast + mean


def cutout_size(height: int, width: int) -> tuple[int, int]:
    """Sides in pixels of what `cut_out` removes."""
    return round(height * CUTOUT), round(width * CUTOUT)


def cut_out(images: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Put 0 into a rectangle of a fifth of each side around centre (B, 2); it may hang over the edge."""
    centre = centre.to(images.device)
    inside = []
    for axis, (size, side) in enumerate(zip(images.shape[2:], cutout_size(*images.shape[2:]), strict=True)):
        first = centre[:, axis, None] - side // 2  # (B, 1)
        pixels = torch.arange(size, device=images.device)
        inside.append((pixels >= first) & (pixels < first + side))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images * ~hole
