"""Which file each row of a token file goes to: pictures, cine folders, volumes and their runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ..errors import BadInputError, UnsafeFileError, UsageError
from .schema import Description

FORMATS = {"png": ".png", "png16": ".png", "nifti": ".nii.gz", "npy": ".npy"}
PNG_TOP = {"png": 255, "png16": 65535}  # largest value each can hold
TOLERANCE = 0.01  # of the spacing, within which slices count as evenly spaced


@dataclass
class Run:
    """Slices first .. first + count - 1 of a volume, without a gap: one NIfTI file."""

    name: str  # of the file, without suffix
    first: int
    count: int


@dataclass
class Layout:
    """Where rows go, by row id: `runs` into a NIfTI file, `frames` into a folder, others by themselves."""

    picture_format: str | None  # None: PNG, unless native values need more
    runs: dict[str, Run] = field(default_factory=dict)
    frames: dict[str, str] = field(default_factory=dict)  # row id -> file name without suffix
    warnings: list[str] = field(default_factory=list)

    def volumes(self) -> int:
        """How many NIfTI files there will be."""
        return len({run.name for run in self.runs.values()})

    def format_of(self, row: Description, values: str | None) -> str:
        """Format of a row's own picture."""
        if self.picture_format or values != "native":
            return self.picture_format or "png"
        return next((fmt for fmt, top in PNG_TOP.items() if fits(row, top)), "npy")

    def name_of(self, row: Description) -> str:
        """Relative name of a row's own picture, without suffix."""
        return self.frames.get(row.id) or safe_name(row.id)


@dataclass
class _Volume:
    geometry: object
    slices: dict[str, tuple[int, float | None]] = field(default_factory=dict)  # row id -> (slice, position)
    problem: str = ""


def plan_layout(rows: Iterable[Description], fmt: str | None = None, values: str | None = None) -> Layout:
    """Decide from descriptions alone; `fmt` None writes volumes as NIfTI and other rows as PNG.

    A volume is two or more grey slices at known places, evenly spaced within 1 %; a gap divides it into runs.
    What cannot be a volume is written as single pictures, with a warning. UsageError: fmt "nifti" with rows
    that have no place in a volume, or native values that do not fit a PNG; UnsafeFileError: an id that is no
    safe file name; BadInputError: an id twice.
    """
    if fmt not in (None, *FORMATS):
        raise UsageError(f"--as {fmt}: unknown; choose one of {', '.join(FORMATS)}")
    layout = Layout("png" if fmt == "nifti" else fmt)
    volumes: dict[str, _Volume] = {}
    sources: dict[str, dict[str, int]] = {}
    flat, seen = "", set()
    top = PNG_TOP.get(fmt) if values == "native" else None
    for row in rows:
        safe_name(row.id)
        part = row.id, row.tile
        if part in seen:
            raise BadInputError(f"row {row.id} is there twice; write the tokens again with meditok tokenize")
        seen.add(part)
        placed = row.geometry is not None and row.geometry.affine is not None
        if row.volume and row.slice is not None and placed:
            volume = volumes.setdefault(row.volume, _Volume(row.geometry))
            volume.slices[row.id] = row.slice, row.position
            if row.channels != 1:
                volume.problem = "it is in colour"
            elif _place(row.geometry) != _place(volume.geometry):
                volume.problem = "its slices disagree about their geometry"
            if fmt in (None, "nifti"):
                continue
        else:
            flat = flat or row.id
            sources.setdefault(row.source, {})[row.id] = row.frame
        if top and not fits(row, top):
            raise UsageError(
                f"--values native: row {row.id} holds values from {row.low:g} to {row.high:g}, which do not "
                f"fit 0..{top} of a PNG; use --as npy or nifti, or png16 up to 65535"
            )
    if fmt == "nifti" and flat:
        raise UsageError(f"--as nifti: row {flat} has no place in a volume; leave --as out to write such rows as PNG")
    if fmt in (None, "nifti"):
        for name, volume in volumes.items():
            _plan_volume(layout, name, volume, whole=fmt == "nifti")
    for ids in sources.values():
        if len(ids) > 1 and len(set(ids.values())) == len(ids):
            folder = safe_name(next(iter(ids)))
            layout.frames |= {row_id: f"{folder}/{frame:04d}" for row_id, frame in ids.items()}
    return layout


def fits(row: Description, top: int) -> bool:
    """Whether a row's native values lie in 0..top."""
    return 0 <= min(row.low, row.high) and max(row.low, row.high) <= top


def _place(geometry) -> tuple:
    return geometry.original_shape, geometry.axis, geometry.plane, geometry.affine


def _plan_volume(layout: Layout, name: str, volume: _Volume, *, whole: bool) -> None:
    slices = sorted((index, position, row_id) for row_id, (index, position) in volume.slices.items())
    if len(slices) < 2 and not whole:
        return
    problem = volume.problem or _unevenness([s[:2] for s in slices])
    if problem and whole:
        raise UsageError(f"--as nifti: volume {name}: {problem}; leave --as out to write its slices as PNG")
    if problem:
        layout.warnings.append(f"volume {name}: {problem}; its {len(slices)} slices are written as pictures")
        return
    runs: list[list[tuple]] = []
    for entry in slices:
        if runs and entry[0] == runs[-1][-1][0] + 1:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    if len(runs) > 1:
        missing = slices[-1][0] - slices[0][0] + 1 - len(slices)
        layout.warnings.append(
            f"volume {name}: {missing} slices are missing between {slices[0][0]} and {slices[-1][0]}; "
            f"written as {len(runs)} files, one for each run of slices"
        )
    for run in runs:
        suffix = f"_{run[0][0]:04d}-{run[-1][0]:04d}" if len(runs) > 1 else ""
        target = Run(safe_name(name) + suffix, run[0][0], len(run))
        layout.runs |= {row_id: target for _, _, row_id in run}


def _unevenness(slices: list[tuple[int, float | None]]) -> str:
    """Why sorted (slice, position) pairs are no evenly spaced stack, or ""."""
    steps = []
    for (index, position), (following, next_position) in zip(slices, slices[1:], strict=False):
        if following == index:
            return f"slice {index} is there twice"
        if position is not None and next_position is not None:
            steps.append((next_position - position) / (following - index))
    middle = statistics.median(steps) if steps else 0.0
    if steps and max(abs(step - middle) for step in steps) > TOLERANCE * abs(middle):
        return f"its slices lie {min(steps):.4g} to {max(steps):.4g} mm apart"
    return ""


def safe_name(name: str) -> str:
    """A row's or volume's name as relative path; UnsafeFileError where it would leave the output folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    unsafe = not name or path.is_absolute() or ".." in path.parts or "\0" in name or str(path) == "."
    if unsafe or (len(name) > 1 and name[1] == ":"):
        raise UnsafeFileError(
            f"id {name!r}: not a name inside the output folder; make the tokens again without --keep-names"
        )
    return str(path)
