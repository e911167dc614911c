"""Slices of DICOM files put in order: grouped by series, orientation and size, sorted by position.

The volume of a series has the voxel grid (Columns, Rows, slots). Slot k = round((position - first) /
median spacing), so that a missing slice leaves a slot empty, and one affine holds for all slices.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from meditok.data.geometry import LPS_TO_RAS, spacing_of
from meditok.data.image import Geometry
from meditok.data.readers.blob import Blob
from meditok.data.readers.dicom_header import Header, modality_of
from meditok.data.readers.dicom_values import file_voi
from meditok.errors import BadInputError

_SAME_POSITION = 1e-3  # mm


@dataclass
class Slice:
    """One frame of one file, as its header describes it. Picklable; holds no pixels."""

    blob: Blob
    frame: int
    series: str
    number: str  # SeriesNumber
    modality: str
    syntax: str
    rows: int
    columns: int
    frames: int  # of the file
    orientation: tuple[float, ...] | None  # six direction cosines, LPS
    position: tuple[float, ...] | None  # of the first voxel, LPS mm
    spacing: tuple[float, float] | None  # between rows, between columns, mm
    thickness: float | None
    order: tuple[float, float]  # acquisition and instance number
    voi: Any = None  # window, None, or the error that using it raises

    @property
    def key(self) -> tuple:
        """Slices with equal keys may form one volume."""
        turned = None if self.orientation is None else tuple(round(value, 3) + 0.0 for value in self.orientation)
        spacing = None if self.spacing is None else tuple(round(value, 4) for value in self.spacing)
        return self.series, self.modality, self.rows, self.columns, turned, spacing


@dataclass
class Slot:
    """Where a slice goes: its volume and index there; volume "" and index None without a place."""

    source: Slice
    volume: str = ""
    index: int | None = None
    position: float | None = None
    geometry: Geometry | None = None


def slices_of(header: Header) -> list[Slice]:
    """Every frame of a file whose pixels were checked (`Header.check_pixels`)."""
    data = header.dataset
    series = header.text(data, "SeriesInstanceUID") or header.where
    common = {
        "blob": header.blob, "series": series, "number": header.text(data, "SeriesNumber"),
        "modality": modality_of(header), "syntax": header.syntax.name, "rows": header.rows,
        "columns": header.columns, "frames": header.frames,
        "order": (header.number(data, "AcquisitionNumber", 0.0), header.number(data, "InstanceNumber", 0.0)),
    }  # fmt: skip
    return [_slice(header, frame, common) for frame in range(header.frames)]


def _slice(header: Header, frame: int, common: dict) -> Slice:
    position = _vector(header, frame, "PlanePositionSequence", "ImagePositionPatient", 3)
    orientation = _vector(header, frame, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    spacing = _vector(header, frame, "PixelMeasuresSequence", "PixelSpacing", 2)
    if orientation is not None:
        across, down = np.array(orientation[:3]), np.array(orientation[3:])
        lengths = np.linalg.norm(across), np.linalg.norm(down)
        if abs(lengths[0] - 1) > 1e-2 or abs(lengths[1] - 1) > 1e-2 or abs(across @ down) > 1e-2:
            raise header.mismatch("is not a pair of perpendicular unit vectors", "ImageOrientationPatient")
    if spacing is not None and min(spacing) <= 0:
        spacing = None  # the picture is good, only its place in millimetres is not known
    measures = header.group(frame, "PixelMeasuresSequence")
    holder = measures if measures is not None else header.dataset
    thickness = header.number(holder, "SpacingBetweenSlices") or header.number(holder, "SliceThickness")
    try:
        voi = file_voi(header, frame, header.options.window_index)
    except BadInputError as error:
        voi = error
    return Slice(
        frame=frame, orientation=orientation, position=position, spacing=spacing,
        thickness=abs(thickness) if thickness else None, voi=voi, **common,
    )  # fmt: skip


def _vector(header: Header, frame: int, macro: str, keyword: str, count: int) -> tuple[float, ...] | None:
    """A vector from the functional group of a frame, or from the data set of a single-frame file."""
    group = header.group(frame, macro)
    if group is None and header.frames > 1 and keyword != "PixelSpacing":
        return None  # one position for many frames places none of them
    values = header.numbers(group if group is not None else header.dataset, keyword)
    if not values:
        return None
    if len(values) != count:
        raise header.mismatch(f"must hold {count} numbers", keyword)
    return tuple(values)


def arrange(slices: list[Slice]) -> tuple[list[Slot], list[str]]:
    """Slots in reading order, with warnings about gaps, duplicates and splits, for one source."""
    groups: dict[tuple, list[Slice]] = defaultdict(list)
    for item in slices:
        groups[item.key].append(item)
    slots, warnings = [], []
    if len({key[0] for key in groups}) < len(groups):
        warnings.append(f"one series holds {len(groups)} orientations, sizes or spacings; each is its own volume")
    for members in groups.values():
        placed, notes = _arrange_group(members)
        slots += placed
        warnings += notes
    return slots, warnings


def _arrange_group(members: list[Slice]) -> tuple[list[Slot], list[str]]:
    first = members[0]
    if first.orientation is None or any(item.position is None for item in members):
        return [Slot(item) for item in sorted(members, key=lambda item: (*item.order, item.frame))], []
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    heights = {id(item): float(normal @ np.array(item.position)) for item in members}
    members = sorted(members, key=lambda item: (round(heights[id(item)], 3), *item.order, item.frame))
    warnings, layers = [], []
    repetition, last = 0, None
    for item in members:
        height = heights[id(item)]
        repetition = repetition + 1 if last is not None and height - last < _SAME_POSITION else 0
        last = height
        while len(layers) <= repetition:
            layers.append([])
        layers[repetition].append(item)
    if len(layers) > 1:
        extra = sum(len(layer) for layer in layers[1:])
        where = ", ".join(f"{heights[id(item)]:.2f}" for item in layers[1][:5])
        more = ", ..." if len(layers[1]) > 5 else ""
        warnings.append(f"{extra} slices repeat a position (at {where}{more} mm): kept, as volumes of their own")
    slots = []
    for repetition, layer in enumerate(layers):
        key = _volume_key(first, repetition)
        placed, notes = _volume(layer, [heights[id(item)] for item in layer], key)
        slots += placed
        warnings += notes if repetition == 0 else []
    return slots, warnings


def _volume_key(first: Slice, repetition: int) -> str:
    """Name of a volume: its series, and a digest of what tells it from others of that series."""
    digest = hashlib.sha256(repr((first.key[1:], repetition)).encode()).hexdigest()
    return f"{first.series}-{digest[:8]}"


def _volume(layer: list[Slice], heights: list[float], key: str) -> tuple[list[Slot], list[str]]:
    """One slice per position: slots, the shared affine, and what is missing."""
    first, warnings = layer[0], []
    if first.spacing is None:
        warnings.append("no usable PixelSpacing: slices are sorted, but no volume can be rebuilt")
        return [Slot(item, position=height) for item, height in zip(layer, heights, strict=True)], warnings
    if len(layer) > 1:
        steps = np.diff(heights)
        step = float(np.median(steps))
        indices = [round((height - heights[0]) / step) for height in heights]
        missing = [
            f"{heights[0] + slot * step:.2f}"
            for before, after in zip(indices, indices[1:], strict=False)
            for slot in range(before + 1, after)
        ]
        if len(set(indices)) < len(indices):
            warnings.append(f"slice spacing varies from {steps.min():.3g} to {steps.max():.3g} mm: numbered in order")
            indices, missing = list(range(len(layer))), []
        elif missing:
            shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
            warnings.append(
                f"gap: {len(missing)} slices missing, at {shown} mm along the normal (spacing {step:.3g} mm)"
            )
        elif np.abs(steps / step - 1).max() > 0.01:
            warnings.append(f"slice spacing varies from {steps.min():.3g} to {steps.max():.3g} mm")
        along = (np.array(layer[-1].position) - np.array(first.position)) / max(indices[-1], 1)
    else:
        indices = [0]
        along = np.cross(first.orientation[:3], first.orientation[3:]) * (first.thickness or 1.0)
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.orientation[:3]) * first.spacing[1]
    affine[:3, 1] = np.array(first.orientation[3:]) * first.spacing[0]
    affine[:3, 2] = along
    affine[:3, 3] = first.position
    affine = LPS_TO_RAS @ affine
    geometry = Geometry(
        original_shape=(first.columns, first.rows, indices[-1] + 1),
        axis=2,
        plane="native",
        spacing=spacing_of(affine),
        affine=tuple(float(value) for value in affine.reshape(-1)),
    )
    return [
        Slot(item, key, index, height, geometry) for item, index, height in zip(layer, indices, heights, strict=True)
    ], warnings
