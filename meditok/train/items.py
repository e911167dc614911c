"""What may be trained on: found as every command finds it, checked before the first step, read by position.

Images, or rows of a token file: these hold no pixels, but the features that heads_only aligns with texts are a
function of the ids, so alignment heads can be trained on ids and captions alone.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..data import discover
from ..data.options import ReadOptions
from ..data.sources import Source
from ..data.windows import random_ct_window
from ..errors import BadInputError, MeditokError, UsageError
from ..evaluate.held_out import fingerprints
from ..models import files as models
from ..tokens.datasets import TokenDataset
from ..tokens.store import is_token_file, open_tokens
from .config import TrainConfig
from .distributed import ALONE, World
from .reading import each

_SHOWN = 20
STATED = ("source", "licence", "licence_stated")  # columns that weights made to be published have to repeat


@dataclass(frozen=True)
class Item:
    """One picture that may be drawn: a frame of a source or a row of a token file, and what is known of it."""

    source: Source | None  # None of a token file
    frame: int  # or row
    caption: str
    modality: str
    name: str  # relative to its input, "#" and the frame; the row's id of a token file


class TokenRows(list[Item]):
    """Items of a token file: `ids[item.frame]` are an item's ids (G, N), `info` is the file's header."""

    def __init__(self, items: Iterable[Item], ids: TokenDataset):
        super().__init__(items)
        self.ids, self.info = ids, ids.info


def find_items(config: TrainConfig, world: World = ALONE) -> list[Item]:
    """Every usable picture, in a fixed order; headers are read by each process in part. BadInputError, on every
    process, lists up to 20 inputs that cannot be used; UsageError: none."""
    if not config.data:
        raise UsageError(
            "train: no data; pass --data=PATH (a folder, manifest or tar, several joined by commas, or a token file)"
        )
    inputs = config.data.split(",")
    if any(is_token_file(path) for path in inputs):
        return _token_rows(inputs, config)

    def through(look: Callable, scans: Sequence) -> Iterator:
        return itertools.chain(*each(functools.partial(_listed, look), scans, config, world))

    found = discover(inputs, ReadOptions(), through=through)
    for note in found.warnings[:_SHOWN] if world.first else ():
        warnings.warn(note, stacklevel=2)
    failed = [str(error) for path, error in found.failed if fnmatch.fnmatch(str(path), f"*{config.include}")]
    left_out: Counter = Counter()
    wanted: list[Source] = []
    for source in found.sources:
        if reason := _unwanted(source.name, source.columns, config):
            left_out[reason] += 1
        else:
            wanted.append(source)
    items: list[Item] = []
    for source, frames in zip(wanted, each(_frames, wanted, config, world), strict=True):
        try:
            items += _items(source, frames, config)
        except BadInputError as error:
            failed.append(str(error))
    if failed:
        raise _unusable(config, failed)
    if not items:
        raise _nothing(config, left_out)
    return items


def _listed(look: Callable[[object], Iterator], scan: object) -> list:
    return list(look(scan))


def _frames(source: Source) -> int | str:
    """How many pictures it holds, or why it cannot be opened."""
    try:
        return source.open().frames
    except MeditokError as error:
        return str(error)


def _token_rows(inputs: list[str], config: TrainConfig) -> TokenRows:
    """Rows of one token file or store, with the columns that were copied into it."""
    if len(inputs) > 1:
        raise UsageError(f"--data={config.data}: a token file is trained on alone; give one file or store")
    if not (config.heads_only and config.target == "text"):
        raise UsageError(
            f"{config.data}: tokens hold no pixels to reconstruct, and train alignment heads on captions alone; use "
            "tiny-stage2, or pass --heads_only=true --target=text"
        )
    rows: list[Item] = []
    failed: list[str] = []
    left_out: Counter = Counter()
    with open_tokens(config.data) as reader:
        for number, row in enumerate(reader.descriptions()):
            if reason := _unwanted(row.id, row.extra, config):
                left_out[reason] += 1
                continue
            modality = row.modality or "other"
            try:
                where = f"{config.data}, row {number}"
                rows.append(Item(None, number, _caption(row.extra, modality, where, config), modality, row.id))
            except BadInputError as error:
                failed.append(str(error))
    if failed:
        raise _unusable(config, failed)
    if not rows:
        raise _nothing(config, left_out)
    return TokenRows(rows, TokenDataset(config.data))


def _nothing(config: TrainConfig, left_out: Counter) -> BadInputError:
    why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no image in it"
    return BadInputError(f"{config.data}: nothing to train on ({why}); check --include, --split and --weights_ok")


def _unusable(config: TrainConfig, reasons: list[str]) -> BadInputError:
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    shown = "; ".join(reasons[:_SHOWN])
    inputs = "input" if len(reasons) == 1 else "inputs"
    return BadInputError(f"{config.data}: {len(reasons)} {inputs} cannot be trained on: {shown}{more}")


def check_items(items: Sequence[Item], config: TrainConfig, world: World) -> None:
    """Read every picture once, each process a part. BadInputError, on every process, lists up to 20 that fail.

    Rows of a token file were checked when it was opened.
    """
    if isinstance(items, TokenRows):
        return
    if reasons := [reason for reason in each(_problem, items, config, world) if reason]:
        raise _unusable(config, reasons)


def _problem(item: Item) -> str:
    """Why it cannot be read, or ""."""
    try:
        read(item, drawn_window(item, np.random.default_rng(0)))
    except MeditokError as error:
        return str(error)
    return ""


def data_record(items: Sequence[Item], config: TrainConfig, world: World) -> dict:
    """What data.json beside the weights says: how many images, the hash of their list, the fingerprint of every file,
    by which `meditok evaluate` refuses them; those of the weights that training starts from among them. With weights_ok
    also how many images of each source, with its licence, as published weights have to say; without it a manifest's
    words stay out, since they may name people. Token files do not tell what files they were made of: their rows are
    counted as "unlisted".

    Reads every file once, each process a part.
    """
    before = models.data_record(config.init) if config.init else {}
    sources = list({id(item.source): item.source for item in items if item.source}.values())
    files = {print for prints in each(fingerprints, sources, config, world) for print in prints}
    counts = Counter(
        (item.modality, *(item.source.columns.get(key, "") for key in STATED))
        for item in items
        if item.source and config.weights_ok
    )
    keys = ("modality", *STATED, "images")
    unlisted = sum(item.source is None for item in items) + before.get("unlisted", 0)
    return {
        "images": len(items),
        "list_sha256": list_hash(items),
        "sources": [dict(zip(keys, (*key, n), strict=True)) for key, n in sorted(counts.items()) if any(key[1:])],
        "files": sorted(files.union(before.get("files", ()))),
    } | ({"unlisted": unlisted} if unlisted else {})


def _unwanted(name: str, columns: dict, config: TrainConfig) -> str:
    """Why an input is left out, or ""."""
    if config.include and not fnmatch.fnmatch(name, config.include):
        return f"not named {config.include}"
    if config.split and str(columns.get("split") or config.split) != config.split:
        return f"not of split {config.split}"
    if config.weights_ok and columns.get("weights_ok") != "yes":
        return "without weights_ok = yes"
    return ""


def _items(source: Source, frames: int | str, config: TrainConfig) -> list[Item]:
    """Its pictures; BadInputError where `frames` says why there are none, or its caption is missing."""
    if isinstance(frames, str):
        raise BadInputError(frames)
    modality = str(source.columns.get("modality") or source.modality or "other")
    text = _caption(source.columns, modality, source.path, config)
    return [Item(source, frame, text, modality, f"{source.name}#{frame}") for frame in range(frames)]


def _caption(columns: dict, modality: str, where: str, config: TrainConfig) -> str:
    text = f"A {modality} image" if config.caption == "modality" else columns.get(config.caption)
    if config.target == "text" and not text:
        raise BadInputError(f"{where}: no {config.caption} for it; add the column, or --caption=modality")
    return str(text or "")


def list_hash(items: Sequence[Item]) -> str:
    """SHA-256 over the sorted names of what is trained on."""
    names = sorted(item.name for item in items)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def drawn_window(item: Item, random: np.random.Generator) -> str | None:
    """The window of a CT in Hounsfield units, drawn as in training; None for all else."""
    in_units = item.source.modality == "ct" and not item.source.options.display
    return random_ct_window(random) if in_units else None


def read(item: Item, window: str | None) -> torch.Tensor:
    """Pixels (3, H, W) in [-1, 1], through `window` if there is one."""
    options = item.source.options
    if window:
        options = replace(options, window=window, mixed=True)
    reader = replace(item.source, options=options).open()
    if hasattr(reader, "prepare"):
        reader.prepare()
    return reader.image(item.frame).pixels
