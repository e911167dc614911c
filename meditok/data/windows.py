"""Windows: from values with a unit to [-1, 1] and back.

A window (low, high) maps v to 2 (v - low) / (high - low) - 1, clipped to [-1, 1], in float64 before the
result is rounded to float32. The rules that choose the window are those of CONTRACTS.md section 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from meditok.errors import UsageError

# Hounsfield units (low, high).
CT_WINDOWS = {
    "full": (-1000.0, 2000.0),
    "default": (-1000.0, 1000.0),
    "soft-tissue": (-150.0, 250.0),
    "lung": (-1400.0, 200.0),
    "bone": (-500.0, 1300.0),
}
# Names that mean nothing but a CT window; "full" is also the stored range of other pictures.
CT_ONLY = frozenset(CT_WINDOWS) - {"full"}

# Training draws another window than the default with this probability, and then one of these.
RANDOM_CT_PROBABILITY = 0.5
RANDOM_CT_WEIGHTS = {"full": 0.2, "default": 0.3, "soft-tissue": 0.3, "lung": 0.15, "bone": 0.05}

_BLOCK = 2**18  # values scaled at a time


@dataclass(frozen=True)
class WindowRequest:
    """A parsed `--window`: kind is auto | named | file | full | percentile | range."""

    kind: str
    name: str = ""
    low: float = 0.0  # LOW, or the lower percentile
    high: float = 0.0


@dataclass(frozen=True)
class Window:
    """A chosen window. `fixed` says that it does not come from the values of the picture itself."""

    low: float
    high: float
    name: str
    fixed: bool = True
    unit: str | None = None  # of low and high, where it is not that of the values

    def apply(self, values: np.ndarray) -> np.ndarray:
        return apply_window(values, self)

    @property
    def label(self) -> str:
        return f"window {self.name} {self.low:g} {self.high:g}"


def parse_window(text: str) -> WindowRequest:
    """Read auto | NAME | file | full | percentile[:P:Q] | LOW:HIGH; UsageError otherwise."""
    if text in ("auto", "file", "full"):
        return WindowRequest(text, text)
    if text in CT_WINDOWS:
        return WindowRequest("named", text, *CT_WINDOWS[text])
    head, _, tail = str(text).partition(":")
    if text == "percentile":
        return WindowRequest("percentile", "percentile", 0.5, 99.5)
    try:
        if head == "percentile":
            low, high = (float(part) for part in tail.split(":"))
            if 0 <= low < high <= 100:
                return WindowRequest("percentile", "percentile", low, high)
        else:
            low, high = float(head), float(tail)
            if math.isfinite(low) and math.isfinite(high) and low < high:
                return WindowRequest("range", f"{low:g}:{high:g}", low, high)
    except ValueError:
        pass
    raise UsageError(
        f"window {text!r} is not known; use auto, file, full, {', '.join(sorted(CT_ONLY))}, percentile[:P:Q] "
        "with 0 <= P < Q <= 100, or LOW:HIGH with LOW < HIGH"
    )


def apply_window(values: np.ndarray, window: Window) -> np.ndarray:
    """float32 array of the shape of `values`, in [-1, 1].

    A window of no width, which a constant picture gives under a data-driven rule, maps everything to -1;
    a fixed one of no width (DICOM LINEAR with width 1) is a threshold: above low is +1.
    """
    if window.high <= window.low:
        if not window.fixed:
            return np.full(values.shape, -1.0, dtype=np.float32)
        return np.where(values > window.low, np.float32(1), np.float32(-1))
    if values.dtype == np.uint8 and values.size > 4096:  # the same results, looked up: three times as fast
        table = torch.from_numpy(apply_window(np.arange(256, dtype=np.uint8), window))
        places = torch.from_numpy(values.astype(np.int32).reshape(-1))
        return table.index_select(0, places).numpy().reshape(values.shape)
    pixels = np.empty(values.shape, dtype=np.float32)
    rows = max(1, _BLOCK // max(1, values[:1].size))
    for start in range(0, len(values), rows):  # in blocks, so that float64 never doubles the memory
        scaled = np.subtract(values[start : start + rows], window.low, dtype=np.float64)
        scaled *= 2.0 / (window.high - window.low)
        scaled -= 1.0
        pixels[start : start + rows] = np.clip(scaled, -1.0, 1.0, out=scaled)
    return pixels


def to_native(pixels: torch.Tensor, low: float, high: float, steps: Iterable[str] = ()) -> torch.Tensor:
    """Values in the unit of low and high, float64, for pixels in [-1, 1]; undoes a recorded inversion."""
    values = pixels.to(torch.float64)
    if any(step.startswith("invert") for step in steps):
        values = -values
    return (values.clamp(-1, 1) + 1) * (0.5 * (high - low)) + low


def to_display8(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 of the same shape: -1 is 0, +1 is 255, rounded to the nearest."""
    return ((pixels.to(torch.float32).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_display16(pixels: torch.Tensor) -> torch.Tensor:
    """int32 of the same shape holding 0..65535 (torch lacks most uint16 operations)."""
    return ((pixels.to(torch.float64).clamp(-1, 1) + 1) * 32767.5).round().to(torch.int32)


def random_ct_window(rng: np.random.Generator, probability: float = RANDOM_CT_PROBABILITY) -> str:
    """Name of the CT window a training sample gets."""
    if rng.random() >= probability:
        return "default"
    names = list(RANDOM_CT_WEIGHTS)
    return names[int(rng.choice(len(names), p=[RANDOM_CT_WEIGHTS[name] for name in names]))]


class ValueStatistics:
    """Minimum, maximum, non-finite count and percentiles of values that arrive piece by piece.

    Memory is bounded. Integers of up to 16 bits are counted, so that percentiles are exact for any number of
    them. Other values are kept as float32 up to `capacity`; beyond that every second one is dropped,
    repeatedly, which `thinned` tells (1 = all were kept, n = every n-th).
    """

    def __init__(self, capacity: int = 2**24):
        self.minimum = math.inf
        self.maximum = -math.inf
        self.nonfinite = 0
        self.thinned = 1
        self._capacity = capacity
        self._counts: np.ndarray | None = None  # of the integers -32768..65535
        self._kept: list[np.ndarray] = []
        self._held = 0

    def add(self, values: np.ndarray) -> None:
        """Take in an array of any shape and real dtype."""
        flat = np.ravel(values, order="K")
        if flat.dtype.kind == "f":
            finite = np.isfinite(flat)
            bad = int(flat.size - np.count_nonzero(finite))
            if bad:
                self.nonfinite += bad
                flat = flat[finite]
        if flat.size == 0:
            return
        self.minimum = min(self.minimum, float(flat.min()))
        self.maximum = max(self.maximum, float(flat.max()))
        if flat.dtype.kind in "iu" and flat.dtype.itemsize <= 2:
            counts = np.bincount(flat.astype(np.int32) + 32768, minlength=98304)
            self._counts = counts if self._counts is None else self._counts + counts
            return
        kept = flat[:: self.thinned].astype(np.float32)
        self._kept.append(kept)
        self._held += kept.size
        while self._held > self._capacity:
            merged = np.concatenate(self._kept)[::2].copy()
            self._kept, self._held = [merged], merged.size
            self.thinned *= 2

    def percentiles(self, low: float, high: float) -> tuple[float, float]:
        """Two percentiles (linear interpolation, as numpy's); (0, 0) if no finite value was seen."""
        values, weights = [], []
        if self._counts is not None:
            present = np.flatnonzero(self._counts)
            values.append(present - 32768.0)
            weights.append(self._counts[present])
        if self._held:
            values.append(np.sort(np.concatenate(self._kept)).astype(np.float64))
            weights.append(np.full(self._held, self.thinned))
        if not values:
            return 0.0, 0.0
        if len(values) == 1 and self._counts is None:
            pair = np.percentile(values[0], [low, high])
            return float(pair[0]), float(pair[1])
        value, weight = np.concatenate(values), np.concatenate(weights)
        order = np.argsort(value, kind="stable")
        value, ends = value[order], np.cumsum(weight[order])
        return tuple(_ranked(value, ends, share) for share in (low, high))

    def window(self, low: float, high: float) -> Window:
        """The data-driven window between two percentiles."""
        bottom, top = self.percentiles(low, high)
        suffix = "" if self.thinned == 1 else f" of every {self.thinned}th value"
        return Window(bottom, top, f"percentile {low:g} {high:g}{suffix}", fixed=False)


def _ranked(value: np.ndarray, ends: np.ndarray, share: float) -> float:
    """Percentile `share` of sorted values that each occur ends[i] - ends[i - 1] times."""
    rank = share / 100 * (int(ends[-1]) - 1)
    below, above = (value[np.searchsorted(ends, math.floor(rank) + step, side="right")] for step in (0, rank % 1 > 0))
    return float(below + (above - below) * (rank % 1))
