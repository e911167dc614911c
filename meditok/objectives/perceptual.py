"""Learned perceptual distances: LPIPS (Zhang et al. 2018, arXiv 1801.03924, eq. 1) over VGG16, and its shift-tolerant
variant (Ghildyal & Liu 2022, arXiv 2207.13686) over AlexNet or VGG16.

    build_perceptual("lpips-vgg16", weights=FILE)   linear heads from the package lpips, VGG16 from the user's file
    build_perceptual("stlpips-alexnet" | "stlpips-vgg16")   complete weights from the package stlpips-pytorch

Both packages are located and read, never imported: they need torchvision, IPython and more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import BadInputError, UsageError
from ..models.files import abridged, misfits
from ..models.frozen import Frozen, given_file, package_file, read_state
from . import wide

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of [-1, 1] images, as LPIPS was fitted
MIN_HEIGHT = 48  # pixels; MedITok leaves the term out of smaller images
VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Blur(nn.Module):
    """Binomial 3x3 filter of stride 2 after a reflected border of 2 pixels (Zhang 2019, "Making convolutional networks
    shift-invariant again"; the wide border is the shift-tolerant variant's): n pixels a side become n // 2 + 1."""

    def __init__(self, width: int):
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.outer(row, row).repeat(width, 1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, [2, 2, 2, 2], mode="reflect"), self.kernel, stride=2, groups=x.shape[1])


class FeatureStack(Frozen):
    """Slices of a network applied one after another; gives the feature map (B, C, h, w) after each."""

    def __init__(self, slices: Sequence[nn.Sequential]):
        super().__init__()
        self.slices = nn.ModuleList(slices)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for part in self.slices:
            x = part(x)
            found.append(x)
        return found


def vgg16(shift_tolerant: bool = False) -> FeatureStack:
    """VGG16 (Simonyan & Zisserman 2015, configuration D) after relu1_2, 2_2, 3_3, 4_3 and 5_3."""
    slices, width = [], 3
    for number, widths in enumerate(VGG_WIDTHS):
        layers: list[nn.Module] = []
        if number and shift_tolerant:
            layers += [nn.MaxPool2d(2, stride=1), Blur(width)]
        elif number:
            layers += [nn.MaxPool2d(2)]
        for out_width in widths:
            layers += [nn.Conv2d(width, out_width, 3, padding=1), nn.ReLU()]
            width = out_width
        slices.append(nn.Sequential(*layers))
    return FeatureStack(slices)


def alexnet() -> FeatureStack:
    """Shift-tolerant AlexNet after each of its five ReLUs: strides are blurs, and the first comes before its ReLU."""

    def pool(width: int) -> list[nn.Module]:
        return [nn.MaxPool2d(3, stride=1), Blur(width)]

    return FeatureStack(
        [
            nn.Sequential(nn.Conv2d(3, 64, 11, padding=2), Blur(64), nn.ReLU()),
            nn.Sequential(*pool(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
            nn.Sequential(*pool(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        ]
    )


def feature_distance(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], heads: Sequence[torch.Tensor]
) -> torch.Tensor:
    """(B,): sum over layers of the mean over space of sum_c head_c (a^_c - b^_c)^2, a^ having length 1 over channels.

    a, b: a map (B, C, h, w) per layer; heads: non-negative weights (C,) per layer. Evaluated in float32 or better.
    """
    total = 0
    for x, y, head in zip(a, b, heads, strict=True):
        squares = (_unit(x) - _unit(y)).square()
        total = total + (squares * head.to(squares.dtype).view(-1, 1, 1)).sum(1).mean((1, 2))
    return total


def _unit(x: torch.Tensor) -> torch.Tensor:
    """x (B, C, h, w) over its length per pixel; the 1e-9 keeps the gradient finite where all channels are 0."""
    x = wide(x)
    return x / ((x.square().sum(1, keepdim=True) + 1e-9).sqrt() + 1e-10)


class PerceptualDistance(Frozen):
    """(reconstruction, images), each (B, 3, H, W) in [-1, 1], to the mean distance (): 0 under 48 pixels of height."""

    def __init__(self, features: FeatureStack, heads: Sequence[torch.Tensor]):
        super().__init__()
        self.features = features
        self.heads = nn.ParameterList(heads)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.freeze()

    def each(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distance per image, (B,), in float32 (or float64) whatever autocast says."""
        with torch.autocast(a.device.type, enabled=False):
            a, b = (self.features((wide(x) - self.shift) / self.scale) for x in (a, b))
            return feature_distance(a, b, self.heads)

    def forward(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        if images.shape[2] < MIN_HEIGHT:
            return reconstruction.new_zeros((), dtype=torch.float32)
        return self.each(reconstruction, images).mean()


def build_perceptual(net: str, weights: str | os.PathLike = "") -> PerceptualDistance:
    """ "lpips-vgg16" (weights: torchvision's VGG16 file), "stlpips-alexnet" or "stlpips-vgg16"; on the CPU, frozen.

    MissingPartError: package or file not there; BadInputError: weights that do not fit; UsageError: unknown name.
    """
    if net == "lpips-vgg16":
        passed = "--perceptual-weights=FILE, or use stlpips-vgg16"
        path = given_file(weights, "perceptual loss lpips-vgg16", "torchvision's vgg16-397923af.pth", passed)
        features = _filled(vgg16(), read_state(path, "features."), path, r"(\d+)\.")
        install = "pip install --no-deps lpips"  # it asks for torchvision, which its weights do not need
        heads_path = package_file("lpips", "weights/v0.1/vgg.pth", "perceptual loss lpips-vgg16", install)
        return PerceptualDistance(features, _heads(read_state(heads_path, "lin"), heads_path))
    networks = {"stlpips-alexnet": ("alex", alexnet), "stlpips-vgg16": ("vgg", lambda: vgg16(shift_tolerant=True))}
    if net not in networks:
        raise UsageError(f"perceptual loss {net!r}: unknown; choose lpips-vgg16, {' or '.join(networks)}")
    file, make = networks[net]
    path = package_file(
        "stlpips_pytorch",
        f"weights/vST0.0/{file}_shift_tolerant.pth",
        f"perceptual loss {net}",
        "pip install 'meditok[teachers]'",
    )
    features = _filled(make(), read_state(path, "net."), path, r"slice\d\.(\d+)\.")
    return PerceptualDistance(features, _heads(read_state(path, "lin"), path))


def _filled(stack: FeatureStack, state: dict[str, torch.Tensor], path: Path, number: str) -> FeatureStack:
    """`stack` with the convolutions of `state`, taken in the order of the layer number that `number` finds in a key."""
    order = {key: int(m[1]) for key in state if (m := re.match(number + "(weight|bias)$", key))}
    ours = list(stack.state_dict())
    theirs = sorted(order, key=lambda key: (order[key], key.endswith("bias")))
    renamed = {mine: state[key] for mine, key in zip(ours, theirs, strict=False)}
    if problems := misfits({key: value.shape for key, value in stack.state_dict().items()}, renamed):
        raise BadInputError(f"{path}: {len(theirs)} weights do not fit the network: " + abridged(problems))
    stack.load_state_dict(renamed)
    return stack


def _heads(state: dict[str, torch.Tensor], path: Path) -> list[torch.Tensor]:
    """The five linear heads of a file in LPIPS's layout, each (C,)."""
    try:
        heads = [state[f"{i}.model.1.weight"].flatten() for i in range(5)]
    except KeyError as error:
        raise BadInputError(f"{path}: no linear head 'lin{error.args[0]}'; install the package again") from None
    return heads
