"""Learned measures: perceptual distances of pairs, and the Frechet distance (FID) of sets; networks named and hashed.

No FID of fewer than MIN_IMAGES pictures is given: its bias is then larger than most differences between models. Numbers
of different extractors cannot be compared, and none here is the Inception network of most papers.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from .._lazy import require
from ..errors import UsageError
from ..objectives.perceptual import MIN_HEIGHT, PerceptualDistance, build_perceptual

MIN_IMAGES = 2000
PERCEPTUAL = {"stlpips-alexnet": "st_lpips", "stlpips-vgg16": "st_lpips", "lpips-vgg16": "lpips"}
EXTRACTORS = "efficientnet-lite0, stlpips-vgg16, biomedclip or timm:NAME"


def weights_hash(network: nn.Module) -> str:
    """64 hex digits: SHA-256 over names, shapes and float32 values of a network's tensors."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(memoryview(value.detach().float().cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()


class Perceptual:
    """A perceptual distance of two pictures (1, 3, H, W) in [-1, 1]; nan under 48 pixels a side."""

    def __init__(self, net: str, weights: str | os.PathLike = ""):
        self.net, self.metric = net, PERCEPTUAL.get(net, net)
        self.distance: PerceptualDistance = build_perceptual(net, weights)

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, other: torch.Tensor) -> float:
        if min(image.shape[2:]) < MIN_HEIGHT:
            return math.nan
        return self.distance.each(other, image).item()

    def describe(self) -> dict:
        return {"network": self.net, "weights_sha256": weights_hash(self.distance)}


@dataclass
class Extractor:
    """Features (B, D) of pictures (B, 3, H, W) in [-1, 1], for FID."""

    name: str
    network: nn.Module
    run: Callable[[torch.Tensor], torch.Tensor]
    hash: str = field(init=False)

    def __post_init__(self):
        self.hash = weights_hash(self.network)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.run(images.float())

    def describe(self) -> dict:
        return {"extractor": self.name, "weights_sha256": self.hash, "region": "without padding"}


def load_extractor(name: str, weights: str | os.PathLike = "") -> Extractor:
    """By name: efficientnet-lite0 (pooled, 1280 wide, at 224 px), stlpips-vgg16 (the last layer's mean, 512 wide, at
    the picture's size), biomedclip or timm:NAME with their file. Errors as models.teachers.load_vision."""
    if name == "stlpips-vgg16":
        network = build_perceptual(name)
        scaled = lambda x: (x - network.shift) / network.scale  # noqa: E731
        return Extractor(name, network.features, lambda x: network.features(scaled(x))[-1].mean((2, 3)))
    from ..models.teachers import load_vision

    if name == "efficientnet-lite0":
        network = load_vision("offline")
    elif name == "biomedclip" or name.startswith("timm:"):
        network = load_vision(name, weights, "--extractor-weights=FILE")
    else:
        raise UsageError(f"extractor {name!r}: unknown; choose {EXTRACTORS}")
    return Extractor(name, network, network)


class _Given(nn.Module):
    """Passes features on that were taken before."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class Frechet:
    """The Frechet distance between features of originals and of what came back (Heusel et al. 2017), by torchmetrics.

    Sums are kept in float64, (D, D) each; pictures are not.
    """

    def __init__(self, extractor: Extractor):
        self.extractor, self.n = extractor, 0
        self._distance = None

    def add(self, image: torch.Tensor, other: torch.Tensor) -> None:
        """A pair of pictures (1, 3, H, W) in [-1, 1]."""
        real, fake = self.extractor(image), self.extractor(other)
        if self._distance is None:
            module = require("torchmetrics.image.fid", "the Frechet distance")
            self._distance = module.FrechetInceptionDistance(feature=_Given(real.shape[1])).set_dtype(torch.float64)
        self._distance.update(real.double(), real=True)
        self._distance.update(fake.double(), real=False)
        self.n += 1

    def value(self) -> float:
        """Never below 0, as rounding could have it."""
        return max(0.0, float(self._distance.compute()))
