"""From files and arrays to tokens and back: what the commands stream, and what a script calls in one line."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .bulk.encoding import Result, encode
from .bulk.reading import PATCH
from .errors import BadInputError, UsageError
from .tokens.schema import TokenInfo
from .tokens.tokens import Tokens

if TYPE_CHECKING:
    from .data import MedicalImage, Row, Source
    from .data.options import ReadOptions
    from .models.tokenizer import Tokenizer

BATCH_SIZE = 16
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
