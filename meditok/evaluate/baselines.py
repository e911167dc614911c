"""What a tokenizer has to beat: JPEG and JPEG 2000 in as many bytes as its ids take, and a PCA of patches.

All three code 8-bit values, which is what JPEG knows; their results are compared as the tokenizer's are. JPEG and JPEG
2000 see the picture without its padding, so no byte is spent on that.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..bulk.reading import PATCH
from ..data import MedicalImage
from ..data.windows import to_display8
from ..errors import UsageError
from .codecs import Coded

BASELINES = ("jpeg", "jpeg2000", "pca")
_SEARCH = 12  # halvings of the range of a JPEG 2000 rate


@dataclass
class PillowCodec:
    """JPEG or JPEG 2000 at the best quality whose file is no larger than `budget(height, width)` bytes of the fitted
    picture; where none is, at the least quality, which is counted."""

    name: str  # "jpeg" | "jpeg2000"
    side: int
    budget: Callable[[int, int], int]
    over: int = 0  # pictures whose smallest file is over the budget

    def __call__(self, fitted: MedicalImage) -> Coded:
        height, width = fitted.pixels.shape[1:]
        top, bottom, left, right = (max(0, side) for side in fitted.geometry.pad)
        inside = slice(top, height - bottom), slice(left, width - right)
        values = to_display8(fitted.pixels[(slice(None), *inside)])
        budget = self.budget(height, width)
        data = (best_jpeg if self.name == "jpeg" else best_jpeg2000)(_picture(values, fitted.channels), budget)
        self.over += len(data) > budget
        pixels = torch.full((1 if fitted.channels == 1 else 3, height, width), -1.0)
        pixels[(slice(None), *inside)] = _values(data)
        return Coded(pixels, len(data))

    def describe(self) -> dict:
        return {
            "kind": "baseline",
            "image_size": self.side,
            "budget_bytes": self.budget(self.side, self.side),
            "over_budget": self.over,
        }


def best_jpeg(picture, budget: int) -> bytes:
    """The JPEG (baseline, optimised Huffman tables, 4:2:0 in colour) of the best quality 1..95 within the budget."""
    low, high, best = 1, 95, None
    while low <= high:
        middle = (low + high) // 2
        data = _saved(picture, "JPEG", quality=middle, optimize=True)
        if len(data) <= budget:
            best, low = data, middle + 1
        else:
            high = middle - 1
    return best if best is not None else _saved(picture, "JPEG", quality=1, optimize=True)


def best_jpeg2000(picture, budget: int) -> bytes:
    """The irreversible JPEG 2000 file of the least compression within the budget; Pillow counts rates in raw bytes."""
    raw = picture.width * picture.height * len(picture.getbands())
    low, high, best = max(1.0, 0.5 * raw / budget), 4.0 * raw / budget, None
    for _ in range(_SEARCH):
        middle = (low * high) ** 0.5
        data = _saved(picture, "JPEG2000", quality_mode="rates", quality_layers=[middle], irreversible=True)
        if len(data) <= budget:
            best, high = data, middle
        else:
            low = middle
    return best if best is not None else data


def _saved(picture, fmt: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, fmt, **options)
    return file.getvalue()


def _picture(values: torch.Tensor, channels: int):
    from PIL import Image

    array = values[0].numpy() if channels == 1 else values.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)


def _values(data: bytes) -> torch.Tensor:
    """(C, H, W) in [-1, 1] of a picture file."""
    from PIL import Image

    array = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).float() / 127.5 - 1
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


class PatchPca:
    """Each 16 x 16 patch as the first components of a PCA, in 8 bits each: as many as the budget has bytes a patch.

    Component i is clipped to 4 standard deviations of the training patches and rounded to 255 steps. Grey pictures are
    coded as three equal channels, as tokenizers see them.
    """

    name = "pca"

    def __init__(self, side: int, budget: Callable[[int, int], int]):
        self.side = side
        self.components = budget(side, side) // (side // PATCH) ** 2
        self.images = 0
        size = 3 * PATCH * PATCH
        self._count, self._sum, self._products = 0, np.zeros(size), np.zeros((size, size))

    def fit(self, pictures: Iterable[MedicalImage]) -> PatchPca:
        """From fitted training pictures; padding counts, as it is coded too. UsageError: there is none."""
        for picture in pictures:
            patches = to_patches(picture.pixels).double().numpy()
            self._count += len(patches)
            self._sum += patches.sum(0)
            self._products += patches.T @ patches
            self.images += 1
        if not self.images:
            raise UsageError(
                "--baseline pca: is fitted on training images and no input states split train; give them as well"
            )
        mean = self._sum / self._count
        variances, vectors = np.linalg.eigh(self._products / self._count - np.outer(mean, mean))
        order = np.argsort(variances)[::-1][: self.components]
        self.mean = torch.from_numpy(mean).float()
        self.basis = torch.from_numpy(vectors[:, order].copy()).float()  # (768, n)
        self.step = torch.from_numpy(8 * np.sqrt(variances[order].clip(1e-12)) / 254).float()  # 4 deviations each way
        return self

    def __call__(self, fitted: MedicalImage) -> Coded:
        codes = ((to_patches(fitted.pixels) - self.mean) @ self.basis / self.step).round().clamp(-127, 127)
        patches = (codes * self.step) @ self.basis.T + self.mean
        height, width = fitted.pixels.shape[1:]
        pixels = from_patches(patches, height, width).clamp(-1, 1)
        return Coded(pixels.mean(0, keepdim=True) if fitted.channels == 1 else pixels, codes.numel())

    def describe(self) -> dict:
        return {
            "kind": "baseline",
            "image_size": self.side,
            "components": self.components,
            "fitted_on": self.images,
        }


def to_patches(pixels: torch.Tensor) -> torch.Tensor:
    """(3, H, W) -> (N, 768), patches in raster order."""
    rows = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (3, h, w, 16, 16)
    return rows.permute(1, 2, 0, 3, 4).reshape(-1, 3 * PATCH * PATCH)


def from_patches(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Inverse of to_patches."""
    grid = patches.reshape(height // PATCH, width // PATCH, 3, PATCH, PATCH)
    return grid.permute(2, 0, 3, 1, 4).reshape(3, height, width)
