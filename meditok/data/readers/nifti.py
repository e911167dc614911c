"""NIfTI-1 and NIfTI-2 volumes (.nii, .nii.gz), sliced along a voxel axis without resampling.

nibabel reads the header; sizes are checked against the limits before data is touched. An uncompressed file
is mapped; a compressed one is inflated once, in its stored type, under a cap and with its checksum verified.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from meditok._lazy import require
from meditok.data import geometry as geo
from meditok.data.image import MedicalImage
from meditok.data.options import ReadOptions, modality_code
from meditok.data.readers.blob import Blob
from meditok.data.readers.common import choose_window, replace_nonfinite, to_tensor
from meditok.data.readers.gzip_stream import inflate
from meditok.data.windows import ValueStatistics, Window
from meditok.errors import (
    CorruptImageError,
    GeometryError,
    HeaderMismatchError,
    IntensityError,
    NonFiniteError,
    ShapeError,
    UsageError,
)

_CHUNK = 2**22


class NiftiFile:
    """One NIfTI file; `frames` is the number of slices along the chosen plane."""

    def __init__(self, blob: Blob, options: ReadOptions):
        self.blob, self.options = blob, options
        self.where = blob.label
        self.syntax = "NIfTI gzip" if blob.read(0, 2) == b"\x1f\x8b" else "NIfTI"
        self.notes: list[str] = []
        self._read_header()
        self.modality = options.modality or sidecar_modality(blob)
        self._stated = self.modality is not None
        self.geometry = geo.volume_geometry(self.shape[:3], self._affine(), options.plane)
        self.frames = self.shape[self.geometry.axis]
        self.height, self.width = geo.displayed_size(self.geometry)
        options.limits.check_pixels(self.width, self.height, self.where)
        options.limits.check_frames(self.frames, self.where)

    def _read_header(self) -> None:
        nib = require("nibabel", "reading NIfTI")
        head = self._head(560)
        number = struct.unpack_from("<i", head)[0] if len(head) >= 348 else 0
        number = number if number in (348, 540) else struct.unpack(">i", struct.pack("<i", number))[0]
        kind = {348: nib.Nifti1Header, 540: nib.Nifti2Header}.get(number)
        if kind is None or len(head) < number:
            raise CorruptImageError(
                f"{self.where}: no complete NIfTI header in its {self.blob.size} bytes; get it again"
            )
        try:
            header = kind.from_fileobj(io.BytesIO(head[: 348 if number == 348 else 540]), check=False)
            self.dtype = header.get_data_dtype()
            shape = tuple(int(n) for n in header.get_data_shape())
            self.offset = int(header.get_data_offset())
        except (
            nib.spatialimages.HeaderDataError,
            nib.filebasedimages.ImageFileError,
            KeyError,
            ValueError,
        ) as error:
            raise HeaderMismatchError(
                f"{self.where}: NIfTI header fields dim or datatype are not valid; repair them"
            ) from error
        if bytes(header["magic"]).startswith(b"ni"):
            raise HeaderMismatchError(f"{self.where}: header of a .hdr/.img pair; convert it to one .nii file")
        if self.offset < header.single_vox_offset and self.offset != 0:
            raise HeaderMismatchError(f"{self.where}: vox_offset lies inside the header; repair the header")
        self.offset = max(self.offset, header.single_vox_offset)
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        self.shape = shape + (1,) * (3 - len(shape))
        if min(self.shape) <= 0 or len(self.shape) > 4:
            raise ShapeError(
                f"{self.where}: shape {shape} is not a volume or a series of volumes; select a volume first"
            )
        self.channels = 1
        if self.dtype.fields:
            self.channels = 3
            if len(self.dtype.fields) == 4:
                raise IntensityError(
                    f"{self.where}: NIfTI datatype RGBA32 has no stated rule here; convert it to RGB24"
                )
        elif self.dtype.kind not in "uif":
            raise IntensityError(f"{self.where}: NIfTI datatype {self.dtype} is not real numbers; save its magnitude")
        self.expected = self.dtype.itemsize * int(np.prod(self.shape, dtype=object))
        compressed = self.blob.size if self.syntax.endswith("gzip") else None
        self.options.limits.check_bytes(self.expected, self.where, compressed)
        self.header = header
        self._scaling()
        self._choose_time()

    def _head(self, count: int) -> bytes:
        raw = self.blob.read(0, 4096)
        if not self.syntax.endswith("gzip"):
            return raw[:count]
        try:
            return zlib.decompressobj(31).decompress(raw, count)
        except zlib.error as error:
            raise CorruptImageError(
                f"{self.where}: the gzip stream is damaged at its start; get the file again"
            ) from error

    def _scaling(self) -> None:
        slope, inter = float(self.header["scl_slope"]), float(self.header["scl_inter"])
        self.slope, self.inter = 1.0, 0.0
        if self.channels == 3:
            return
        if slope == 0 or not np.isfinite(slope):
            if not (slope == 0 and inter == 0) and not (np.isnan(slope) and np.isnan(inter)):
                self.notes.append(f"scl_slope is {slope:g}: values taken unscaled, as the standard says for 0")
            return
        if not np.isfinite(inter):
            raise HeaderMismatchError(
                f"{self.where}: scl_inter is not finite beside scl_slope {slope:g}; repair the header"
            )
        self.slope, self.inter = slope, inter

    def _choose_time(self) -> None:
        times = self.shape[3] if len(self.shape) == 4 else 1
        self.time = self.options.time_index
        if times == 1:
            self.time = 0
        elif self.time is None:
            raise ShapeError(f"{self.where}: 4-D with {times} time points; pass --time-index 0..{times - 1}")
        elif self.time >= times:
            raise UsageError(f"{self.where}: time index {self.time} is not in 0..{times - 1}")

    def _affine(self) -> np.ndarray:
        """sform if its code > 0, else qform, else refused unless assume_affine."""
        nib = require("nibabel", "reading NIfTI")
        sform = np.asarray(self.header.get_sform(), np.float64) if self.header["sform_code"] > 0 else None
        qform = None
        if self.header["qform_code"] > 0:
            try:
                qform = np.asarray(self.header.get_qform(), np.float64)
            except (nib.spatialimages.HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
                if sform is None:
                    raise GeometryError(f"{self.where}: the qform is not a rotation; correct the header") from error
                self.notes.append("the qform is not a rotation and is ignored; sform used")
        if sform is not None:
            self._affine_name = f"sform code {int(self.header['sform_code'])}"
            affine = geo.check_affine(sform, self.where)
            if qform is not None:
                corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], np.float64)
                corners[:, :3] *= np.array(self.shape[:3]) - 1
                gap = float(np.abs((affine - qform) @ corners.T)[:3].max())
                if gap > 1e-3:
                    self.notes.append(f"sform and qform disagree by up to {gap:.3g} mm; sform used")
        elif qform is not None:
            self._affine_name = f"qform code {int(self.header['qform_code'])}"
            affine = geo.check_affine(qform, self.where)
        elif self.options.assume_affine:
            self._affine_name = "assumed from voxel sizes"
            self.notes.append("no sform or qform: orientation assumed, left and right are not known")
            affine = geo.check_affine(self.header.get_base_affine(), self.where)
        else:
            raise GeometryError(
                f"{self.where}: sform and qform codes are 0, so left and right are not known; "
                "pass --assume-affine to go on"
            )
        directions = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
        if np.sort(directions, axis=0)[1].max() > 0.02:
            self.notes.append("oblique volume: sliced along the nearest voxel axis, not resampled")
        return affine

    @cached_property
    def _voxels(self) -> np.ndarray:
        """Stored values, (I, J, K[, T]) in Fortran order: mapped, or inflated once."""
        if not self.syntax.endswith("gzip"):
            held = self.blob.size - self.offset
            if held < self.expected:
                raise CorruptImageError(
                    f"{self.where}: {held} bytes of voxels of {self.expected} expected; the file is cut"
                )
            if self.blob.is_file:
                return np.memmap(self.blob.path, self.dtype, "r", self.offset, self.shape, order="F")
            data = self.blob.read(self.offset, self.expected)
            return np.frombuffer(data, self.dtype).reshape(self.shape, order="F")
        data = inflate(self.blob, self.offset + self.expected, self.options.limits)
        if len(data) < self.offset + self.expected:
            raise CorruptImageError(
                f"{self.where}: {max(0, len(data) - self.offset)} bytes of voxels of {self.expected} "
                "expected; "
                "the file is cut before compression"
            )
        return np.frombuffer(data, self.dtype, offset=self.offset, count=self.expected // self.dtype.itemsize).reshape(
            self.shape, order="F"
        )

    def _scaled(self, stored: np.ndarray) -> np.ndarray:
        if self.channels == 3:
            return np.stack([stored[name] for name in self.dtype.names], axis=-1)
        if (self.slope, self.inter) == (1.0, 0.0):
            return stored
        return stored.astype(np.float64) * self.slope + self.inter

    @cached_property
    def statistics(self) -> ValueStatistics:
        """Of every voxel of the file, all time points included."""
        found, deadline = ValueStatistics(), self.options.limits.deadline(self.where)
        flat = self._voxels.reshape(-1, order="F")
        for start in range(0, flat.size, _CHUNK):
            found.add(self._scaled(flat[start : start + _CHUNK]))
            deadline.check()
        if found.nonfinite and self.options.nonfinite == "error":
            raise NonFiniteError(
                f"{self.where}: {found.nonfinite} of {flat.size} voxels are NaN or infinite; "
                "repair the file or pass --nonfinite zero|min"
            )
        return found

    @cached_property
    def _intensity(self) -> tuple[Window, str, str, list[str]]:
        """(window, unit, modality, steps), the same for every slice."""
        steps = []
        if self.channels == 1 and (self.slope, self.inter) != (1.0, 0.0):
            steps.append(f"rescale slope={self.slope:g} intercept={self.inter:g}")
        if self.channels == 3:
            window = Window(0.0, 255.0, "full")
            return window, "display", self.modality or "other", [*steps, window.label]
        if not self._stated and self.statistics.minimum <= -500:
            raise IntensityError(
                f"{self.where}: values from {self.statistics.minimum:g} look like HU; pass --modality ct "
                "(or mr if they are not)"
            )
        if not self._stated:
            self.notes.append("modality not stated: read as MR, with a percentile window")
        ct = self.modality == "ct"
        if ct and self.dtype.itemsize == 1:
            raise IntensityError(f"{self.where}: ct needs HU; got 8-bit voxels; give the original volume")
        if self.dtype.kind == "f":
            _ = self.statistics  # counts non-finite voxels of the whole file before the first slice is given
        bias = self.options.ct_bias if ct else None
        if ct and bias is None and self.dtype.kind == "u" and self.inter >= 0 and self.statistics.minimum >= 0:
            self.notes.append("unsigned CT without a value below 0 HU: pass --ct-bias 1024 if 1024 was added")
        if bias:
            steps.append(f"ct bias {bias:g} subtracted")
            self.inter -= bias
            self.__dict__.pop("statistics", None)
        window = choose_window(
            self.options,
            self.where,
            ct=ct,
            auto=lambda: self.statistics.window(0.5, 99.5),
            full=self._full,
            statistics=lambda: self.statistics,
            file=self._display_range,
        )
        return window, "HU" if ct else "", self.modality or "mr", [*steps, window.label]

    def _full(self) -> Window:
        if self.dtype.kind == "f":
            return Window(self.statistics.minimum, self.statistics.maximum, "full", fixed=False)
        ends = [float(edge) * self.slope + self.inter for edge in (np.iinfo(self.dtype).min, np.iinfo(self.dtype).max)]
        return Window(min(ends), max(ends), "full")

    def _display_range(self) -> Window:
        low, high = float(self.header["cal_min"]), float(self.header["cal_max"])
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise IntensityError(f"{self.where}: cal_min and cal_max hold no window; use another --window than file")
        return Window(low, high, "file")

    def prepare(self) -> None:
        """Read what all slices share; an error here is one of the file, not of a slice."""
        _ = self._voxels, self._intensity

    def image(self, index: int) -> MedicalImage:
        """Slice `index` along geometry.axis, shown as a radiologist sees it."""
        window, unit, modality, steps = self._intensity
        volume = self._voxels[..., self.time] if len(self.shape) == 4 else self._voxels
        # basic indexing: take() would first copy the whole Fortran-ordered volume
        stored = np.asarray(volume[(slice(None),) * self.geometry.axis + (index,)])
        minimum = self.statistics.minimum if self.options.nonfinite == "min" and self.dtype.kind == "f" else None
        values, filled = replace_nonfinite(self._scaled(stored), self.options.nonfinite, self.where, minimum)
        if self.channels == 3:
            values = np.moveaxis(geo.to_display(np.moveaxis(values, -1, 0), self.geometry), 0, -1)
        else:
            values = geo.to_display(values, self.geometry)
        plane = f"sliced along voxel axis {self.geometry.axis}, plane {self.geometry.plane}"
        return MedicalImage(
            pixels=to_tensor(window.apply(values)),
            low=window.low,
            high=window.high,
            unit=unit,
            modality=modality,
            geometry=self.geometry,
            steps=[f"affine {self._affine_name}", plane, *filled, *steps],
            window=window.name,
            channels=self.channels,
            source=self.where,
            volume=self.blob.name if len(self.shape) == 3 else f"{self.blob.name}@{self.time}",
            slice=index,
            frame=index,
            position=geo.slice_position(self.geometry, index),
            warnings=list(self.notes),
        )


def sidecar_modality(blob: Blob) -> str | None:
    """Modality from a BIDS sidecar, NAME.json beside NAME.nii[.gz]."""
    if not blob.is_file:
        return None
    stem = blob.path[: -len(blob.suffix)] if blob.suffix else blob.path
    sidecar = Path(stem + ".json")
    if not sidecar.is_file() or sidecar.stat().st_size > 2**22:
        return None
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptImageError(f"{blob.label}: its sidecar .json cannot be read; repair or remove it") from error
    return modality_code(record["Modality"]) if isinstance(record, dict) and "Modality" in record else None
