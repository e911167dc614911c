"""From images of any kind to the batch a model takes, and back: picklable, for DataLoader workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from meditok.data.arrays import as_numpy
from meditok.data.fit import check_multiple, fit, unfit
from meditok.data.image import Geometry, MedicalImage
from meditok.data.options import ReadOptions, read_options
from meditok.data.readers.blob import Blob
from meditok.data.readers.numpy import ArrayFile
from meditok.data.reading import frames
from meditok.errors import ShapeError, UsageError


@dataclass(frozen=True)
class Processor:
    """Fits pictures to size x size. `processor(images)` gives pixel_values, low, high and geometry."""

    size: int = 256
    multiple: int = 16

    def __post_init__(self):
        check_multiple(self.size, self.size, self.multiple, "size")

    def __call__(self, images, modality=None, window="auto", fit="pad", layout=None) -> dict:
        """A batch from paths, arrays, tensors, MedicalImages, or a list or iterator of any of them.

        -> {"pixel_values": float32 (B, 3, S, S) in [-1, 1], "low": float64 (B,), "high": float64 (B,),
        "geometry": list of B Geometry}. A file of several frames gives several rows, fit="tile" several
        rows a picture. Arrays are read as .npy files are. Raises the named errors of the readers.
        """
        options = read_options(None, modality=modality, window=window, layout=layout)
        return self.collate([piece for image in as_images(images, options) for piece in self.fit(image, fit)])

    def fit(self, image: MedicalImage, mode: str = "pad") -> list[MedicalImage]:
        """`fit` with this processor's size."""
        return fit(image, self.size, mode, self.multiple)

    def collate(self, images: Sequence[MedicalImage]) -> dict:
        """A batch of pictures that are fitted already."""
        sizes = {tuple(image.pixels.shape) for image in images}
        if len(sizes) > 1:
            raise ShapeError(f"pictures of {len(sizes)} sizes cannot form one batch; fit them first")
        shape = (0, 3, self.size, self.size)
        return {
            "pixel_values": torch.stack([image.pixels for image in images]) if images else torch.zeros(shape),
            "low": torch.tensor([image.low for image in images], dtype=torch.float64),
            "high": torch.tensor([image.high for image in images], dtype=torch.float64),
            "geometry": [image.geometry for image in images],
        }

    def post_process(self, pixel_values: torch.Tensor, batch: dict | Sequence[Geometry]) -> list[torch.Tensor]:
        """Undo the fitting: (B, 3, S, S) -> a list of float32 (3, H, W) at native size, still in [-1, 1].

        Tiles come back one by one. ShapeError: another number of pictures than of geometries.
        """
        geometries = batch["geometry"] if isinstance(batch, dict) else list(batch)
        if len(geometries) != len(pixel_values):
            raise ShapeError(
                f"{len(pixel_values)} pictures for {len(geometries)} geometries; pass the batch they came from"
            )
        return [unfit(pixels, geometry) for pixels, geometry in zip(pixel_values, geometries, strict=True)]

    def to_dict(self) -> dict:
        """What preprocessor_config.json holds."""
        return {
            "size": self.size,
            "multiple": self.multiple,
            "resample": "bilinear antialiased",
            "pad_value": -1.0,
        }

    @classmethod
    def from_dict(cls, record: dict) -> Processor:
        return cls(size=int(record["size"]), multiple=int(record.get("multiple", 16)))


def as_images(images, options: ReadOptions) -> list[MedicalImage]:
    """MedicalImages from one or many paths, arrays, tensors or MedicalImages."""
    if isinstance(images, (str, os.PathLike)):
        return list(frames(images, options=options))
    if isinstance(images, MedicalImage):
        return [images]
    if isinstance(images, (list, tuple, Iterator)):
        return [found for image in images for found in as_images(image, options)]
    if not hasattr(images, "shape") and not hasattr(images, "__array_interface__"):
        raise UsageError(f"images of type {type(images).__name__}; give paths, arrays, tensors or MedicalImages")
    array = _Array(images, options)
    return [array.image(index) for index in range(array.frames)]


class _Array(ArrayFile):
    """An array in memory, read under the rules of a .npy file: modality, window and layout count for it too."""

    def __init__(self, array, options: ReadOptions):
        self._given = as_numpy(array)
        super().__init__(Blob("array"), options)

    def _mapped(self) -> np.ndarray:
        return self._given
