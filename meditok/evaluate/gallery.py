"""The worst pictures of each modality, kept while an evaluation runs, for its report page."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from ..data import Row
    from ..tokens.keys import Namer
    from .reconstruction import Pair

MAGNIFIED = 4  # of the difference


@dataclass
class Shown:
    """One picture with what each codec made of it; uint8 (H, W) or (H, W, 3)."""

    id: str  # keyed hash
    modality: str
    original: np.ndarray
    others: list[np.ndarray] = field(default_factory=list)
    differences: list[np.ndarray] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Gallery:
    """Watches an evaluation; holds the `count` pictures of each modality with the least PSNR of the first codec."""

    count: int
    namer: Namer
    _kept: dict[str, list] = field(default_factory=dict)
    _order: itertools.count = field(default_factory=itertools.count)

    def __call__(self, row: Row, pairs: list[tuple[Pair, dict[str, float]]]) -> None:
        heap = self._kept.setdefault(row.image.modality, [])
        score = -pairs[0][1]["psnr"]  # the smallest of the heap is the best kept, the first to go
        if not self.count or (len(heap) == self.count and score <= heap[0][0]):
            return
        file, _, frame = row.name.rpartition("#")
        shown = Shown(self.namer.digest(f"{file}#{frame}"), row.image.modality, as_bytes(pairs[0][0].image))
        for pair, values in pairs:
            shown.others.append(as_bytes(pair.other))
            shown.differences.append(as_bytes((pair.other - pair.image).abs() * MAGNIFIED))
            shown.scores.append(values)
        heapq.heappush(heap, (score, -next(self._order), shown))
        if len(heap) > self.count:
            heapq.heappop(heap)

    def worst_first(self) -> dict[str, list[Shown]]:
        """The kept pictures of each modality, worst first."""
        return {name: [kept[2] for kept in sorted(heap, reverse=True)] for name, heap in sorted(self._kept.items())}


def as_bytes(values: torch.Tensor) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) of values (C, H, W) in [0, 1]."""
    array = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return array[0].numpy() if len(array) == 1 else array.permute(1, 2, 0).contiguous().numpy()
