"""The header of a DICOM file as checked numbers; messages name tags and never quote their text."""

from __future__ import annotations

import io
import logging
import math
import struct
import warnings
from contextlib import contextmanager
from functools import cached_property

from meditok._lazy import require
from meditok.data.options import ReadOptions
from meditok.data.readers.blob import Blob
from meditok.data.readers.dicom_walk import Layout, locate
from meditok.errors import CorruptImageError, HeaderMismatchError, NotAnImageError

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_CT_CLASSES = {"1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"}
# Grids of labels or doses: pixel data, but no picture of a patient.
_NOT_PICTURES = {
    "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7", "1.2.840.10008.5.1.4.1.1.481.2",
}  # fmt: skip
_DICOMDIR = "1.2.840.10008.1.3.10"

MODALITY_OF = {
    "CT": "ct", "MR": "mr", "US": "us", "IVUS": "us",
    "CR": "xr", "DX": "xr", "RG": "xr", "XA": "xr", "RF": "xr",
    "PX": "xr", "IO": "xr", "MG": "mg", "NM": "nm", "PT": "pt", "OP": "fundus", "ES": "endoscopy",
    "DMS": "dermoscopy", "SM": "histology", "GM": "microscopy", "OPT": "oct", "IVOCT": "oct",
}  # fmt: skip
# Defined terms that may be written out; anything else typed into these tags is left out.
UNITS = {
    "HU", "OD", "US", "MGML", "Z_EFF", "ED", "EDW",
    "HU_MOD", "PCT", "BQML", "CNTS", "PROPCNTS", "GML", "CM2ML",
    "NONE", "KBQML", "MGMINML", "UMOLMINML", "MLMING", "MLG", "1CM", "STDDEV", "SUV",
}  # fmt: skip
BODY_PARTS = {
    "ABDOMEN", "ABDOMENPELVIS", "ADRENAL", "ANKLE", "AORTA",
    "ARM", "AXILLA", "BACK", "BLADDER", "BRAIN", "BREAST",
    "BRONCHUS", "BUTTOCK", "CALCANEUS", "CALF", "CAROTID", "CEREBELLUM", "CERVIX", "CHEEK", "CHEST",
    "CHESTABDOMEN", "CHESTABDPELVIS", "CLAVICLE", "COCCYX", "COLON", "CSPINE", "CTSPINE", "EAR", "ELBOW",
    "ESOPHAGUS", "EXTREMITY", "EYE", "EYELID", "FACE",
    "FEMUR", "FINGER", "FOOT", "GALLBLADDER", "HAND", "HEAD",
    "HEADNECK", "HEART", "HIP", "HUMERUS", "ILEUM", "ILIUM",
    "JAW", "JEJUNUM", "KIDNEY", "KNEE", "LARYNX", "LEG",
    "LIVER", "LSPINE", "LSSPINE", "LUNG", "MAXILLA",
    "MEDIASTINUM", "MOUTH", "NECK", "NECKCHEST", "NOSE", "ORBIT",
    "OVARY", "PANCREAS", "PAROTID", "PATELLA", "PELVIS", "PENIS", "PHARYNX", "PROSTATE", "RECTUM", "RIB",
    "SACRUM", "SCALP", "SCLERA", "SCROTUM", "SHOULDER", "SKULL", "SPINE", "SPLEEN", "SSPINE", "STERNUM",
    "STOMACH", "TESTIS", "THIGH", "THUMB", "THYMUS", "THYROID", "TLSPINE", "TMJ", "TOE", "TONGUE", "TRACHEA",
    "TSPINE", "UTERUS", "VAGINA", "VULVA", "WHOLEBODY", "WRIST", "ZYGOMA",
}  # fmt: skip
PHOTOMETRIC = {
    "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT",
    "YBR_PARTIAL_422", "YBR_PARTIAL_420",
}  # fmt: skip

PARSER_ERRORS = (
    ValueError, TypeError, KeyError, AttributeError, EOFError, OverflowError, NotImplementedError, IndexError,
    struct.error, RecursionError, ArithmeticError, OSError, RuntimeError,
)  # fmt: skip


_quiet_depth = 0


@contextmanager
def quiet():
    """Silences pydicom, whose warnings and log lines quote the values of tags. May be nested."""
    global _quiet_depth
    if _quiet_depth:
        yield
        return
    logger = logging.getLogger("pydicom")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # without any, Python would print to stderr
    propagate, logger.propagate = logger.propagate, False
    _quiet_depth += 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _quiet_depth -= 1
        logger.propagate = propagate


class Header:
    """Parsed header of one file, with what its pixels need checked. Raises the errors of `locate` and
    HeaderMismatchError for tags that contradict each other, NotAnImageError without pixels."""

    def __init__(self, blob: Blob, options: ReadOptions):
        pydicom = require("pydicom", "reading DICOM")
        from pydicom.filereader import read_dataset

        self.blob, self.where, self.options = blob, blob.label, options
        self.layout: Layout = locate(blob, options.limits, options.assume_syntax)
        self.notes = list(self.layout.notes)
        body = bytes(self.layout.data[self.layout.start : self.layout.header_end])
        try:
            with quiet():
                self.dataset = read_dataset(io.BytesIO(body), self.layout.implicit, self.layout.little)
        except PARSER_ERRORS as error:
            raise CorruptImageError(f"{self.where}: the DICOM header cannot be parsed; the file is damaged") from error
        self.syntax = pydicom.uid.UID(self.layout.syntax)
        self.sop_class = self.text(self.dataset, "SOPClassUID")

    # -- typed access -------------------------------------------------------------------------------------
    def value(self, item, keyword: str):
        """The value of a tag, None if absent or empty; HeaderMismatchError if it is not of its VR."""
        if keyword not in item:
            return None
        try:
            with quiet():
                value = item.get(keyword)
        except PARSER_ERRORS as error:
            raise self.mismatch("is not valid for its type", keyword) from error
        return None if value is None or (hasattr(value, "__len__") and len(value) == 0) else value

    def numbers(self, item, keyword: str) -> list[float]:
        """All values of a numeric tag as finite floats."""
        value = self.value(item, keyword)
        if value is None:
            return []
        values = list(value) if hasattr(value, "__iter__") and not isinstance(value, (str, bytes)) else [value]
        try:
            numbers = [float(entry) for entry in values]
        except (TypeError, ValueError) as error:
            raise self.mismatch("is not a number", keyword) from error
        if not all(math.isfinite(number) for number in numbers):
            raise self.mismatch("is not finite", keyword)
        return numbers

    def number(self, item, keyword: str, default: float | None = None) -> float | None:
        values = self.numbers(item, keyword)
        return values[0] if values else default

    def integer(self, item, keyword: str, default: int | None = None) -> int | None:
        value = self.number(item, keyword)
        if value is None:
            return default
        if value != int(value):
            raise self.mismatch("is not a whole number", keyword)
        return int(value)

    def text(self, item, keyword: str) -> str:
        value = self.value(item, keyword)
        if value is None:
            return ""
        if not isinstance(value, str) and hasattr(value, "__iter__"):
            value = next(iter(value), "")
        return str(value).strip("\0 ")

    def sequence(self, item, keyword: str) -> list:
        value = self.value(item, keyword)
        if value is None:
            return []
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise self.mismatch("is not a sequence", keyword)
        return list(value)

    def mismatch(self, what: str, *keywords: str) -> HeaderMismatchError:
        from pydicom.datadict import tag_for_keyword

        names = ", ".join(
            f"{keyword} ({tag >> 16:04X},{tag & 0xFFFF:04X})"
            for keyword in keywords
            for tag in [tag_for_keyword(keyword) or 0]
        )
        return HeaderMismatchError(f"{self.where}: {names} {what}; repair the header or get the file again")

    # -- what kind of object ------------------------------------------------------------------------------
    @property
    def sop_class_name(self) -> str:
        from pydicom.uid import UID

        name = UID(self.sop_class).name
        return name if self.sop_class and name != self.sop_class else "an unknown SOP class"  # never its text

    @cached_property
    def modality(self) -> str | None:
        """The contract's code, None where the tag names none."""
        return MODALITY_OF.get(self.text(self.dataset, "Modality").upper())

    @property
    def is_ct_class(self) -> bool:
        return self.sop_class in _CT_CLASSES

    @cached_property
    def image_type(self) -> list[str]:
        value = self.value(self.dataset, "ImageType")
        if value is None:
            return []
        return [str(part).strip().upper() for part in ([value] if isinstance(value, str) else value)]

    @property
    def is_secondary(self) -> bool:
        return self.sop_class == _SECONDARY_CAPTURE or self.sop_class.startswith(_SECONDARY_CAPTURE + ".")

    @property
    def is_localiser(self) -> bool:
        return "LOCALIZER" in self.image_type

    def not_an_image(self) -> str | None:
        """Why this is no picture, or None if it is one."""
        if self.layout.keyword is None:
            return "DICOM directory" if self._is_dicomdir() else f"{self.sop_class_name} without pixel data"
        if self.sop_class in _NOT_PICTURES:
            return f"{self.sop_class_name}, a grid of labels or doses"
        if not self.options.include_secondary:
            if self.is_secondary:
                return "secondary capture (--include-secondary reads it)"
            if self.is_localiser:
                return "localiser (--include-secondary reads it)"
        return None

    def _is_dicomdir(self) -> bool:
        return self.sop_class == _DICOMDIR or "DirectoryRecordSequence" in self.dataset

    def require_image(self) -> None:
        reason = self.not_an_image()
        if reason:
            raise NotAnImageError(f"{self.where}: not an image but {reason}; give a file with a picture")

    # -- pixels -------------------------------------------------------------------------------------------
    def check_pixels(self) -> None:
        """Read and check the image pixel module; sets rows, columns, frames, bits and colour attributes."""
        data, integer = self.dataset, self.integer
        for keyword in ("Rows", "Columns"):
            if (integer(data, keyword) or 0) <= 0:
                raise self.mismatch("must be at least 1", keyword)
        self.rows, self.columns = integer(data, "Rows"), integer(data, "Columns")
        self.frames = integer(data, "NumberOfFrames", 1)
        if self.frames <= 0:
            raise self.mismatch("must be at least 1", "NumberOfFrames")
        self.samples = integer(data, "SamplesPerPixel", 1)
        floats = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(self.layout.keyword)
        self.allocated = floats or integer(data, "BitsAllocated")
        if self.allocated not in (1, 8, 16, 32, 64):
            raise self.mismatch("must be 1, 8, 16, 32 or 64", "BitsAllocated")
        self.stored_bits = floats or integer(data, "BitsStored", self.allocated)
        if not 1 <= self.stored_bits <= self.allocated:
            raise self.mismatch("is above BitsAllocated, or is 0", "BitsStored", "BitsAllocated")
        high_bit = integer(data, "HighBit", self.stored_bits - 1)
        if high_bit != self.stored_bits - 1 and not floats:
            raise self.mismatch("is not BitsStored - 1", "HighBit", "BitsStored")
        self.signed = integer(data, "PixelRepresentation", 0)
        if self.signed not in (0, 1):
            raise self.mismatch("must be 0 or 1", "PixelRepresentation")
        self.photometric = self.text(data, "PhotometricInterpretation").upper() or "MONOCHROME2"
        if self.photometric not in PHOTOMETRIC:
            raise self.mismatch("is not a colour space meditok reads", "PhotometricInterpretation")
        grey = self.photometric.startswith("MONOCHROME") or self.photometric == "PALETTE COLOR"
        if self.samples != (1 if grey else 3):
            raise self.mismatch("contradict each other", "SamplesPerPixel", "PhotometricInterpretation")
        self.planar = integer(data, "PlanarConfiguration", 0) if self.samples > 1 else 0
        if self.planar not in (0, 1):
            raise self.mismatch("must be 0 or 1", "PlanarConfiguration")
        limits = self.options.limits
        limits.check_pixels(self.columns, self.rows, self.where)
        limits.check_frames(self.frames, self.where)
        functional = self.sequence(data, "PerFrameFunctionalGroupsSequence")
        if functional and len(functional) != self.frames:
            raise self.mismatch(
                f"disagree: {len(functional)} items for {self.frames} frames",
                "PerFrameFunctionalGroupsSequence",
                "NumberOfFrames",
            )
        self._per_frame = functional
        shared = self.sequence(data, "SharedFunctionalGroupsSequence")
        self._shared = shared[0] if shared else None

    def group(self, frame: int, macro: str):
        """The functional group `macro` that holds for a frame: per frame, else shared, else None."""
        for holder in (self._per_frame[frame] if self._per_frame else None, self._shared):
            if holder is not None:
                items = self.sequence(holder, macro)
                if items:
                    return items[0]
        return None


def modality_of(header: Header) -> str:
    """The tag's modality, else what the caller says; HeaderMismatchError if they differ."""
    asked = header.options.modality
    if header.modality and asked and header.modality != asked:
        raise HeaderMismatchError(
            f"{header.where}: Modality (0008,0060) says {header.modality}, --modality says {asked}; "
            "leave the option out"
        )
    return header.modality or asked or "other"
