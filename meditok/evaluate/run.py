"""One evaluation: which pictures, through which codecs, by which protocol, and the record of all of it."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import MeditokError, UsageError
from . import metrics, summary
from .codecs import Codec
from .extractors import Extractor, Perceptual
from .held_out import HeldOut, digest_of, files, fingerprints, refuse_seen, shared_groups
from .reconstruction import Reconstruction, good_rows
from .summary import Bootstrap

if TYPE_CHECKING:
    from ..data import Row, Source
    from ..data.options import ReadOptions
    from ..pipeline import Settings

VERSIONS = ("torch", "numpy", "scikit-image", "torchmetrics", "scikit-learn", "pillow")
FITS = ("pad", "stretch", "crop")


@dataclass(frozen=True)
class Plan:
    """What is asked of an evaluation, beyond the pictures and the codecs."""

    reading: ReadOptions
    settings: Settings
    bootstrap: Bootstrap = Bootstrap()
    group: str = "group"  # manifest column of what belongs together
    ms_ssim: bool = False
    perceptual: Perceptual | None = None
    extractor: Extractor | None = None  # of FID
    withheld: dict[str, str] = field(default_factory=dict)  # metric -> why it is not there

    def __post_init__(self):
        if self.settings.fit not in FITS:
            raise UsageError(
                f"fit {self.settings.fit!r}: a tile is not a picture to be judged; choose one of {', '.join(FITS)}"
            )


@dataclass
class Outcome:
    """What became of the files, for whoever counts them."""

    name: str  # of the file
    rows: int = 0
    error: MeditokError | None = None


@dataclass
class Evaluation:
    """Walks the held-out pictures once. Iterate over it for the Outcome of every file, then ask for `record()`."""

    held: HeldOut
    codecs: Sequence[Codec]
    plan: Plan
    seen: dict[str, frozenset[str]] = field(default_factory=dict)  # model -> fingerprints it was trained on
    watchers: list = field(default_factory=list)  # called with (row, [(pair, values)] of the codecs)

    def __post_init__(self):
        plan = self.plan
        self.scores = Reconstruction(
            self.codecs,
            plan.settings.fit,
            group=plan.group,
            ms_ssim=plan.ms_ssim,
            distances={plan.perceptual.metric: plan.perceptual} if plan.perceptual else None,
            extractor=plan.extractor,
        )
        self._prints: list[str] = []
        self._stated: Counter = Counter()

    def __iter__(self) -> Iterator[Outcome]:
        refused = dict((id(source), error) for source, error in refuse_seen(self.held.sources, self.seen))
        for source in self.held.sources:
            if id(source) in refused:
                yield from (Outcome(name, error=refused[id(source)]) for name in files(source))
                continue
            yield from self._source(source)

    def _source(self, source: Source) -> Iterator[Outcome]:
        good: Counter = Counter()
        for row in good_rows(source):
            name = row.name.rpartition("#")[0]
            if row.error is not None:
                yield Outcome(name, error=row.error)
                continue
            self._score(row)
            good[name] += 1
        if good:
            self._prints += fingerprints(source)
        yield from (Outcome(name, rows) for name, rows in good.items())

    def _score(self, row: Row) -> None:
        pairs = self.scores.add(row)
        self._stated[row.columns.get(self.plan.group) is not None] += 1
        for watcher in self.watchers:
            watcher(row, pairs)

    def record(self) -> dict:
        """{"protocol", "models"}: everything that a reader needs to judge, or repeat, the numbers."""
        protocol = self.protocol()
        models = [model | {"protocol": protocol} for model in self.scores.result(self.plan.bootstrap)]  # each is whole
        return {"protocol": protocol, "models": models}

    def protocol(self) -> dict:
        plan = self.plan
        reading = {k: v for k, v in asdict(plan.reading).items() if k not in ("limits", "series")}
        return {
            "splits": list(self.held.splits) or None,
            "images": len(self.scores.modalities),
            "groups": len(set(self.scores.groups)),
            "groups_from": {"column " + plan.group: self._stated[True], "volume or file": self._stated[False]},
            "groups_also_in_training": shared_groups(self.held, plan.group)[1],
            "images_sha256": digest_of(self._prints),
            "reading": reading,
            "fit": plan.settings.fit,
            "resize": "antialiased bilinear in float32, after windowing, to each model's image_size",
            "region": "the part that is no padding; of a crop, what was kept; the same for both sides",
            "values": "float, clamped to the window, never rounded to 8 bits; grey pictures as one channel, the mean "
            "of the decoded three",
            "data_range": "high - low of each picture's window; SSIM sees values from 0 to it",
            "psnr": f"dB, mean of each picture's; over {summary.PSNR_CAP:g} counts as {summary.PSNR_CAP:g}",
            "ssim": f"Gaussian window of {metrics.WINDOW} taps, sigma {metrics.SIGMA}, K 0.01 and 0.03 (scikit-image)",
            "ms_ssim": f"5 scales (torchmetrics), of pictures of {metrics.MS_SSIM_SIDE} pixels or more a side"
            if plan.ms_ssim
            else None,
            **({plan.perceptual.metric: plan.perceptual.describe()} if plan.perceptual else {}),
            "fid": plan.extractor.describe() if plan.extractor else None,
            "withheld": plan.withheld or None,
            "mae_hu": "mean absolute error of pictures in Hounsfield units",
            "native": "the same at the size of the source, the fitting undone",
            "overall": f"mean over modalities with {summary.MIN_IMAGES} images and {summary.MIN_GROUPS} groups or more",
            "overall_micro": "mean over all images",
            "codebook": "ids of positions that hold a pixel of the picture",
            "batch": "one picture at a time",
            "bootstrap": plan.bootstrap.to_dict(),
            "versions": {"meditok": __version__} | dict(versions()),
        }


def versions() -> Iterator[tuple[str, str]]:
    for name in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)
