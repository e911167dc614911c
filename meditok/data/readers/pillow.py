"""PNG, JPEG, TIFF and BMP through Pillow, with their bit depth kept.

Stated rules: palettes become RGB; an opaque alpha channel is dropped, a partly transparent picture is laid
over black with a warning, a wholly transparent one is refused; CMYK becomes RGB by Pillow's plain formula;
1-bit pictures are 0 and 1; EXIF rotation is applied; every page of a TIFF is a frame. 16-bit colour PNG and
TIFF are refused, because Pillow would cut them to 8 bits in silence.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from contextlib import contextmanager

import numpy as np

from meditok._lazy import require
from meditok.data.image import Geometry, MedicalImage
from meditok.data.options import Deadline, ReadOptions
from meditok.data.readers.blob import Blob
from meditok.data.readers.code_stream import check_scans
from meditok.data.readers.common import choose_window, replace_nonfinite, windowed
from meditok.data.windows import ValueStatistics, Window
from meditok.errors import CorruptImageError, ImageTooLargeError, IntensityError, MeditokError

_FORMATS = {"png": ["PNG"], "jpeg": ["JPEG"], "tiff": ["TIFF"], "bmp": ["BMP"]}
# What Pillow's decoders raise on broken files.
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, KeyError, TypeError, IndexError,
    OverflowError, ZeroDivisionError, RuntimeError,
)  # fmt: skip
# EXIF orientation -> (transpose, flip rows, flip columns), applied in this order.
_ORIENTATIONS = {
    2: (False, False, True), 3: (False, True, True), 4: (False, True, False), 5: (True, False, False),
    6: (True, False, True), 7: (True, True, True), 8: (True, True, False),
}  # fmt: skip


class _Timed(io.BytesIO):
    """Bytes that a decoder, which asks for them block by block, gets only while there is time left."""

    def __init__(self, data, deadline: Deadline):
        super().__init__(data)
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        self._deadline.check()
        return super().read(size)


class PictureFile:
    """One PNG, JPEG, TIFF or BMP file; `frames` is its number of pages."""

    def __init__(self, blob: Blob, options: ReadOptions, kind: str):
        self.blob, self.options, self.kind = blob, options, kind
        self.where = blob.label
        self.modality = options.modality or "other"
        self.syntax = kind.upper()
        self._data = blob.buffer()
        with self._opened() as picture:
            self.width, self.height = picture.size
            options.limits.check_pixels(self.width, self.height, self.where)
            # a JPEG's further pictures (MPF: previews, gain maps) are not frames of a series
            found = int(getattr(picture, "n_frames", 1))
            self.frames = 1 if kind == "jpeg" else found
            self._extra = found - self.frames
            options.limits.check_frames(self.frames, self.where)
            claimed = self.frames * self.width * self.height * len(picture.getbands())
            options.limits.check_expansion(claimed, len(self._data), self.where)
        if kind == "jpeg":
            check_scans(self._data, self.where)
        self._depth = _png_depth(self._data) if kind == "png" else None

    @contextmanager
    def _opened(self):
        """The Pillow image; whatever goes wrong inside the block becomes a named error."""
        pillow = require("PIL.Image", "reading PNG, JPEG, TIFF and BMP")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                timed = _Timed(self._data, self.options.limits.deadline(self.where))
                with pillow.open(timed, formats=_FORMATS[self.kind]) as picture:
                    yield picture
        except pillow.DecompressionBombError as error:
            raise ImageTooLargeError(
                f"{self.where}: the header claims more pixels than the limit of "
                f"{self.options.limits.max_pixels}; "
                "nothing was allocated; cut the picture into tiles"
            ) from error
        except MeditokError:
            raise
        except _BROKEN as error:
            raise CorruptImageError(self._broken_message()) from error

    def _broken_message(self) -> str:
        rows = _png_rows(self._data) if self.kind == "png" else None
        layout = ", or of a layout Pillow does not read" if self.kind == "tiff" else ""
        damaged = f"cut or damaged within its {len(self._data)} bytes{layout}"
        found = f"{rows[0]} of {rows[1]} rows can be read" if rows else damaged
        return f"{self.where}: {self.syntax} cannot be decoded in full, {found}; get the file again"

    def image(self, index: int) -> MedicalImage:
        """Page `index` as a MedicalImage."""
        steps, notes = [], []
        if self._extra:
            notes.append(f"{self._extra} further pictures inside this JPEG (previews, gain maps) left out")
        values, low, high = self._stored(index, steps, notes)
        values, filled = replace_nonfinite(values, self.options.nonfinite, self.where)
        steps += filled
        ct = self.modality == "ct" and not self.options.display
        unit = "stored" if high > 255 else "display"
        if ct:
            values, low, high = self._hounsfield(values, low, high, steps)
            unit = "HU"
        window = self._window(values, low, high, ct, notes)
        steps.append(window.label)
        return MedicalImage(
            pixels=windowed(values, window),
            low=window.low,
            high=window.high,
            unit=unit,
            modality=self.modality,
            geometry=Geometry(original_shape=tuple(values.shape[:2])),
            steps=steps,
            window=window.name,
            channels=3 if values.ndim == 3 else 1,
            source=self.where,
            frame=index,
            warnings=notes,
        )

    def _stored(self, index: int, steps: list[str], notes: list[str]) -> tuple[np.ndarray, float, float]:
        """Stored values (H, W) or (H, W, 3) and the range of their type."""
        with self._opened() as picture:
            if index:
                picture.seek(index)
                self.options.limits.check_pixels(*picture.size, self.where)
            self._refuse_deep_colour(picture)
            orientation = int(picture.getexif().get(274, 1) or 1)
            if self.kind == "tiff" and orientation in _ORIENTATIONS:  # Pillow turns a TIFF while loading it
                steps.append(f"orientation {orientation} applied")
            inverted = self.kind == "tiff" and picture.tag_v2.get(262) == 0 and picture.mode not in ("1", "L")
            picture.load()
            orientation = int(picture.getexif().get(274, 1) or 1)  # PNG may hold it behind the pixels
            values, bits = self._values(picture, steps, notes)
        if orientation in _ORIENTATIONS:
            transpose, rows, columns = _ORIENTATIONS[orientation]
            values = values.swapaxes(0, 1) if transpose else values
            values = values[:: -1 if rows else 1, :: -1 if columns else 1]
            steps.append(f"exif orientation {orientation} applied")
        low, high = self._range(values, bits, steps, notes)
        if inverted and high < np.inf:
            values = np.subtract(low + high, values, dtype=np.float64)
            steps.append("photometric interpretation 0 (white is zero) turned over")
        return values, low, high

    def _values(self, picture, steps: list[str], notes: list[str]) -> tuple[np.ndarray, int]:
        """Array and bits of its type: 1, 8, 16, 32; negative for signed integers, 0 for floats."""
        mode = picture.mode
        if mode == "1":
            return np.asarray(picture).astype(np.uint8), 1
        if mode.startswith("I;16"):
            steps.append("16 bit kept")
            return np.asarray(picture).astype(np.uint16), 16
        if mode == "I":
            return np.asarray(picture), self._integer_bits(picture)
        if mode == "F":
            return np.asarray(picture), 0
        if mode in ("L", "RGB") and "transparency" not in picture.info:
            return np.asarray(picture), 8
        if mode in ("CMYK", "YCbCr", "RGBX"):
            steps.append(f"{mode} converted to RGB")
            if mode == "CMYK":
                notes.append("CMYK converted by the plain formula, without its colour profile")
            return np.asarray(picture.convert("RGB")), 8
        if mode in ("P", "PA", "LA", "RGBA", "L", "RGB"):
            return self._flattened(picture, steps, notes), 8
        raise IntensityError(f"{self.where}: Pillow mode {mode} has no stated rule here; convert it to L or RGB first")

    def _flattened(self, picture, steps: list[str], notes: list[str]) -> np.ndarray:
        """Palette and alpha resolved: uint8 (H, W) or (H, W, 3)."""
        if picture.mode in ("P", "PA"):
            steps.append("palette converted to RGB")
        grey = picture.mode in ("L", "LA")
        with_alpha = np.asarray(picture.convert("LA" if grey else "RGBA"))
        colour, alpha = with_alpha[..., :-1], with_alpha[..., -1:]
        if alpha.min() == 255:
            if picture.mode != "P" or "transparency" in picture.info:
                steps.append("opaque alpha dropped")
        elif alpha.max() == 0:
            raise IntensityError(
                f"{self.where}: alpha is 0 everywhere (mode {picture.mode}), so nothing shows; drop "
                "the alpha channel first"
            )
        else:
            steps.append("alpha laid over black")
            notes.append("partly transparent, laid over black")
            colour = np.rint(colour * (alpha / 255.0)).astype(np.uint8)
        return colour[..., 0] if grey else colour

    def _integer_bits(self, picture) -> int:
        """Bits of mode I, which holds 16 and 32-bit, signed and unsigned TIFF and 16-bit PNG."""
        if self.kind == "png":
            return 16
        bits = int(_first(picture.tag_v2.get(258), 32))
        return -bits if _first(picture.tag_v2.get(339), 1) == 2 else bits

    def _refuse_deep_colour(self, picture) -> None:
        deep = self._depth is not None and self._depth[0] == 16 and self._depth[1] != 0
        if self.kind == "tiff" and len(picture.getbands()) > 1:
            deep = max(picture.tag_v2.get(258) or (8,)) > 8
        if deep:
            raise IntensityError(
                f"{self.where}: 16 bits per channel in mode {picture.mode} would be cut to 8; "
                "save the channels as 16-bit grey pictures, or as 8-bit colour"
            )

    def _range(self, values, bits: int, steps: list[str], notes: list[str]) -> tuple[float, float]:
        """The range of the type, or of sBIT / --bits."""
        if bits == 0:
            return -np.inf, np.inf
        low, high = (0.0, 2.0**bits - 1) if bits > 0 else (-(2.0 ** (-bits - 1)), 2.0 ** (-bits - 1) - 1)
        top = float(values.max())
        significant = self.options.bits
        if significant is None and self._depth is not None and bits == 16:
            significant = self._depth[2]
            if significant and top > 2**significant - 1:
                steps.append(f"sBIT {significant}: values already span 16 bits")
                significant = None
            elif significant:
                steps.append(f"sBIT {significant}")
        elif significant is not None:
            if top > 2**significant - 1:
                raise IntensityError(
                    f"{self.where}: holds {top:g}, more than bits={significant} allow; pass a larger --bits"
                )
            steps.append(f"bits {significant}")
        if significant:
            low, high = 0.0, 2.0**significant - 1
        if bits > 1 and top < high / 4 and self.modality != "ct":
            notes.append(f"the largest value {top:g} is under a quarter of the range {high:g}; --bits may be meant")
        return low, high

    def _hounsfield(self, values, low: float, high: float, steps: list[str]):
        if values.ndim == 3 or high <= 255:
            what = f"{8 if high == 255 else 1}-bit {self.syntax}"
            raise IntensityError(
                f"{self.where}: ct needs HU; got {what} {low:g}..{high:g}; "
                "give the DICOM, or another modality (option or column) if the picture only shows a CT"
            )
        bias = self.options.ct_bias
        if bias is None:
            if low == 0:
                raise IntensityError(
                    f"{self.where}: ct needs HU; got unsigned {self.syntax} {low:g}..{high:g} without "
                    "a rescale; "
                    "pass --ct-bias 1024 if 1024 was added to the HU (0 if none was)"
                )
            return values, low, high
        steps.append(f"ct bias {bias:g} subtracted")
        return values.astype(np.float64) - bias, low - bias, high - bias

    def _window(self, values, low: float, high: float, ct: bool, notes: list[str]) -> Window:
        def statistics() -> ValueStatistics:
            found = ValueStatistics()
            found.add(values)
            return found

        def auto() -> Window:
            if low == -np.inf:
                raise IntensityError(
                    f"{self.where}: float values {values.min():g}..{values.max():g} have no range of "
                    "their type; "
                    "pass --window LOW:HIGH or percentile"
                )
            if values.min() == values.max():
                notes.append("constant picture, mapped to -1")
                return Window(float(values.min()), float(values.min()), "constant", fixed=False)
            return Window(low, high, "full")

        return choose_window(self.options, self.where, ct=ct, auto=auto, full=auto, statistics=statistics)


def _first(value, default):
    """The first of a TIFF tag's values."""
    if value is None:
        return default
    return value[0] if isinstance(value, tuple) else value


def _png_chunks(data):
    """(type, offset, length) of each chunk, as far as the bytes go."""
    offset = 8
    while offset + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        yield kind, offset + 8, length
        offset += 12 + length


def _png_depth(data) -> tuple[int, int, int | None] | None:
    """(bit depth, colour type, significant bits by sBIT) of a PNG."""
    depth = None
    for kind, offset, length in _png_chunks(data):
        if kind == b"IHDR" and length == 13 and offset + 13 <= len(data):
            depth = (data[offset + 8], data[offset + 9], None)
        elif kind == b"sBIT" and depth and depth[1] in (0, 4) and length >= 1 and offset < len(data):
            if 1 <= data[offset] <= depth[0]:
                depth = (depth[0], depth[1], data[offset] if data[offset] < depth[0] else None)
        elif kind == b"IDAT":
            break
    return depth


def _png_rows(data) -> tuple[int, int] | None:
    """(rows that can be inflated, rows in the header) of a damaged, non-interlaced PNG."""
    if len(data) < 33 or bytes(data[12:16]) != b"IHDR":
        return None
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour)
    if interlace or channels is None:
        return None
    stride = 1 + (width * depth * channels + 7) // 8
    inflater, inflated = zlib.decompressobj(), 0
    for kind, offset, length in _png_chunks(data):
        if kind != b"IDAT":
            continue
        piece = bytes(data[offset : offset + length])
        try:
            while piece and inflated < stride * height:
                inflated += len(inflater.decompress(piece, 2**20))
                piece = inflater.unconsumed_tail
        except zlib.error:
            break
    return min(height, inflated // stride), height
