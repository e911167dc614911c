"""Random views of a training image, as MedITok's published recipe has them: random resized crop, both flips, a
quarter turn either way, and grey. Every draw comes from the generator given, so a view is a function of its seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Augmentation:
    """Probabilities and ranges; the defaults are the published ones."""

    size: int = 256
    scale: tuple[float, float] = (0.9, 1.0)  # share of the area kept
    ratio: tuple[float, float] = (0.75, 4 / 3)  # width over height
    flip: float = 0.5  # each of the two
    turn: float = 0.5  # of +90 or -90 degrees, either alike
    grayscale: float = 0.1

    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """pixels float32 (3, H, W) in [-1, 1] -> (3, size, size)."""
        top, left, height, width = self.crop(pixels.shape[1], pixels.shape[2], generator)
        view = resize(pixels[:, top : top + height, left : left + width], self.size)
        for axis in (2, 1):
            if _chance(self.flip, generator):
                view = view.flip(axis)
        if _chance(self.turn, generator):
            view = torch.rot90(view, 1 if _chance(0.5, generator) else -1, (1, 2))
        if _chance(self.grayscale, generator):
            red, green, blue = view
            view = (0.299 * red + 0.587 * green + 0.114 * blue).expand(3, -1, -1)  # ITU-R BT.601
        return view.contiguous()

    def crop(self, height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a part with area and aspect in range; the largest centred one if ten draws
        of the aspect (uniform in its logarithm) do not fit."""
        low, high = (math.log(value) for value in self.ratio)
        for _ in range(10):
            area = height * width * _uniform(*self.scale, generator)
            aspect = math.exp(_uniform(low, high, generator))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return _below(height - h + 1, generator), _below(width - w + 1, generator), h, w
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        return (height - h) // 2, (width - w) // 2, h, w


def resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """(3, H, W) -> (3, size, size), bilinear and antialiased, aspect ratio given up."""
    if pixels.shape[1:] == (size, size):
        return pixels
    return F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _chance(probability: float, generator: torch.Generator) -> bool:
    return torch.rand((), generator=generator).item() < probability
