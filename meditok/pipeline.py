"""From files and arrays to tokens and back: what the commands stream, and what a script calls in one line."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .errors import BadInputError, MeditokError, UsageError
from .tokens.schema import Description, TokenInfo, id_dtype
from .tokens.tokens import Tokens

if TYPE_CHECKING:
    from .data import MedicalImage, Row, Source
    from .data.options import ReadOptions
    from .models.tokenizer import Tokenizer
    from .tokens.keys import Namer

PATCH = 16
BATCH_SIZE = 16
_CHUNK = 1 << 20  # bytes read at once for a digest
FITS = ("pad", "stretch", "crop", "tile")
# What the published batch script does: resize to a square, whatever the aspect.
PRESETS = {"published": {"fit": "stretch"}}


@dataclass(frozen=True)
class Settings:
    """How pictures become tokens, beyond how files are read. UsageError for values that make no sense."""

    fit: str = "pad"
    size: int | None = None  # pixels a side; None: the model's own
    stable: bool = True  # ids do not depend on the batch
    batch_size: int = BATCH_SIZE
    keep_names: bool = False
    columns: tuple[str, ...] = ()  # manifest columns to copy

    def __post_init__(self):
        if self.fit not in FITS:
            raise UsageError(f"fit {self.fit!r}: unknown; choose one of {', '.join(FITS)}")
        if self.size is not None and (self.size < PATCH or self.size % PATCH):
            nearest = max(PATCH, round(self.size / PATCH) * PATCH)
            raise UsageError(f"size {self.size}: not a multiple of {PATCH}; the nearest is {nearest}")
        if self.batch_size < 1:
            raise UsageError(f"batch size {self.batch_size}: give at least 1")

    @classmethod
    def of(cls, preset: str | None = None, **values) -> Settings:
        """Settings from named values, None meaning the default; `preset` is a set of such values."""
        if preset is not None and preset not in PRESETS:
            raise UsageError(f"preset {preset!r}: unknown; choose one of {', '.join(PRESETS)}")
        named = {k: v for k, v in values.items() if v is not None}
        for name, value in PRESETS.get(preset, {}).items():
            if named.setdefault(name, value) != value:
                raise UsageError(f"preset {preset} means {name}={value}, but {name}={named[name]} was asked for")
        return cls(**named)

    def size_for(self, model: Tokenizer) -> int:
        return self.size or model.config.image_size


@dataclass
class Result:
    """One input file: its rows, or the error it failed with."""

    name: str  # path relative to the input it came with; for terminals and keyed hashes only
    path: str
    ids: list[np.ndarray] = field(default_factory=list)  # (G, N) each
    rows: list[Description] = field(default_factory=list)
    error: MeditokError | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class _Item:
    """A fitted picture, an error, or with neither the end of a source."""

    source: Source
    name: str = ""
    path: str = ""
    pixels: torch.Tensor | None = None  # (3, S, S)
    row: Description | None = None
    error: MeditokError | None = None
    warnings: Sequence[str] = ()


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


def encode(sources: Iterable[Source], model: Tokenizer, settings: Settings, namer: Namer) -> Iterator[Result]:
    """Tokenise every row of every source, in order, a batch at a time: one Result for each file.

    A failing file yields its error at once and no row; the others come out when their source (a file, or a
    series of files) is done. Memory: one batch of pictures, and the tokens of one source.
    """
    results: dict[str, Result] = {}
    for item, ids in _tokenized(_fitted(sources, settings.size_for(model), settings, namer), model, settings):
        if not item.name:
            for name, path in _files(item.source):
                if name not in results:
                    yield Result(name, path, error=BadInputError(f"{path}: holds no picture of the --frame asked for"))
            yield from (result for result in results.values() if result.error is None)
            results = {}
            continue
        result = results.setdefault(item.name, Result(item.name, item.path))
        if result.error is not None:
            continue
        result.warnings += [warning for warning in item.warnings if warning not in result.warnings]
        if item.error is not None:
            yield replace(result, error=item.error, ids=[], rows=[])
            result.error = item.error
        else:
            result.ids.append(ids)
            result.rows.append(item.row)


def _files(source: Source) -> list[tuple[str, str]]:
    """(relative name, path) of every file of a source."""
    names = getattr(source, "names", None)
    return [(name, label) for label, name in names.items()] if names else [(source.name, source.path)]


def _fitted(sources: Iterable[Source], size: int, settings: Settings, namer: Namer) -> Iterator[_Item]:
    from .data import fit

    for source in sources:
        for row in source.rows():
            name = row.name.rpartition("#")[0]
            if row.error is not None:
                yield _Item(source, name, row.path, error=row.error)
                continue
            extra = {column: _text(row.columns.get(column)) for column in settings.columns}
            for image in fit(row.image, size, settings.fit, multiple=PATCH):
                yield _Item(
                    source,
                    name,
                    row.path,
                    image.pixels,
                    describe(image, row.name, namer, extra),
                    warnings=image.warnings,
                )
        yield _Item(source)


def _tokenized(items: Iterable[_Item], model: Tokenizer, settings: Settings):
    """Pairs (item, ids (G, N) or None), in order; pictures run through the model `batch_size` at a time."""
    waiting: list[_Item] = []
    pictures = 0
    for item in items:
        waiting.append(item)
        pictures += item.pixels is not None
        if pictures == settings.batch_size:
            yield from _run(waiting, model, settings)
            waiting, pictures = [], 0
        elif not pictures:  # only failures so far: tell them now
            yield item, None
            waiting = []
    yield from _run(waiting, model, settings)


def _run(items: list[_Item], model: Tokenizer, settings: Settings):
    pixels = [item.pixels for item in items if item.pixels is not None]
    ids = iter(())
    if pixels:
        found = model.tokenize(torch.stack(pixels), stable=settings.stable).cpu().numpy()
        ids = iter(found.astype(id_dtype(model.config.codebook_size)))
    for item in items:
        yield item, None if item.pixels is None else next(ids)


def fingerprint(sources: Iterable[Source], settings: dict, namer: Namer) -> str:
    """Keyed digest of what a run works on: names, bytes and options of its files, and the settings given."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for source in sources:
        digest.update(repr((source.name, source.columns, replace(source.options, limits=None))).encode())
        for blob in sorted(source.blobs, key=lambda blob: blob.label):
            name = source.names.get(blob.label, source.name)
            digest.update(repr((name, source.row_columns.get(name), blob.size)).encode())
            for start in range(0, blob.size, _CHUNK):
                digest.update(blob.read(start, _CHUNK))
    return namer.digest(digest.hexdigest())


# -- one-line calls ------------------------------------------------------------------------------------------
def tokenize(
    inputs,
    model: str | os.PathLike | Tokenizer = "tiny",
    *,
    device: str = "auto",
    precision: str = "fp32",
    preset: str | None = None,
    fit: str | None = None,
    size: int | None = None,
    stable: bool = True,
    batch_size: int | None = None,
    keep_names: bool = False,
    columns: Sequence[str] = (),
    on_error: str = "fail",
    **options,
) -> Tokens:
    """Tokenise files, folders, manifests, arrays or MedicalImages, one row a picture, all in memory.

    `options` are those of `meditok.read` (modality, window, plane, ...). Arrays are read as .npy files are.
    Rows stand in the order of the inputs. Errors are those of reading; with on_error="skip" a failing file
    is left out with a warning.
    """
    import warnings

    from .data.options import read_options
    from .tokens.keys import Namer

    if on_error not in ("fail", "skip"):
        raise UsageError(f"on_error {on_error!r}: choose fail or skip")
    settings = Settings.of(
        preset,
        fit=fit,
        size=size,
        stable=stable,
        batch_size=batch_size,
        keep_names=keep_names,
        columns=tuple(columns),
    )
    sources, failed = _sources(inputs, read_options(**options))
    model = as_model(model, device, precision)
    namer = Namer(keep_names=keep_names)
    ids, rows = [], []
    for result in itertools.chain(failed, encode(sources, model, settings, namer)):
        if result.error is not None and on_error == "fail":
            raise result.error
        if result.error is not None:
            warnings.warn(f"left out: {result.error}", stacklevel=2)
        ids += result.ids
        rows += result.rows
    if not rows:
        raise BadInputError(f"{inputs if isinstance(inputs, (str, os.PathLike)) else 'inputs'}: no picture was found")
    side = settings.size_for(model) // PATCH
    info = TokenInfo.of(model, (side, side), stable=stable)
    return Tokens(np.stack(ids), rows, info)


def detokenize(
    tokens: Tokens | str | os.PathLike,
    model: str | os.PathLike | Tokenizer = "tiny",
    *,
    device: str = "auto",
    precision: str = "fp32",
) -> list[MedicalImage]:
    """Pictures of tokens or of a token file: a MedicalImage a row, at native size and place, tiles joined.

    CodebookMismatchError: made with another codebook than the model's.
    """
    from .tokens.restore import restore
    from .tokens.store import open_tokens

    model = as_model(model, device, precision)
    if isinstance(tokens, Tokens):
        return [picture.image for picture in restore(_batches(tokens), tokens.info, tokens.rows, model, "tokens")]
    with open_tokens(tokens) as reader:
        pictures = restore(reader.batches(BATCH_SIZE), reader.info, reader.descriptions(), model, str(tokens))
        return [picture.image for picture in pictures]


def _batches(tokens: Tokens):
    for start in range(0, len(tokens), BATCH_SIZE):
        yield tokens.codes[start : start + BATCH_SIZE], tokens.rows[start : start + BATCH_SIZE]


def as_model(model: str | os.PathLike | Tokenizer, device: str = "auto", precision: str = "fp32") -> Tokenizer:
    """The model itself, or the one loaded under that name."""
    if isinstance(model, (str, os.PathLike)):
        from .models.files import load

        return load(model, device=device, precision=precision)
    return model


@dataclass
class _Given:
    """Pictures given in memory, walked like a file."""

    name: str
    path: str
    images: list[MedicalImage]

    def rows(self) -> Iterator[Row]:
        from .data import Row

        for frame, image in enumerate(self.images):
            yield Row(name=f"{self.name}#{frame}", path=self.path, image=image, error=None, columns={})


def _sources(inputs, options: ReadOptions) -> tuple[list, list[Result]]:
    """(sources to walk, inputs that failed before their rows) of whatever `tokenize` was given."""
    from .data import discover
    from .data.processor import as_images

    several = isinstance(inputs, (list, tuple, Iterator))
    items = list(inputs) if several else [inputs]
    paths = [isinstance(item, (str, os.PathLike)) for item in items]
    if items and all(paths):
        found = discover([os.fspath(item) for item in items], options)
        failed = [Result(str(path), str(path), error=error) for path, error in found.failed]
        return _in_given_order(found.sources, items), failed
    if any(paths):
        raise UsageError("tokenize: paths and pictures were mixed; call it once for each")
    given = []
    for index, item in enumerate(items):
        name = f"input-{index:06d}" if several else "input"
        given.append(_Given(name, name, as_images(item, options)))
    return given, []


def _in_given_order(sources: list[Source], items: list[str | os.PathLike]) -> list[Source]:
    """Sources in the order of the inputs they came from, those of one input by name, as they stand."""
    place = {str(Path(item)): index for index, item in reversed(list(enumerate(items)))}

    def rank(source: Source) -> int:
        path = Path(source.path)
        return next((place[str(p)] for p in (path, *path.parents) if str(p) in place), len(items))

    return sorted(sources, key=rank)


def _text(value) -> str | None:
    return None if value is None else str(value)
