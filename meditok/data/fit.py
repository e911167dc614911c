"""Fitting a picture to the size of the model, and back.

Resizing is antialiased bilinear in float32, after windowing. What was done is written into the geometry,
so that `unfit` lands on the input.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from meditok.data.geometry import displayed_size
from meditok.data.image import Geometry, MedicalImage
from meditok.errors import ShapeError, UsageError

_MAX_RESIZED = 2**26  # pixels; only a crop of a very thin picture comes near it
MODES = ("pad", "stretch", "crop", "tile", "none")


def fit(image: MedicalImage, size: int = 256, mode: str = "pad", multiple: int = 16) -> list[MedicalImage]:
    """Pictures of size x size made from `image`; several only for mode "tile".

    pad: the longer side becomes `size`, the rest is filled with -1, centred. stretch: both sides become
    `size`. crop: the shorter side becomes `size`, the centre is kept. tile: cut without overlap at native
    scale, edges filled with -1. none: left as it is, sides must be multiples of `multiple`.
    """
    if mode not in MODES:
        raise UsageError(f"fit={mode!r} is not known; choose one of {', '.join(MODES)}")
    if mode == "none":
        check_multiple(image.height, image.width, multiple, "picture")
        return [image]
    check_multiple(size, size, multiple, "size")
    if mode == "tile":
        return _tiles(image, size)
    height, width = image.height, image.width
    if mode == "stretch":
        rows, columns = size, size
    else:
        side = max(height, width) if mode == "pad" else min(height, width)
        rows, columns = max(1, round(height * size / side)), max(1, round(width * size / side))
    if rows * columns > _MAX_RESIZED:
        raise ShapeError(f"picture {height}x{width} is too thin to crop to {size}x{size}; use fit pad")
    top, left = (size - rows) // 2, (size - columns) // 2
    pad = (top, size - rows - top, left, size - columns - left)
    pixels = _resize(image.pixels, rows, columns, image.channels == 1)
    step = f"fit {mode} {height}x{width} to {rows}x{columns}, pad {' '.join(map(str, pad))}"
    geometry = replace(image.geometry, fit=mode, scale_y=rows / height, scale_x=columns / width, pad=pad)
    return [replace(image, pixels=_pad(pixels, pad), geometry=geometry, steps=[*image.steps, step])]


def unfit(pixels: torch.Tensor, geometry: Geometry, native_size: tuple[int, int] | None = None) -> torch.Tensor:
    """Undo `fit`: (3, h, w) -> (3, H, W) float32 at native size; what a crop removed comes back as -1.

    `native_size` is that of the picture given to `fit` (of the tile for "tile"); without it the size follows
    from the geometry, which for a tile means from its padding.
    """
    if geometry.fit == "none":
        return pixels
    top, bottom, left, right = geometry.pad
    inner = _pad(pixels, (-top, -bottom, -left, -right))
    if native_size is None:
        native_size = inner.shape[-2:] if geometry.fit == "tile" else displayed_size(geometry)
    return _resize(inner, int(native_size[0]), int(native_size[1]), grey=False)


def unpadded_mask(geometry: Geometry, height: int, width: int, patch: int = 16) -> torch.Tensor:
    """bool (height / patch, width / patch): True where a patch holds at least one pixel of the picture."""
    top, bottom, left, right = (max(0, side) for side in geometry.pad)
    mask = torch.zeros(height, width)
    mask[top : height - bottom, left : width - right] = 1
    return F.max_pool2d(mask[None], patch)[0] > 0


def check_multiple(height: int, width: int, multiple: int, what: str) -> None:
    """ShapeError naming the nearest legal size unless both sides are positive multiples of `multiple`."""
    if height <= 0 or width <= 0 or height % multiple or width % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        raise ShapeError(
            f"{what} {height}x{width} is not a multiple of {multiple} on both sides; nearest is "
            f"{near[0]}x{near[1]}, or let it be fitted"
        )


def _resize(pixels: torch.Tensor, rows: int, columns: int, grey: bool) -> torch.Tensor:
    pixels = pixels.to(torch.float32)
    if tuple(pixels.shape[-2:]) == (rows, columns):
        return pixels
    planes = pixels[:1] if grey else pixels  # a grey picture is resized once, not three times
    resized = F.interpolate(planes[None], size=(rows, columns), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].clamp_(-1, 1).expand(pixels.shape[0], rows, columns).contiguous()


def _pad(pixels: torch.Tensor, pad: tuple[int, int, int, int]) -> torch.Tensor:
    """Add (positive) or cut (negative) rows and columns: top, bottom, left, right; new pixels are -1."""
    if not any(pad):
        return pixels
    top, bottom, left, right = pad
    return F.pad(pixels, (left, right, top, bottom), value=-1.0)


def _tiles(image: MedicalImage, size: int) -> list[MedicalImage]:
    tiles = []
    for y in range(0, image.height, size):
        for x in range(0, image.width, size):
            rows, columns = min(size, image.height - y), min(size, image.width - x)
            pad = (0, size - rows, 0, size - columns)
            piece = image.pixels[:, y : y + rows, x : x + columns]
            step = f"fit tile y={y} x={x} {rows}x{columns}, pad {' '.join(map(str, pad))}"
            geometry = replace(image.geometry, fit="tile", scale_y=1.0, scale_x=1.0, pad=pad)
            tiles.append(
                replace(
                    image,
                    pixels=_pad(piece, pad).contiguous(),
                    geometry=geometry,
                    steps=[*image.steps, step],
                    tile=(y, x, rows, columns),
                )
            )
    return tiles
