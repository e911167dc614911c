"""DICOM files and series as pictures: the rule of each modality, and the record of every step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from meditok.data.image import Geometry, MedicalImage
from meditok.data.options import ReadOptions
from meditok.data.readers.blob import Blob
from meditok.data.readers.common import choose_window, replace_nonfinite, to_tensor
from meditok.data.readers.dicom_header import BODY_PARTS, Header, modality_of
from meditok.data.readers.dicom_pixels import PixelReader
from meditok.data.readers.dicom_series import Slice, Slot, arrange, slices_of
from meditok.data.readers.dicom_values import RealValues, file_voi, real_values
from meditok.data.windows import ValueStatistics, Window, parse_window
from meditok.errors import BadInputError, IntensityError, MeditokError

_PERCENTILE_RULE = ("mr", "pt", "nm")
_LOSSY = {
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.4.203",
}  # fmt: skip


class DicomFile:
    """One open file. Raises NotAnImageError, HeaderMismatchError, TruncatedDicomError or
    MissingDecoderError.
    """

    def __init__(self, blob: Blob, options: ReadOptions):
        self.options, self.where = options, blob.label
        self.header = Header(blob, options)
        self.header.require_image()
        self.header.check_pixels()
        self.modality = modality_of(self.header)
        self.ct = self.modality == "ct" and not options.display
        self.pixels = PixelReader(self.header)

    @cached_property
    def notes(self) -> list[str]:
        header, notes = self.header, [*self.header.notes, *self.pixels.notes]
        lossy = header.text(header.dataset, "LossyImageCompression") == "01" or str(header.syntax) in _LOSSY
        if lossy and self.ct:
            notes.append("lossy compressed CT: HU are approximate")
        burned = header.text(header.dataset, "BurnedInAnnotation").upper()
        if burned == "YES":
            notes.append("BurnedInAnnotation is YES: the pixels hold text, which tokens would keep")
        elif burned != "NO" and (self.modality in ("us", "other") or header.is_secondary):
            notes.append("may hold burned-in text, which tokens would keep; not checked")
        if self.options.plane not in ("axial", "native"):
            notes.append(f"plane {self.options.plane} is for volumes; DICOM slices are read as stored")
        return notes

    @cached_property
    def body_part(self) -> str:
        text = self.header.text(self.header.dataset, "BodyPartExamined").upper()
        return text.lower() if text in BODY_PARTS else ""

    def real(self, frame: int) -> RealValues:
        """A frame in real units, before any window. CT rules of CONTRACTS.md section 5 are applied here."""
        stored, steps = self.pixels.frame(frame)
        header = self.header
        if stored.ndim == 3:
            if stored.dtype.itemsize > 1:
                bits = header.stored_bits
                stored = stored.astype(np.float64) * (255 / (2.0**bits - 1))
                steps.append(f"colour of {bits} bits scaled to 0 255")
            return RealValues(stored, None, 0.0, 255.0, "display", False, steps, [])
        found = real_values(header, frame, stored)
        found.steps[:0] = steps
        if self.ct:
            self._check_hounsfield(found)
        where = f"{self.where} frame {frame}" if header.frames > 1 else self.where
        found.values, filled = replace_nonfinite(found.values, self.options.nonfinite, where)
        found.steps += filled
        if self.ct and self.options.ct_bias:
            found.values = found.values.astype(np.float64) - self.options.ct_bias
            found.steps.append(f"ct bias {self.options.ct_bias:g} subtracted")
        return found

    def _check_hounsfield(self, found: RealValues) -> None:
        header = self.header
        if header.stored_bits <= 8:
            raise IntensityError(
                f"{self.where}: ct needs HU; got {header.stored_bits}-bit DICOM "
                f"{found.low:g}..{found.high:g}; "
                "give the original series"
            )
        if not found.rescaled:
            if not header.is_ct_class:
                raise IntensityError(
                    f"{self.where}: ct needs HU; RescaleSlope (0028,1053) and RescaleIntercept "
                    "(0028,1052) are absent and "
                    f"this is {header.sop_class_name}; give the original series"
                )
            found.notes.append("no rescale in this CT: slope 1 and intercept 0 assumed")
            found.steps.append("rescale slope=1 intercept=0 assumed")
        if found.unit not in ("HU", "HU_MOD", "", "stored", "display", "NONE"):
            raise IntensityError(
                f"{self.where}: ct needs HU; RescaleType (0028,1054) is {found.unit}; give the HU series"
            )
        if not header.signed and header.stored_bits == 16 and found.values.max() > 32767 - 2048:
            found.notes.append("values above 30000 HU: signed data may be marked unsigned (PixelRepresentation)")
        found.unit = "HU"

    def voi(self, frame: int):
        """The file's own window for a frame, or None."""
        return file_voi(self.header, frame, self.options.window_index)

    @property
    def inverted(self) -> bool:
        header = self.header
        shape = header.text(header.dataset, "PresentationLUTShape").upper()
        return header.photometric == "MONOCHROME1" or (header.samples == 1 and shape == "INVERSE")


class DicomSeries:
    """Slices of one or more files in the order of their position; `frames` is their number."""

    def __init__(self, blobs: Sequence[Blob], options: ReadOptions, slices: list[Slice] | None = None):
        self.options = options
        self._open: tuple[str, DicomFile] | None = None
        if slices is None:
            slices = []
            for blob in blobs:
                slices += slices_of(self._file(blob).header)
        self.slots, self.warnings = arrange(slices)
        self.where = (
            blobs[0].label if len(blobs) == 1 else f"series of {len(blobs)} files beginning with {blobs[0].label}"
        )
        first = slices[0]
        self.modality, self.syntax = first.modality, first.syntax
        self.height, self.width = first.rows, first.columns
        self.frames = len(self.slots)

    def _file(self, blob: Blob) -> DicomFile:
        if self._open is None or self._open[0] != blob.label:
            self._open = (blob.label, DicomFile(blob, self.options))
        return self._open[1]

    @cached_property
    def statistics(self) -> ValueStatistics:
        """Of all finite, unpadded values of the series; slices that cannot be read fail by themselves."""
        found = ValueStatistics()
        for slot in self.slots:
            try:
                real = self._file(slot.source.blob).real(slot.source.frame)
            except MeditokError:
                self._unread += 1
                continue
            values = real.values if real.padding is None else real.values[~real.padding]
            found.add(values)
        return found

    _unread = 0

    @cached_property
    def _common_voi(self):
        """The window all slices share, or None. A broken one raises as it would for its slice."""
        shared = None
        for slot in self.slots:
            voi = slot.source.voi
            if isinstance(voi, BadInputError):
                raise voi
            if voi is None or (shared is not None and voi != shared):
                return None
            shared = voi
        return shared

    def _auto(self, file: DicomFile, real: RealValues, frame: int):
        full = Window(real.low, real.high, "full")
        if real.values.ndim == 3:
            return full
        if file.modality == "us":
            return full
        if file.modality in _PERCENTILE_RULE or real.values.dtype.kind == "f" and not real.rescaled:
            return self._common_voi or self.statistics.window(0.5, 99.5)
        return file.voi(frame) or full

    def image(self, index: int) -> MedicalImage:
        """Slice number `index` in the order of positions."""
        slot: Slot = self.slots[index]
        source = slot.source
        file = self._file(source.blob)
        real = file.real(source.frame)

        def own():
            voi = file.voi(source.frame)
            if voi is None:
                raise IntensityError(f"{file.where}: holds no window of its own; use another --window than file")
            return voi

        window = choose_window(
            self.options,
            file.where,
            ct=file.ct and real.values.ndim == 2,
            auto=lambda: self._auto(file, real, source.frame),
            full=lambda: Window(real.low, real.high, "full"),
            statistics=lambda: self.statistics,
            file=own,
        )
        notes = [*file.notes, *real.notes]
        if file.ct and parse_window(self.options.window).kind == "percentile":
            notes.append("percentile window on CT: equal HU of different series get different values")
        steps = [*real.steps, window.label]
        pixels = window.apply(real.values)
        if file.inverted and pixels.ndim == 2:
            np.negative(pixels, out=pixels)
            steps.append(
                "invert MONOCHROME1" if file.header.photometric == "MONOCHROME1" else "invert PresentationLUTShape"
            )
        if real.padding is not None:
            pixels[real.padding] = -1.0
        return MedicalImage(
            pixels=to_tensor(pixels),
            low=window.low,
            high=window.high,
            unit=window.unit if window.unit is not None else real.unit,
            modality=file.modality,
            geometry=slot.geometry or Geometry(original_shape=(source.rows, source.columns)),
            steps=steps,
            window=window.name,
            channels=3 if pixels.ndim == 3 else 1,
            body_part=file.body_part,
            source=source.blob.label,
            volume=slot.volume,
            slice=slot.index,
            frame=source.frame,
            position=slot.position,
            warnings=notes,
        )
