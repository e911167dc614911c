"""What every reader returns: a picture in [-1, 1] and the record of how it came about."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch


@dataclass(frozen=True)
class Geometry:
    """Where a picture lies in its source, and how it was fitted to the model.

    The fields are those of the `geometry` struct of the token file, one to one. World coordinates are
    RAS+ millimetres. `affine` maps the voxel (i, j, k) of the original grid, row-major 4 x 4.
    """

    original_shape: tuple[int, ...]  # (H, W) of a picture; voxel grid (I, J, K) of a volume
    axis: int = -1  # voxel axis that was sliced; -1 for a picture
    plane: str = ""  # axial | coronal | sagittal | native | "" (picture)
    fit: str = "none"  # none | pad | stretch | crop | tile
    scale_y: float = 1.0  # fitted height / native height
    scale_x: float = 1.0  # fitted width / native width
    pad: tuple[int, int, int, int] = (
        0,
        0,
        0,
        0,
    )  # top, bottom, left, right in fitted pixels; negative = cropped
    spacing: tuple[float, float, float] | None = None  # mm per voxel along i, j, k
    affine: tuple[float, ...] | None = None  # 16 numbers
    space: str = "RAS+mm"

    def to_dict(self) -> dict:
        """Plain lists and numbers, as the token file stores them."""
        record = asdict(self)
        for name in ("original_shape", "pad", "spacing", "affine"):
            record[name] = None if record[name] is None else list(record[name])
        return record

    @classmethod
    def from_dict(cls, record: dict) -> Geometry:
        """Inverse of `to_dict`; unknown keys are an error, missing ones take their default."""
        values = dict(record)
        for name in ("original_shape", "pad", "spacing", "affine"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)


@dataclass
class MedicalImage:
    """One picture at its native size: a photograph, a DICOM frame, a slice of a volume.

    `pixels` is float32 (3, H, W) in [-1, 1]; -1 stands for `low` and +1 for `high`, in `unit`, unless
    `steps` records an inversion. Grey pictures have three equal channels and `channels` = 1.
    """

    pixels: torch.Tensor
    low: float
    high: float
    unit: str = ""  # "HU", "display" (0..255), "stored", "BQML", ... or ""
    modality: str = "other"  # one of options.MODALITIES
    geometry: Geometry = field(default_factory=lambda: Geometry(original_shape=(0, 0)))
    steps: list[str] = field(default_factory=list)  # every step taken, in order
    window: str = ""  # name, or "low:high"
    channels: int = 1  # 1 or 3 in the source
    body_part: str = ""
    source: str = ""  # what the user gave; for terminals only
    volume: str = ""  # raw key of the series or volume; written only as a keyed hash
    slice: int | None = None  # index along geometry.axis
    frame: int = 0
    position: float | None = None  # mm along the slice normal
    tile: tuple[int, int, int, int] | None = None  # y, x, h, w in native pixels
    warnings: list[str] = field(default_factory=list)

    @property
    def height(self) -> int:
        return int(self.pixels.shape[-2])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[-1])
