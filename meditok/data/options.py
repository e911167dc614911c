"""What may be asked of a reader, and the limits it works under."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace

from meditok.errors import ImageTooLargeError, UnsafeFileError, UsageError

MODALITIES = (
    "ct", "mr", "us", "xr", "mg", "nm", "pt", "fundus", "endoscopy", "dermoscopy", "histology", "microscopy",
    "oct", "other",
)  # fmt: skip

# Other spellings met in manifests and published identifiers.
_ALIASES = {
    "mri": "mr", "ultrasound": "us", "x-ray": "xr", "xray": "xr", "x_ray": "xr", "cxr": "xr", "cr": "xr",
    "dx": "xr", "rf": "xr", "xa": "xr", "rg": "xr", "mammography": "mg", "mammo": "mg", "pet": "pt",
    "nuclear": "nm", "spect": "nm",
    "pathology": "histology", "histopathology": "histology", "he": "histology",
    "derm": "dermoscopy", "retina": "fundus",
    "cfp": "fundus", "endo": "endoscopy", "microscope": "microscopy",
}  # fmt: skip


def modality_code(text: object) -> str | None:
    """The contract's code for a modality written in any usual way; None for an unknown one."""
    code = str(text).strip().lower()
    code = _ALIASES.get(code, code)
    return code if code in MODALITIES else None


@dataclass(frozen=True)
class Limits:
    """Caps checked from the header before anything is allocated. Never raised globally."""

    max_pixels: int = 2**26  # pixels of one frame, e.g. 8192 x 8192
    max_frames: int = 2**16
    max_bytes: int = 2**31  # of a file once inflated
    max_ratio: int = 200  # inflated / compressed bytes, once more than ratio_from bytes came out
    ratio_from: int = 2**25
    seconds: float = 120.0  # per file

    def check_pixels(self, width: int, height: int, where: str) -> None:
        """ImageTooLargeError if one frame of width x height pixels is over the limit."""
        if width * height > self.max_pixels:
            raise ImageTooLargeError(
                f"{where}: the header claims {width} x {height} pixels, over the limit of {self.max_pixels}; "
                "nothing was allocated; cut it into tiles, or raise Limits.max_pixels if you trust the file"
            )

    def check_frames(self, frames: int, where: str) -> None:
        """ImageTooLargeError if the header claims more frames than the limit."""
        if frames > self.max_frames:
            raise ImageTooLargeError(
                f"{where}: the header claims {frames} frames, over the limit of {self.max_frames}; "
                "nothing was allocated; split the file, or raise Limits.max_frames if you trust it"
            )

    def check_bytes(self, count: int, where: str, compressed: int | None = None) -> None:
        """UnsafeFileError if `count` inflated bytes, out of `compressed` ones, are more than allowed."""
        if count > self.max_bytes:
            raise ImageTooLargeError(
                f"{where}: {count} bytes of data, over the limit of {self.max_bytes}; "
                "split the file, or raise Limits.max_bytes if you trust it"
            )
        if compressed and count > self.ratio_from and count > self.max_ratio * compressed:
            raise UnsafeFileError(
                f"{where}: {compressed} compressed bytes would inflate to {count} or more, over the limit of "
                f"{self.max_ratio} times; store it uncompressed if you trust it"
            )

    def check_expansion(self, count: int, compressed: int, where: str) -> None:
        """UnsafeFileError if all pictures of a file together, `count` bytes, are far more than the file can hold."""
        if count > self.max_bytes and count > self.max_ratio * compressed:
            raise UnsafeFileError(
                f"{where}: {compressed} compressed bytes claim pictures of {count} bytes, over the limit of "
                f"{self.max_ratio} times; it was not read; split the file, or raise Limits.max_ratio if you trust it"
            )

    def deadline(self, where: str) -> Deadline:
        """A clock for one file."""
        return Deadline(self.seconds, where)


class Deadline:
    """Raises UnsafeFileError from `check` once the time for a file is spent."""

    def __init__(self, seconds: float, where: str):
        self._end = time.monotonic() + seconds
        self._seconds = seconds
        self._where = where

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise UnsafeFileError(
                f"{self._where}: not read within {self._seconds:g} s, the limit for one file; "
                "raise Limits.seconds if you trust it"
            )


@dataclass(frozen=True)
class ReadOptions:
    """How files are to be read; the names are those of the command line (docs: CONTRACTS sections 3, 5)."""

    modality: str | None = None  # for files that do not state it
    window: str = "auto"  # auto | NAME | file | full | percentile[:P:Q] | LOW:HIGH
    window_index: int = 0  # which of several windows in a DICOM header
    ct_bias: float | None = None  # stored value - ct_bias = HU, for pictures that hold shifted HU
    nonfinite: str = "error"  # error | zero | min
    bits: int | None = None  # significant bits of a PNG or TIFF
    plane: str = "axial"  # axial | coronal | sagittal | native, for volumes
    series: str | None = None  # SeriesInstanceUID or SeriesNumber
    frame: int | None = None
    time_index: int | None = None
    include_secondary: bool = False
    assume_syntax: str | None = None
    assume_affine: bool = False
    layout: str | None = None  # of arrays: HW | HWC | CHW | DHW | BHWC | BCHW
    display: bool = False  # values are as displayed (windowed before), whatever the modality
    mixed: bool = False  # one of several inputs: a CT window leaves other modalities to their own rule
    limits: Limits = Limits()

    def __post_init__(self):
        if self.modality is not None:
            code = modality_code(self.modality)
            if code is None:
                raise UsageError(f"modality {self.modality!r} is not known; choose one of {', '.join(MODALITIES)}")
            object.__setattr__(self, "modality", code)
        _one_of("nonfinite", self.nonfinite, ("error", "zero", "min"))
        _one_of("plane", self.plane, ("axial", "coronal", "sagittal", "native"))
        _one_of("layout", self.layout, (None, "HW", "HWC", "CHW", "DHW", "BHWC", "BCHW"))
        if self.bits is not None and not 1 <= self.bits <= 32:
            raise UsageError(f"bits={self.bits} is not in 1..32")
        for name in ("frame", "time_index", "window_index"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UsageError(f"{name}={getattr(self, name)} is negative; counting starts at 0")
        from meditok.data.windows import parse_window

        parse_window(self.window)


def read_options(options: ReadOptions | None = None, **keywords) -> ReadOptions:
    """ReadOptions from keywords; an unknown name is a UsageError listing the known ones."""
    known = [item.name for item in fields(ReadOptions)]
    for name in keywords:
        if name not in known:
            raise UsageError(f"option {name!r} is not known; known options: {', '.join(known)}")
    return replace(options, **keywords) if options is not None else ReadOptions(**keywords)


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise UsageError(f"{name}={value!r} is not known; choose one of {', '.join(map(str, allowed))}")
