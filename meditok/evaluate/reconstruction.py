"""Pictures through codecs, one after the other: how close each comes back, how many bytes it took, which codes it used.

Scores are taken twice: at the codec's resolution over the part that is no padding, and at native size after the fitting
was undone. Values are not rounded to 8 bits. Memory holds one picture at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..data import MedicalImage, Row, Source, fit, unfit
from ..nn.health import measure
from . import metrics
from .codecs import Codec, Coded, TokenizerCodec
from .extractors import Extractor, Frechet
from .held_out import group_of
from .summary import Bootstrap, summarise

NATIVE = "native "  # begins the name of a score at native size
Distance = Callable[[torch.Tensor, torch.Tensor], float]  # of two pictures (1, 3, H, W) in [-1, 1]


@dataclass
class Pair:
    """A picture of the source and what became of it, over the same pixels: (C, H, W) in [0, 1]."""

    image: torch.Tensor
    other: torch.Tensor
    unit: str
    data_range: float  # high - low, in the unit


@dataclass
class Scores:
    """One codec's values, one of each a picture; nan where a metric is not defined."""

    values: dict[str, list[float]] = field(default_factory=dict)
    bytes: list[int] = field(default_factory=list)

    def add(self, values: dict[str, float], size: int) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
        self.bytes.append(size)


class Reconstruction:
    """Takes rows one at a time; `result()` is what is reported of each codec."""

    def __init__(
        self,
        codecs: Sequence[Codec],
        mode: str = "pad",
        *,
        group: str = "group",
        ms_ssim: bool = False,
        distances: dict[str, Distance] | None = None,
        extractor: Extractor | None = None,
    ):
        self.codecs, self.mode, self.group = codecs, mode, group
        self.ms_ssim, self.distances = ms_ssim, distances or {}
        self.frechet = [Frechet(extractor) for _ in codecs] if extractor else None
        self.scores = [Scores() for _ in codecs]
        self.modalities: list[str] = []
        self.groups: list[str] = []

    def add(self, row: Row) -> list[tuple[Pair, dict[str, float]]]:
        """Score one picture; the pair at the codec's resolution and the scores, of each codec."""
        image, found = row.image, []
        fitted: dict[int, MedicalImage] = {}
        for number, (codec, scores) in enumerate(zip(self.codecs, self.scores, strict=True)):
            if codec.side not in fitted:
                fitted[codec.side] = fit(image, codec.side, self.mode)[0]
            coded = codec(fitted[codec.side])
            pair = at_codec(image, fitted[codec.side], coded)
            values = self._values(pair)
            values |= {NATIVE + k: v for k, v in basic(at_native(image, fitted[codec.side], coded)).items()}
            scores.add(values, coded.size)
            if self.frechet:
                self.frechet[number].add(*_as_seen(pair))
            found.append((pair, values))
        self.modalities.append(image.modality)
        self.groups.append(group_of(row, self.group))
        return found

    def _values(self, pair: Pair) -> dict[str, float]:
        values = basic(pair)
        if self.ms_ssim:
            values["ms_ssim"] = metrics.ms_ssim(pair.image, pair.other, 1.0)
        return values | {name: distance(*_as_seen(pair)) for name, distance in self.distances.items()}

    def result(self, how: Bootstrap) -> list[dict]:
        """A record of each codec: overall, overall_micro, modalities, native, bytes, and of a model its codebook."""
        records = []
        for number, (codec, scores) in enumerate(zip(self.codecs, self.scores, strict=True)):
            here = {k: v for k, v in scores.values.items() if not k.startswith(NATIVE)}
            native = {k.removeprefix(NATIVE): v for k, v in scores.values.items() if k.startswith(NATIVE)}
            record = {"name": codec.name} | codec.describe()
            record |= summarise(self.modalities, self.groups, here, how)
            record["native"] = summarise(self.modalities, self.groups, native, how)
            record["bytes_mean"] = sum(scores.bytes) / max(1, len(scores.bytes))
            if self.frechet:
                record["fid"] = self.frechet[number].value()
            if isinstance(codec, TokenizerCodec):
                record["codebook"] = codebook_use(codec.counts)
            records.append(record)
        return records


def at_codec(image: MedicalImage, fitted: MedicalImage, coded: Coded) -> Pair:
    """The part of the fitted picture that is no padding."""
    top, bottom, left, right = (max(0, side) for side in fitted.geometry.pad)
    height, width = fitted.pixels.shape[1:]
    inside = slice(None), slice(top, height - bottom), slice(left, width - right)
    return _pair(image, fitted.pixels[inside], coded.pixels[inside])


def at_native(image: MedicalImage, fitted: MedicalImage, coded: Coded) -> Pair:
    """The picture at its own size; of a crop, the part that was kept."""
    size = image.height, image.width
    other = unfit(coded.pixels, fitted.geometry, size)
    original = image.pixels
    if fitted.geometry.fit == "crop":
        kept = unfit(torch.ones(1, *coded.pixels.shape[1:]), fitted.geometry, size)[0] > 1 - 1e-6
        rows, columns = kept.any(1).nonzero().flatten(), kept.any(0).nonzero().flatten()
        box = slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        other, original = other[box], original[box]
    return _pair(image, original, other)


def _pair(image: MedicalImage, original: torch.Tensor, other: torch.Tensor) -> Pair:
    both = ((x[: len(other)].double().clamp(-1, 1) + 1) / 2 for x in (original, other))
    return Pair(*both, unit=image.unit, data_range=abs(image.high - image.low))


def _as_seen(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Both pictures as networks take them: (1, 3, H, W) float32 in [-1, 1]."""
    return tuple(x.float().mul(2).sub(1).expand(3, -1, -1)[None] for x in (pair.image, pair.other))


def basic(pair: Pair) -> dict[str, float]:
    """psnr in dB, ssim, and mae_hu of pictures in Hounsfield units, nan for others."""
    return {
        "psnr": metrics.psnr(pair.image, pair.other, 1.0),
        "ssim": metrics.ssim(pair.image, pair.other, 1.0),
        "mae_hu": metrics.mae(pair.image, pair.other) * pair.data_range if pair.unit == "HU" else math.nan,
    }


def codebook_use(counts: torch.Tensor) -> dict:
    """How the codebooks of counts (G, K) are used: shares of codes met at least once, and perplexities (1 to K)."""
    health = measure(counts, steps=1, dead_share=0)
    return {
        "usage_min": health.usage_min,
        "usage_mean": sum(health.usage) / len(health.usage),
        "perplexity_mean": sum(health.perplexity) / len(health.perplexity),
        "tokens": health.tokens,
        "codebooks": len(counts),
        "codes": health.codes,
        "usage": list(health.usage),
        "perplexity": list(health.perplexity),
    }


def good_rows(source: Source) -> Iterator[Row]:
    """Rows of a source whose files can be read whole, and one row with its error for each file that cannot."""
    failed: dict[str, Row] = {}
    if source.count() > 1:  # a file of several frames is judged before any of them is scored
        for row in source.rows():
            if row.error is not None:
                failed.setdefault(row.name.rpartition("#")[0], row)
    yield from failed.values()
    for row in source.rows():
        if row.name.rpartition("#")[0] not in failed:
            yield row
