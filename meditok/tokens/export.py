"""Writing decoded pictures: PNG of 8 or 16 bits, NumPy arrays, NIfTI volumes. Headers start empty."""

from __future__ import annotations

import filecmp
import gzip
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .._lazy import require
from ..atomic import atomic_path
from ..errors import UsageError
from .layout import FORMATS, Layout, Run
from .restore import Restored
from .schema import Description

if TYPE_CHECKING:
    from ..data import MedicalImage

VALUES = ("display", "native")


class PictureWriter:
    """Writes restored pictures into a folder, each file atomically.

    `values` "display" gives 8 bits (16 for png16) of the window; "native" undoes the window: int16 for CT in
    HU, else float32 (PNG: the stored integers). By default volumes and arrays are native, pictures for
    display. A file that is there already with other bytes is a UsageError unless `overwrite`.
    """

    def __init__(self, out: str | os.PathLike, layout: Layout, values: str | None = None, *, overwrite: bool = False):
        if values not in (None, *VALUES):
            raise UsageError(f"--values {values}: unknown; choose one of {', '.join(VALUES)}")
        self.out, self.layout, self.values, self.overwrite = Path(out), layout, values, overwrite
        self.pictures = self.volumes = self.kept = 0
        self.wrote_native = False
        self._open: dict[str, _Stack] = {}
        self._names: set[str] = set()

    def write(self, picture: Restored) -> None:
        """Write one picture; a volume is written with its last slice."""
        row, run = picture.row, self.layout.runs.get(picture.row.id)
        if run is None:
            fmt = self.layout.format_of(row, self.values)
            array = self._picture_values(picture.image, row, fmt)
            self._save(self.layout.name_of(row) + FORMATS[fmt], lambda path: _ENCODERS[fmt](path, array))
            self.pictures += 1
            return
        values = self.values or "native"
        self.wrote_native |= values == "native"
        stack = self._open.setdefault(run.name, _Stack(run, picture.image, values))
        stack.add(picture.image)
        if stack.missing == 0:
            self._save(run.name + ".nii.gz", stack.save)
            del self._open[run.name]
            self.volumes += 1

    def _picture_values(self, image: MedicalImage, row: Description, fmt: str) -> np.ndarray:
        native = (self.values or ("native" if fmt == "npy" else "display")) == "native"
        self.wrote_native |= native
        if fmt == "npy":
            array = native_values(image) if native else display_values(image, 8)
        else:
            bits = 16 if fmt == "png16" else 8
            array = _stored_integers(image, bits) if native else display_values(image, bits)
        return array[0] if row.channels == 1 else np.moveaxis(array, 0, -1)

    def _save(self, name: str, write: Callable[[Path], None]) -> None:
        if name in self._names:
            raise UsageError(f"{name}: two rows would be written to this file; their ids are equal")
        self._names.add(name)
        target = self.out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not self.overwrite:
            draft = target.with_name(f".{target.name}.check.tmp")
            try:
                write(draft)
                if not filecmp.cmp(draft, target, shallow=False):
                    raise UsageError(
                        f"{target}: is there already and differs; pass --overwrite to replace it, or choose "
                        "another folder"
                    )
            finally:
                draft.unlink(missing_ok=True)
            self.kept += 1
            return
        with atomic_path(target) as temporary:
            write(temporary)


class _Stack:
    """A volume being filled slice by slice, in the voxel order and grid of its source."""

    def __init__(self, run: Run, image: MedicalImage, values: str):
        self.run, self.geometry, self.values, self.missing = run, image.geometry, values, run.count
        shape = list(image.geometry.original_shape[:3])
        shape[image.geometry.axis] = run.count
        self.array = np.zeros(shape, np.uint8 if values == "display" else _native_dtype(image.unit))

    def add(self, image: MedicalImage) -> None:
        from ..data.geometry import from_display

        plane = display_values(image, 8) if self.values == "display" else native_values(image)
        index = [slice(None)] * 3
        index[self.geometry.axis] = image.slice - self.run.first
        self.array[tuple(index)] = from_display(plane[0], self.geometry)
        self.missing -= 1

    def save(self, path: Path) -> None:
        """NIfTI with nothing in its header but shape, type, affine and the unit mm."""
        require("nibabel", purpose="writing NIfTI volumes")
        import nibabel

        affine = np.array(self.geometry.affine, dtype=np.float64).reshape(4, 4)
        affine[:3, 3] += affine[:3, self.geometry.axis] * self.run.first
        kind = nibabel.Nifti1Image if max(self.array.shape) < 2**15 else nibabel.Nifti2Image
        image = kind(self.array, affine)
        image.set_sform(affine, code=1)
        try:
            image.set_qform(affine, code=1, strip_shears=False)
        except nibabel.spatialimages.HeaderDataError:
            image.set_qform(None)  # sheared: only the sform can say it
        image.header.set_xyzt_units("mm")
        with open(path, "wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:
            image.to_stream(stream)


def display_values(image: MedicalImage, bits: int) -> np.ndarray:
    """(C, H, W) uint8 or uint16: -1 is 0, +1 the largest value, rounded."""
    from ..data.windows import to_display8, to_display16

    pixels = image.pixels[:1] if image.channels == 1 else image.pixels
    if bits == 8:
        return to_display8(pixels).numpy()
    return to_display16(pixels).numpy().astype(np.uint16)


def native_values(image: MedicalImage) -> np.ndarray:
    """(C, H, W) in the source's unit: int16 for HU, else float32. What lay outside the window is lost."""
    from ..data.windows import to_native

    pixels = image.pixels[:1] if image.channels == 1 else image.pixels
    values = to_native(pixels, image.low, image.high, image.steps).numpy()
    dtype = _native_dtype(image.unit)
    if dtype is np.int16:
        return np.clip(np.rint(values), -32768, 32767).astype(np.int16)
    return values.astype(dtype)


def _native_dtype(unit: str) -> type:
    return np.int16 if unit == "HU" else np.float32


def _stored_integers(image: MedicalImage, bits: int) -> np.ndarray:
    values = np.rint(native_values(image))
    return np.clip(values, 0, 2**bits - 1).astype(np.uint8 if bits == 8 else np.uint16)


def _save_png(path: Path, array: np.ndarray) -> None:
    """(H, W) or (H, W, 3), uint8 or uint16, without metadata."""
    if array.ndim == 3 and array.dtype == np.uint16:
        _save_png_rgb16(path, array)
        return
    require("PIL.Image", purpose="writing PNG pictures")
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(array)).save(path, format="PNG")


def _save_png_rgb16(path: Path, array: np.ndarray) -> None:
    # Pillow has no 16-bit colour mode. Format: PNG specification (ISO/IEC 15948), filter 0 on every line.
    height, width, _ = array.shape
    lines = np.zeros((height, 1 + width * 6), np.uint8)
    lines[:, 1:] = array.astype(">u2").reshape(height, -1).view(np.uint8)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
        + chunk(b"IEND", b"")
    )


def _save_npy(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)


_ENCODERS = {"png": _save_png, "png16": _save_png, "npy": _save_npy}
