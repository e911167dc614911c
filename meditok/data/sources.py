"""What a command reads: from the files of its inputs to sources, and from sources to rows.

Every input found ends up in exactly one of three lists: sources (whose rows are ok or failed), ignored, or
failed. Names are posix paths relative to the input they came from, so that outputs never collide and never
depend on where the data lies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from meditok.data import manifest
from meditok.data.image import MedicalImage
from meditok.data.options import ReadOptions
from meditok.data.readers import open_blob, sniff
from meditok.data.readers.blob import Blob
from meditok.data.walk import PACKED, Discovery, Found, expand
from meditok.data.windows import parse_window
from meditok.errors import BadInputError, IntensityError, MeditokError, UsageError


@dataclass
class Row:
    """One picture of a source: an image, or the error it failed with."""

    name: str  # "<relative path>#<frame>"
    path: str  # as messages show it
    image: MedicalImage | None
    error: MeditokError | None
    columns: dict


@dataclass
class Source:
    """One file, or one DICOM series of many files. Picklable; opens nothing until asked."""

    path: str  # of the file, or of the first one
    name: str  # relative to its IN argument
    options: ReadOptions
    modality: str | None = None  # as far as the header or the manifest says
    columns: dict = field(default_factory=dict)
    blobs: list[Blob] = field(default_factory=list)
    slices: list[Any] = field(default_factory=list)  # of a DICOM series
    names: dict[str, str] = field(default_factory=dict)  # label of a member file -> its relative name
    row_columns: dict[str, dict] = field(default_factory=dict)  # relative name -> columns, for series
    warnings: list[str] = field(default_factory=list)
    kind: str = "dicom"  # as its first bytes say: png | jpeg | tiff | bmp | npy | nifti | dicom

    def open(self):
        """The reader of this source; errors as the readers raise them."""
        if self.slices:
            from meditok.data.readers.dicom import DicomSeries

            return DicomSeries(self.blobs, self.options, self.slices)
        return open_blob(self.blobs[0], self.options)

    def rows(self) -> Iterator[Row]:
        """Every picture, lazily and in order; a picture that cannot be read is a row with its error."""
        try:
            reader = self.open()
            if hasattr(reader, "prepare"):
                reader.prepare()
        except MeditokError as error:
            yield Row(f"{self.name}#0", self.path, None, error, dict(self.columns))
            return
        chosen = self._chosen(reader)
        if not chosen:
            wanted = self.options.frame
            error = BadInputError(f"{self.path}: frame {wanted} is not in 0..{reader.frames - 1}; leave --frame out")
            yield Row(f"{self.name}#{wanted}", self.path, None, error, dict(self.columns))
        for index in chosen:
            name, path = self._row_name(reader, index)
            columns = {**self.columns, **self.row_columns.get(name.rpartition("#")[0], {})}
            try:
                image = reader.image(index)
            except MeditokError as error:
                yield Row(name, path, None, error, columns)
                continue
            given = path if self.slices else self.blobs[0].name
            if image.volume.startswith(given):  # named after its file, which outputs know by another name
                image.volume = name.rpartition("#")[0] + image.volume.removeprefix(given)
            yield Row(name, path, image, None, columns)

    def _chosen(self, reader) -> range | list[int]:
        wanted = self.options.frame
        if wanted is None:
            return range(reader.frames)
        if self.slices:  # --frame counts the frames of a file
            return [index for index, slot in enumerate(reader.slots) if slot.source.frame == wanted]
        return [wanted] if wanted < reader.frames else []

    def _row_name(self, reader, index: int) -> tuple[str, str]:
        if not self.slices:
            return f"{self.name}#{index}", self.path
        source = reader.slots[index].source
        return f"{self.names[source.blob.label]}#{source.frame}", source.blob.label

    def count(self, tile: int | None = None) -> int:
        """Pictures its headers promise; with `tile`, tiles of so many pixels a side. 1 where they cannot be read."""

        def tiles(height: int, width: int) -> int:
            return 1 if tile is None else -(-height // tile) * -(-width // tile)

        wanted = self.options.frame
        if self.slices:
            chosen = [piece for piece in self.slices if wanted in (None, piece.frame)]
            return sum(tiles(piece.rows, piece.columns) for piece in chosen) or 1
        if tile is None and (wanted is not None or self.kind in ("png", "jpeg", "bmp")):
            return 1
        try:
            reader = self.open()
        except MeditokError:
            return 1  # reading it tells why
        return (reader.frames if wanted is None else 1) * tiles(reader.height, reader.width)

    def probe(self, check: Callable[[MedicalImage, str], object] | None = None) -> list[dict]:
        """What `inspect` and a dry run tell: one record per file of this source, pixels read but not kept.

        `check` is called with every picture and its path and may raise the error that a run would.

        Keys: name, path, modality, syntax, height, width, frames, window, low, high, unit, steps, warnings,
        and, for a file that would fail, error (its message), error_type and exit_code.
        """
        syntax = ""
        try:
            reader = self.open()
            syntax = reader.syntax
        except MeditokError:
            pass  # rows() meets the same error and reports it
        records: dict[str, dict] = {}
        for row in self.rows():
            file = row.name.rpartition("#")[0]
            record = records.setdefault(
                file,
                {
                    "name": file, "path": row.path, "modality": self.modality, "syntax": syntax,
                    "height": None,
                    "width": None, "frames": 0, "window": None, "low": None, "high": None, "unit": None,
                    "steps": [],
                    "warnings": list(self.warnings) if not records else [], "error": None, "error_type": None,
                    "exit_code": 0,
                },
            )  # fmt: skip
            record["frames"] += 1
            image, error = row.image, row.error
            if check is not None and error is None:
                try:
                    check(image, row.path)
                except MeditokError as problem:
                    error = problem
            if error is not None:
                if record["error"] is None:
                    record.update(error=str(error), error_type=type(error).__name__, exit_code=error.exit_code)
                continue
            record["warnings"] += [note for note in image.warnings if note not in record["warnings"]]
            if record["height"] is None:
                record.update(
                    modality=image.modality, height=image.height, width=image.width, window=image.window,
                    low=image.low, high=image.high, unit=image.unit, steps=list(image.steps),
                )  # fmt: skip
        return list(records.values())


def one_by_one(function: Callable[[Any], Iterator], tasks: Sequence) -> Iterator:
    """Every item of `function(task)` for every task, in order."""
    for task in tasks:
        yield from function(task)


@contextmanager
def _silently(label: str, total: int) -> Iterator[Callable[[], object]]:
    yield lambda: None


def discover(
    inputs: Sequence[str | os.PathLike],
    options: ReadOptions | None = None,
    progress: Callable[[str, int], AbstractContextManager[Callable[[], object]]] = _silently,
    through: Callable[[Callable, Sequence], Iterator] = one_by_one,
) -> Discovery:
    """Sort out what the inputs hold; only headers are read. `progress` is told how many files there are, and of each.

    `through` goes through DICOM headers, as `one_by_one` does, or in several processes.

    Raises UsageError for an input that does not exist, for equal relative names from two inputs, and for a
    CT window when there is no CT. Everything else that is wrong is listed in `failed`.
    """
    options = options or ReadOptions()
    discovery = Discovery()
    found: list[Found] = []
    for item in inputs:
        found += expand(os.fspath(item), discovery)
    _refuse_equal_names(found)
    dicom: list[tuple[Found, ReadOptions]] = []
    with progress("looking at files", len(found)) as advance:
        for file in found:
            if _sort_out(file, options, discovery, dicom):
                advance()
        _series(dicom, discovery, options, advance, through)
    discovery.sources.sort(key=lambda source: source.name)
    _check_ct_window(discovery, options, named=len(found) == 1 and found[0].named)
    return discovery


def _refuse_equal_names(found: list[Found]) -> None:
    seen: dict[str, str] = {}
    for file in found:
        if file.name in seen:
            raise UsageError(
                f"{seen[file.name]} and {file.blob.label} have the same name {file.name} relative to "
                "their inputs; "
                "give their common parent folder instead"
            )
        seen[file.name] = file.blob.label


def _sort_out(file: Found, options: ReadOptions, discovery: Discovery, dicom: list) -> bool:
    """Put one file into sources, ignored or failed; False: it is DICOM, and among those that are grouped later."""
    try:
        kind = sniff(file.blob)
        if kind is None:
            _leave_out(file, options, discovery)
            return True
        own = manifest.options_for(options, file.columns, file.blob.label)
    except MeditokError as error:
        discovery.fail(file.blob.label, file.name, error)
        return True
    if kind == "dicom":
        dicom.append((file, own))
        return False
    discovery.sources.append(
        Source(
            file.blob.label,
            file.name,
            own,
            own.modality or _sidecar(kind, file.blob),
            file.columns,
            [file.blob],
            kind=kind,
        )
    )
    return True


def _leave_out(file: Found, options: ReadOptions, discovery: Discovery) -> None:
    """A file of no kind that is read: ignored, an error where it was named. A packed archive may hold pictures."""
    label = file.blob.label
    packed = label.lower().endswith(PACKED)
    advice = "a compressed archive, which is not read; unpack it, or make a plain .tar of it"
    if file.named and packed:
        raise BadInputError(f"{label}: {advice}")
    if file.named:
        open_blob(file.blob, options)  # raises NotAnImageError
    if packed:
        discovery.warnings.append(f"{label}: {advice}")
    discovery.ignored.append((label, "a compressed archive" if packed else "not an image"))


def _sidecar(kind: str, blob: Blob) -> str | None:
    if kind != "nifti":
        return None
    from meditok.data.readers.nifti import sidecar_modality

    try:
        return sidecar_modality(blob)
    except MeditokError:
        return None  # opening the file reports it


@dataclass
class _Scan:
    """A DICOM file to look at, with the options that hold for it."""

    file: Found
    options: ReadOptions

    @property
    def path(self) -> str:
        return self.file.blob.label


@dataclass
class _Seen:
    """What its header tells: slices, or why it is left out, or what is wrong with it."""

    slices: list = field(default_factory=list)
    reason: str | None = None
    localiser: bool = False  # left out for that alone
    error: MeditokError | None = None


def _look(scan: _Scan) -> Iterator[_Seen]:
    from meditok.data.readers.dicom_header import Header
    from meditok.data.readers.dicom_series import slices_of

    try:
        header = Header(scan.file.blob, scan.options)
        reason = header.not_an_image()
        if reason and not scan.file.named:
            localiser = header.is_localiser and not header.is_secondary and bool(header.layout.keyword)
            yield _Seen(reason=reason, localiser=localiser)
            return
        header.require_image()
        header.check_pixels()
        yield _Seen(slices_of(header))
    except MeditokError as error:
        yield _Seen(error=error)


def _series(
    files: list[tuple[Found, ReadOptions]],
    discovery: Discovery,
    options: ReadOptions,
    advance: Callable[[], object],
    through: Callable[[Callable, Sequence], Iterator],
) -> None:
    """Group DICOM files by series, orientation and size, one Source a group."""
    if not files:
        return
    from meditok.data.readers.dicom_series import arrange

    groups: dict[tuple, Source] = {}
    matched = False
    for (file, own), seen in zip(files, through(_look, [_Scan(*each) for each in files]), strict=True):
        label = file.blob.label
        advance()
        if seen.reason is not None:
            if seen.localiser:
                discovery.warnings.append(f"{label}: localiser left out (--include-secondary reads it)")
            discovery.ignored.append((label, seen.reason))
            continue
        if seen.error is not None:
            discovery.fail(label, file.name, seen.error)
            continue
        slices = seen.slices
        if options.series is not None:
            if options.series not in (slices[0].series, slices[0].number):
                discovery.ignored.append((label, "of another series"))
                continue
            matched = True
        key = slices[0].key if len({piece.key for piece in slices}) == 1 else (label,)
        source = groups.get(key)
        if source is None:
            source = groups[key] = Source(label, file.name, own, slices[0].modality)
        source.blobs.append(file.blob)
        source.slices += slices
        source.names[label] = file.name
        if file.columns:
            source.row_columns[file.name] = file.columns
    if options.series is not None and not matched:
        raise UsageError("--series matches no SeriesInstanceUID or SeriesNumber of the inputs; see meditok inspect")
    splits: dict[str, int] = {}
    for source in groups.values():
        splits[source.slices[0].series] = splits.get(source.slices[0].series, 0) + 1
        _, notes = arrange(source.slices)
        source.warnings = [f"{source.path}: {note}" for note in notes]
        discovery.warnings += source.warnings
        discovery.sources.append(source)
    for source in groups.values():
        count = splits.pop(source.slices[0].series, 1)
        if count > 1:
            discovery.warnings.append(
                f"{source.path}: its series holds {count} orientations, sizes or spacings; kept apart"
            )


def _check_ct_window(discovery: Discovery, options: ReadOptions, *, named: bool) -> None:
    """A CT window touches only CT: none at all is a usage error, one named non-CT file a bad input."""
    request = parse_window(options.window)
    if request.kind != "named" or not discovery.sources:
        return
    if any(source.modality == "ct" for source in discovery.sources):
        for source in discovery.sources:
            source.options = replace(source.options, mixed=True)
        return
    if named:
        source = discovery.sources.pop()
        what = f"window {request.name!r} is in Hounsfield units and this is not stated to be CT"
        message = f"{source.path}: {what}; pass --modality ct if it is, else use auto or LOW:HIGH"
        discovery.fail(source.path, source.name, IntensityError(message))
        return
    raise UsageError(
        f"window {request.name!r} is for CT and none of the inputs is; pass --modality ct, or another window"
    )
