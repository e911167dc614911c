"""Training images: found as every command finds them, checked before the first step, read by position.

Sample i of a run is a function of (seed, i) alone: which image, which window, which view. So neither the number of
processes nor of workers nor an interruption changes what is seen, and a resumed run needs no state of the data.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..data import discover
from ..data.augment import Augmentation, resize
from ..data.options import ReadOptions
from ..data.sources import Source
from ..data.windows import random_ct_window
from ..errors import BadInputError, MeditokError, UsageError
from .config import TrainConfig
from .distributed import World
from .signals import leave_to_parent

_SHOWN = 20


@dataclass(frozen=True)
class Item:
    """One picture that may be drawn: a frame of a source, and what is known of it."""

    source: Source
    frame: int
    caption: str
    modality: str


@dataclass
class Batch:
    """What a step sees: images (B, 3, S, S) float32 in [-1, 1], texts, and where they come from."""

    images: torch.Tensor
    captions: list[str]
    modalities: list[str]
    samples: list[int]
    pictures: list[int]  # places of what they show in the list of items

    def to(self, device: torch.device) -> Batch:
        return replace(self, images=self.images.to(device, non_blocking=True))

    def describe(self) -> str:
        """Names the batch in an error without naming a file."""
        return f"samples {self.samples[0]}..{self.samples[-1]}"


def find_items(config: TrainConfig) -> list[Item]:
    """Every usable picture, in a fixed order. BadInputError lists up to 20 that cannot be used; UsageError: none."""
    if not config.data:
        raise UsageError("train: no data; pass --data=PATH (a folder, manifest or tar, several joined by commas)")
    found = discover(config.data.split(","), ReadOptions())
    failed = [(path, error) for path, error in found.failed if fnmatch.fnmatch(str(path), f"*{config.include}")]
    items: list[Item] = []
    left_out: Counter = Counter()
    for source in found.sources:
        reason = _unwanted(source, config)
        if reason:
            left_out[reason] += 1
            continue
        try:
            items += _items(source, config)
        except MeditokError as error:
            failed.append((source.path, error))
    if failed:
        raise _unusable(config, [str(error) for _, error in failed])
    if not items:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no image in it"
        raise BadInputError(f"{config.data}: nothing to train on ({why}); check --split and --weights_ok")
    return items


def _unusable(config: TrainConfig, reasons: list[str]) -> BadInputError:
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    shown = "; ".join(reasons[:_SHOWN])
    return BadInputError(f"{config.data}: {len(reasons)} inputs cannot be trained on: {shown}{more}")


def check_items(items: Sequence[Item], config: TrainConfig, world: World) -> None:
    """Read every picture once, each process a part. BadInputError, on every process, lists up to 20 that fail."""
    mine = _Readable(items[world.rank :: world.size])
    loader = torch.utils.data.DataLoader(mine, 16, collate_fn=list, **_reading(config))
    reasons = [reason for reasons in loader for reason in reasons if reason]
    count = world.sum(len(reasons))
    if reasons:
        raise _unusable(config, reasons)
    if count:
        raise BadInputError(f"{config.data}: {count} inputs cannot be trained on; the other processes name them")


class _Readable(torch.utils.data.Dataset):
    """Why picture i cannot be read, or ""."""

    def __init__(self, items: Sequence[Item]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> str:
        try:
            read(self.items[index], drawn_window(self.items[index], np.random.default_rng(0)))
        except MeditokError as error:
            return str(error)
        return ""


def _unwanted(source: Source, config: TrainConfig) -> str:
    columns = source.columns
    if config.include and not fnmatch.fnmatch(source.name, config.include):
        return f"not named {config.include}"
    if config.split and str(columns.get("split") or config.split) != config.split:
        return f"not of split {config.split}"
    if config.weights_ok and columns.get("weights_ok") != "yes":
        return "without weights_ok = yes"
    return ""


def _items(source: Source, config: TrainConfig) -> list[Item]:
    reader = source.open()
    columns = source.columns
    modality = str(columns.get("modality") or source.modality or "other")
    text = columns.get(config.caption)
    if config.caption == "modality":
        text = f"A {modality} image"
    if config.target == "text" and not text:
        raise BadInputError(f"{source.path}: no {config.caption} for it; add the column, or --caption=modality")
    return [Item(source, frame, str(text or ""), modality) for frame in range(reader.frames)]


def list_hash(items: Sequence[Item]) -> str:
    """SHA-256 over the sorted names of what is trained on."""
    names = sorted(f"{item.source.name}#{item.frame}" for item in items)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


class Samples(torch.utils.data.Dataset):
    """Sample i of a run: (image (3, S, S), caption, modality, i, place of the picture in `items`)."""

    def __init__(self, items: Sequence[Item], config: TrainConfig):
        self.items, self.config = items, config
        self.view = Augmentation(config.size, config.crop_scale, config.crop_ratio, grayscale=config.grayscale)
        self.weights = modality_weights([item.modality for item in items], config.balance)
        self._kept: dict[tuple[int, str | None], torch.Tensor] = {}

    def __len__(self) -> int:
        return self.config.steps * self.config.batch

    def __getitem__(self, sample: int):
        index = self.pick(sample)
        item = self.items[index]
        random = np.random.default_rng((self.config.seed, 1, sample))
        generator = torch.Generator().manual_seed(int(random.integers(2**63)))
        image = self._read(index, drawn_window(item, random))
        return self.view(image, generator), item.caption, item.modality, sample, index

    def _read(self, index: int, window: str | None) -> torch.Tensor:
        """Pixels (3, H, W); with `cache` kept, a grey image as one channel."""
        if not self.config.cache:
            return read(self.items[index], window)
        if (index, window) not in self._kept:
            pixels = read(self.items[index], window)
            grey = bool((pixels == pixels[:1]).all())
            self._kept[index, window] = pixels[:1].clone() if grey else pixels
        return self._kept[index, window].expand(3, -1, -1)

    def pick(self, sample: int) -> int:
        """Index of the image that sample i shows: a new permutation every pass, or a weighted draw."""
        if self.weights is None:
            passes, place = divmod(sample, len(self.items))
            return _permutation(self.config.seed, passes, len(self.items))[place]
        random = np.random.default_rng((self.config.seed, 2, sample))
        return int(np.searchsorted(self.weights, random.random(), side="right"))


_permutations: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(seed: int, passes: int, count: int) -> np.ndarray:
    key = (seed, passes, count)
    if key not in _permutations:
        for old in [k for k in _permutations if k[1] < passes - 1]:
            del _permutations[old]
        _permutations[key] = np.random.default_rng((seed, 0, passes)).permutation(count)
    return _permutations[key]


def modality_weights(modalities: Sequence[str], balance: float) -> np.ndarray | None:
    """Cumulative probability of each image: count^-balance of its modality, or None for a plain permutation."""
    if not balance:
        return None
    counts = Counter(modalities)
    weights = np.array([counts[modality] ** -balance for modality in modalities], dtype=np.float64)
    return np.cumsum(weights / weights.sum())


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


def collate(samples: list) -> Batch:
    images, *others = zip(*samples, strict=True)
    return Batch(torch.stack(images), *map(list, others))


def batches(items: Sequence[Item], config: TrainConfig, *, start: int, rank: int, world: int) -> Iterator[Batch]:
    """Micro-batches of this rank from step `start` on. Every rank takes a contiguous part of each micro-batch."""
    micro = config.batch // config.accumulate
    if micro % world:
        raise UsageError(f"batch {config.batch} in {config.accumulate} parts does not divide by {world} processes")
    share = micro // world
    loader = torch.utils.data.DataLoader(
        Samples(items, config),
        batch_sampler=_Parts(start * config.batch + rank * share, config.steps * config.batch, micro, share),
        collate_fn=collate,
        **_reading(config),
    )
    yield from loader


def _reading(config: TrainConfig) -> dict:
    """The DataLoader's settings for processes that read."""
    context = _workers() if config.workers else None
    return {"num_workers": config.workers, "multiprocessing_context": context, "worker_init_fn": leave_to_parent}


def _workers() -> multiprocessing.context.BaseContext:
    """Workers forked from a server that has this module and no CUDA context, threads or model of ours."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@dataclass(frozen=True)
class _Parts:
    """Sample numbers of one rank, micro-batch by micro-batch; made as they are needed, for runs of any length."""

    first: int
    end: int
    step: int
    share: int

    def __iter__(self):
        for start in range(self.first, self.end, self.step):
            yield list(range(start, start + self.share))


def held_out(items: Sequence[Item], config: TrainConfig, count: int) -> Batch:
    """The first `count` images spread evenly over the list, unaugmented: what reconstruction sheets show."""
    chosen = [items[index] for index in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]
    images = torch.stack([resize(read(item, None), config.size) for item in chosen])
    nowhere = [0] * len(chosen)
    return Batch(images, [i.caption for i in chosen], [i.modality for i in chosen], nowhere, nowhere)


def passes(items: Sequence[Item], config: TrainConfig) -> float:
    """How often the run shows every image, on average."""
    return config.steps * config.batch / max(1, len(items))


def steps_a_pass(items: Sequence[Item], config: TrainConfig) -> int:
    return max(1, math.ceil(len(items) / config.batch))
