"""From stored values to real ones, and the file's own windows: padding, modality LUT or rescale, VOI.

The order is fixed: padding mask, modality LUT or rescale (per frame), VOI (LUT before window), inversion
last. Formulas: DICOM PS3.3 C.11.1 (modality), C.11.2.1.2 (LINEAR), C.11.2.1.3 (SIGMOID, LINEAR_EXACT).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from meditok.data.readers.dicom_header import UNITS, Header
from meditok.data.windows import Window


@dataclass(frozen=True)
class SigmoidVoi:
    """VOI function SIGMOID; its result is a display value, low..high = 0..255."""

    centre: float
    width: float
    low: float = 0.0
    high: float = 255.0
    name: str = "file"
    unit: str = "display"

    @property
    def label(self) -> str:
        return f"voi sigmoid centre={self.centre:g} width={self.width:g}"

    def apply(self, values: np.ndarray) -> np.ndarray:
        exponent = np.clip(-4.0 * (np.asarray(values, np.float64) - self.centre) / self.width, -700, 700)
        return (2.0 / (1.0 + np.exp(exponent)) - 1.0).astype(np.float32)


@dataclass(frozen=True)
class LutVoi:
    """An item of VOILUTSequence; its result is a display value of `bits` bits."""

    first: int
    bits: int
    table: bytes = field(repr=False)  # native uint16
    name: str = "file"
    unit: str = "display"
    low: float = 0.0

    @property
    def high(self) -> float:
        return float(2**self.bits - 1)

    @property
    def label(self) -> str:
        return f"voi lut {len(self.table) // 2} entries of {self.bits} bits from {self.first}"

    def apply(self, values: np.ndarray) -> np.ndarray:
        table = np.frombuffer(self.table, np.uint16)
        index = np.clip(np.rint(values).astype(np.int64) - self.first, 0, len(table) - 1)
        return np.clip(table[index] * (2.0 / self.high) - 1.0, -1, 1).astype(np.float32)


@dataclass
class RealValues:
    """A frame in real units. `padding` is True where a pixel holds no data; None if none does."""

    values: np.ndarray
    padding: np.ndarray | None
    low: float  # what the stored range maps to
    high: float
    unit: str
    rescaled: bool
    steps: list[str]
    notes: list[str]


def real_values(header: Header, frame: int, stored: np.ndarray) -> RealValues:
    """Padding mask, then modality LUT or rescale. HeaderMismatchError for slope 0 or a broken LUT."""
    steps, notes = [], []
    padding = _padding_mask(header, stored, steps)
    bits = header.stored_bits
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if header.signed else (0.0, 2.0**bits - 1)
    lut = header.sequence(header.dataset, "ModalityLUTSequence")
    if lut:
        first, bits, table = _lut(header, lut[0], header.signed)
        index = np.clip(stored.astype(np.int64) - first, 0, len(table) - 1)
        steps.append(f"modality lut {len(table)} entries from {first}")
        unit = _unit(header, lut[0], "ModalityLUTType")
        return RealValues(table[index], padding, 0.0, 2.0**bits - 1, unit, True, steps, notes)
    group = header.group(frame, "PixelValueTransformationSequence")
    holder = group if group is not None else header.dataset
    slope, intercept = header.number(holder, "RescaleSlope"), header.number(holder, "RescaleIntercept")
    if slope is None and intercept is None:
        unit = "display" if (low, high) == (0.0, 255.0) else "stored"
        return RealValues(stored, padding, low, high, unit, False, steps, notes)
    if slope is None or intercept is None:
        missing = "slope 1" if slope is None else "intercept 0"
        notes.append(f"rescale is incomplete: {missing} assumed")
        steps.append(f"rescale {missing} assumed")
    slope, intercept = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
    if slope == 0:
        raise header.mismatch("is 0, so all values would be equal", "RescaleSlope")
    steps.append(f"rescale slope={slope:.10g} intercept={intercept:.10g}")
    values = stored.astype(np.float64) * slope + intercept
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return RealValues(values, padding, *ends, _unit(header, holder, "RescaleType"), True, steps, notes)


def _unit(header: Header, holder, keyword: str) -> str:
    text = header.text(holder, keyword).upper() or header.text(header.dataset, "Units").upper()
    return text if text in UNITS and text != "US" else ""  # US is "unspecified"


def _padding_mask(header: Header, stored: np.ndarray, steps: list[str]) -> np.ndarray | None:
    value = header.integer(header.dataset, "PixelPaddingValue")
    if value is None or stored.ndim != 2 or stored.dtype.kind == "f":
        return None
    limit = header.integer(header.dataset, "PixelPaddingRangeLimit", value)
    low, high = sorted(_wrapped(header, number) for number in (value, limit))
    mask = (stored >= low) & (stored <= high)
    count = int(np.count_nonzero(mask))
    if count == 0:
        return None
    span = f"{low}" if low == high else f"{low}..{high}"
    steps.append(f"mask padding {span}: {count} pixels shown as -1")
    return mask


def _wrapped(header: Header, value: int) -> int:
    """A padding value as the pixels hold it: it may have been written with the other sign."""
    bits = header.allocated
    value %= 2**bits
    return value - 2**bits if header.signed and value >= 2 ** (bits - 1) else value


def _lut(header: Header, item, signed: bool) -> tuple[int, int, np.ndarray]:
    """(first mapped value, bits per entry, entries as uint16) of a LUT item."""
    descriptor = [int(number) for number in header.numbers(item, "LUTDescriptor")]
    if len(descriptor) != 3:
        raise header.mismatch("must hold three numbers", "LUTDescriptor")
    count, first, bits = descriptor[0] % 65536 or 65536, descriptor[1], descriptor[2]
    if signed and first > 32767:
        first -= 65536
    if not 8 <= bits <= 16:
        raise header.mismatch("must give 8 to 16 bits per entry", "LUTDescriptor")
    data = header.value(item, "LUTData")
    if isinstance(data, bytes):
        order = "<" if header.layout.little else ">"
        width = "u1" if len(data) in (count, count + 1) and bits == 8 and count > 1 else f"{order}u2"
        table = np.frombuffer(data[: len(data) // np.dtype(width).itemsize * np.dtype(width).itemsize], width)
    else:
        table = np.asarray(header.numbers(item, "LUTData"))
    if len(table) < count:
        raise header.mismatch(f"disagree: {count} entries announced, {len(table)} there", "LUTDescriptor", "LUTData")
    return first, bits, (table[:count].astype(np.int64) % 65536).astype(np.uint16)


def file_voi(header: Header, frame: int, index: int) -> Window | SigmoidVoi | LutVoi | None:
    """The file's own VOI for a frame, LUT before window; None if it has none.

    `index` chooses among several. HeaderMismatchError for a width that is not positive, for lists of
    different lengths, an index past the end and an unknown function.
    """
    luts = header.sequence(header.dataset, "VOILUTSequence")
    group = header.group(frame, "FrameVOILUTSequence")
    holder = group if group is not None else header.dataset
    if luts:
        if index >= len(luts):
            raise header.mismatch(f"holds {len(luts)} items, number {index} was asked for", "VOILUTSequence")
        signed = bool(header.signed) or (header.number(header.dataset, "RescaleIntercept", 0.0) or 0.0) < 0
        first, bits, table = _lut(header, luts[index], signed)
        return LutVoi(first, bits, table.tobytes())
    centres, widths = header.numbers(holder, "WindowCenter"), header.numbers(holder, "WindowWidth")
    if not centres and not widths:
        return None
    if len(centres) != len(widths):
        raise header.mismatch(f"hold {len(centres)} and {len(widths)} values", "WindowCenter", "WindowWidth")
    if index >= len(centres):
        raise header.mismatch(
            f"hold {len(centres)} values, number {index} was asked for", "WindowCenter", "WindowWidth"
        )
    centre, width = centres[index], widths[index]
    function = header.text(holder, "VOILUTFunction").upper() or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise header.mismatch("must be LINEAR, LINEAR_EXACT or SIGMOID", "VOILUTFunction")
    if width <= 0:
        raise header.mismatch("must be above 0", "WindowWidth")
    if function == "SIGMOID":
        return SigmoidVoi(centre, width)
    if function == "LINEAR_EXACT" or width < 1:  # LINEAR is not defined below a width of 1
        return Window(centre - width / 2, centre + width / 2, "file")
    return Window(centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2, "file")
