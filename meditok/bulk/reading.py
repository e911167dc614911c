"""From one source to fitted pictures with their rows. Runs in worker processes, which never import a model."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import BadInputError, MeditokError
from ..tokens.schema import Description

if TYPE_CHECKING:
    from ..data import MedicalImage, Source
    from ..tokens.keys import Namer

PATCH = 16
_CHUNK = 1 << 20  # bytes read at once for a digest


@dataclass
class End:
    """The end of a source: what its files hold, and what reading it took."""

    files: list[tuple[str, str]]  # (relative name, path) of every file
    contents: str = ""  # SHA-256 of their bytes
    stamp: str = ""  # their sizes and modification times
    seconds: float = 0.0  # spent reading and fitting


@dataclass
class Item:
    """A fitted picture with its row, the error of a file, or the end of a source."""

    name: str = ""  # of the file, relative to the input it came with
    path: str = ""
    pixels: torch.Tensor | None = None  # (3, S, S) float32
    row: Description | None = None
    warnings: tuple[str, ...] = ()
    error: MeditokError | None = None
    end: End | None = None
    ids: np.ndarray | None = None  # (G, N), and no pixels any more, once it has been through the model
    seconds: float = 0.0  # that this took

    def __getstate__(self) -> dict:
        # As plain bytes, and one channel of a grey picture: torch would pass them through shared memory, which
        # containers often hold 64 MiB of.
        state = dict(self.__dict__)
        if self.pixels is not None:
            state["pixels"] = (self.pixels[:1] if self.row.channels == 1 else self.pixels).contiguous().numpy()
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.pixels is not None:
            pixels = torch.from_numpy(self.pixels)
            self.pixels = pixels.expand(3, *pixels.shape[1:])


@dataclass
class Reader:
    """Reads sources one after the other: call it with one, and iterate over its Items.

    A file yields its first error and then no picture more; the last item of every source is its End. With
    `hashing` the End tells the contents, and a file that changes while it is read fails.
    """

    size: int  # pixels a side
    fit: str
    columns: tuple[str, ...]  # manifest columns to copy
    namer: Namer
    hashing: bool = False

    def __call__(self, source: Source) -> Iterator[Item]:
        spent, started = 0.0, time.perf_counter()
        stamps = stamps_of(source) if self.hashing else {}
        for item in self._items(source):
            spent += time.perf_counter() - started
            yield item
            started = time.perf_counter()
        end = End(files_of(source))
        if self.hashing:
            end.contents, end.stamp = contents_of(source), stamp_text(stamps)
            after = stamps_of(source)
            for name, path in end.files:
                if stamps.get(path) != after.get(path):
                    error = BadInputError(f"{path}: changed while it was read; run again when it is at rest")
                    yield Item(name, path, error=error)
        end.seconds = spent + time.perf_counter() - started
        yield Item(end=end)

    def _items(self, source: Source) -> Iterator[Item]:
        failed: set[str] = set()
        several = len(getattr(source, "names", ())) > 1
        for row in source.rows():
            name = row.name.rpartition("#")[0]
            if name in failed:
                continue
            error = row.error
            if error is None:
                extra = {column: _text(row.columns.get(column)) for column in self.columns}
                try:
                    fitted = fitted_to(row.image, row.path, self.size, self.fit)
                except MeditokError as problem:
                    error = problem
            if error is not None:
                failed.add(name)
                yield Item(name, row.path, error=error)
                if not several:
                    return
                continue
            for image in fitted:
                described = describe(image, row.name, self.namer, extra)
                yield Item(name, row.path, image.pixels, described, tuple(image.warnings))


def fitted_to(image: MedicalImage, path: str, size: int, mode: str) -> list[MedicalImage]:
    """Pictures of size x size made from `image`, see data.fit; what that refuses, it refuses naming the file."""
    from ..data import fit

    try:
        return fit(image, size, mode, multiple=PATCH)
    except MeditokError as error:
        raise type(error)(f"{path}: {error}") from error


def describe(image: MedicalImage, row_name: str, namer: Namer, extra: dict | None = None) -> Description:
    """The row of a fitted picture named "<relative path>#<frame>"."""
    file, _, frame = row_name.rpartition("#")
    return Description(
        id=namer.row_id(file, int(frame)),
        height=image.height,
        width=image.width,
        modality=image.modality,
        body_part=image.body_part,
        window=image.window,
        unit=image.unit,
        low=float(image.low),
        high=float(image.high),
        channels=image.channels,
        source=namer.name(file),
        volume=namer.name(image.volume),
        slice=image.slice,
        frame=image.frame,
        position=image.position,
        tile=image.tile,
        geometry=image.geometry,
        steps=tuple(image.steps),
        extra=extra or {},
    )


def _text(value) -> str | None:
    return None if value is None else str(value)


# -- what a source is made of --------------------------------------------------------------------------------
def files_of(source: Source) -> list[tuple[str, str]]:
    """(relative name, path) of every file of a source."""
    names = getattr(source, "names", None)
    return [(name, label) for label, name in names.items()] if names else [(source.name, source.path)]


def description_of(source: Source) -> str:
    """Names, sizes and what is stated of a source's files, without opening one."""
    text = [repr((source.name, source.columns, replace(source.options, limits=None)))]
    for blob in _blobs(source):
        name = source.names.get(blob.label, source.name)
        text.append(repr((name, source.row_columns.get(name), _size(blob))))
    return "".join(text)


def stamps_of(source: Source) -> dict[str, tuple]:
    """Label of every file -> its size and modification time, or () where it is gone."""
    stamps = {}
    for blob in _blobs(source):
        try:
            status = os.stat(blob.path)
            stamps[blob.label] = status.st_size, status.st_mtime_ns, blob.offset, blob.length
        except OSError:
            stamps[blob.label] = ()
    return stamps


def stamp_text(stamps: dict[str, tuple]) -> str:
    return repr(list(stamps.values()))


def contents_of(source: Source) -> str:
    """SHA-256 over the bytes of a source's files; one that cannot be read counts as "unreadable"."""
    digest = hashlib.sha256()
    for blob in _blobs(source):
        try:
            for start in range(0, blob.size, _CHUNK):
                digest.update(blob.read(start, _CHUNK))
        except MeditokError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def _blobs(source: Source) -> list:
    return sorted(source.blobs, key=lambda blob: blob.label)


def _size(blob) -> int | None:
    try:
        return blob.size
    except MeditokError:  # gone since; reading it reports that
        return None
