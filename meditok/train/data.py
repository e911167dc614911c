"""What a step sees.

Sample i of a run is a function of (seed, i) alone: which image, which window, which view. So neither the number of
processes nor of workers nor an interruption changes what is seen, and a resumed run needs no state of the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.augment import Augmentation, resize
from ..errors import MeditokError, UsageError
from .config import TrainConfig
from .items import Item, TokenRows, drawn_window, read
from .reading import settings, through


@dataclass
class Batch:
    """What a step sees: images (B, 3, S, S) float32 in [-1, 1] or else tokens (B, G, N) int64, their texts, and where
    they come from."""

    images: torch.Tensor | None
    captions: list[str]
    modalities: list[str]
    samples: list[int]
    pictures: list[int]  # places of what they show in the list of items
    tokens: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        images, tokens = (x if x is None else x.to(device, non_blocking=True) for x in (self.images, self.tokens))
        return replace(self, images=images, tokens=tokens)


class Samples(Dataset):
    """Sample i of a run: (image (3, S, S), or ids (G, N) of a token file; caption, modality, i, place in `items`)."""

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
        return self._shown(index, item, sample), item.caption, item.modality, sample, index

    def _shown(self, index: int, item: Item, sample: int) -> torch.Tensor:
        if isinstance(self.items, TokenRows):
            return self.items.ids[item.frame]
        random = np.random.default_rng((self.config.seed, 1, sample))
        generator = torch.Generator().manual_seed(int(random.integers(2**63)))
        return self.view(self._read(index, drawn_window(item, random)), generator)

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


class _Told(Dataset):
    """The samples; an error that one is met with stands in its place, for the process that asked to raise."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, sample: int):
        try:
            return self.samples[sample]
        except MeditokError as error:
            return error


def collate(samples: list) -> Batch | MeditokError:
    if failed := [sample for sample in samples if isinstance(sample, MeditokError)]:
        return failed[0]
    shown, *others = zip(*samples, strict=True)
    return _batch(shown, *map(list, others))


def _batch(shown: Sequence[torch.Tensor], *others: list) -> Batch:
    """Of images (3, S, S), or of ids (G, N)."""
    stacked = torch.stack(list(shown))
    images, tokens = (stacked, None) if stacked.is_floating_point() else (None, stacked)
    return Batch(images, *others, tokens)


def batches(items: Sequence[Item], config: TrainConfig, *, start: int, rank: int, world: int) -> Iterator[Batch]:
    """Micro-batches of this rank from step `start` on. Every rank takes a contiguous part of each micro-batch. Close
    it: processes may be reading for it."""
    micro = config.batch // config.accumulate
    if micro % world:
        raise UsageError(f"batch {config.batch} in {config.accumulate} parts does not divide by {world} processes")
    share = micro // world
    loader = DataLoader(
        _Told(Samples(items, config)),
        batch_sampler=_Parts(start * config.batch + rank * share, config.steps * config.batch, micro, share),
        collate_fn=collate,
        **settings(config),
    )
    yield from through(loader)


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
    if isinstance(items, TokenRows):
        shown = [items.ids[item.frame] for item in chosen]
    else:
        shown = [resize(read(item, None), config.size) for item in chosen]
    nowhere = [0] * len(chosen)
    return _batch(shown, [i.caption for i in chosen], [i.modality for i in chosen], nowhere, nowhere)
