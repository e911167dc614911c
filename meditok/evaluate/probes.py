"""What a linear and a nearest-neighbour classifier can read off the features of a model, against three baselines.

Pictures are divided into folds by group, classes as even as that allows: no group is in the training and in the test
part of one fold. Every picture is predicted once, by classifiers that saw no other picture of its group. Baselines: the
most frequent class; a PCA of the pixels of a 32 x 32 grey thumbnail; the same encoder with random weights.
Classes are counted and never named, since labels of a manifest may be private.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from .._lazy import require
from ..bulk.reading import PATCH
from ..data.fit import fit, unpadded_mask
from ..errors import UsageError
from .held_out import group_of
from .summary import Bootstrap, mean_interval

if TYPE_CHECKING:
    from ..data import MedicalImage, Row
    from ..models.tokenizer import Tokenizer
    from .codecs import TokenizerCodec

FOLDS, NEIGHBOURS, COMPONENTS, THUMBNAIL = 5, 5, 50, 32
MIN_IMAGES, MIN_GROUPS = 5, 2  # of a class
SEED = 0
OF_IMAGE = ("modality", "body_part")  # labels that readers know themselves


@dataclass
class Collector:
    """Watches an evaluation and keeps, of every picture, labels, group, thumbnail and the features of each model."""

    codecs: Sequence[TokenizerCodec]
    columns: Sequence[str]
    mode: str = "pad"
    group: str = "group"
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)  # model -> (width,) each
    random: dict[str, list[np.ndarray]] = field(default_factory=dict)  # of the same encoders with random weights
    thumbnails: list[np.ndarray] = field(default_factory=list)
    labels: dict[str, list[str | None]] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=lambda: set(OF_IMAGE))  # columns that were met

    def __post_init__(self):
        require("sklearn", "probes")  # before any picture is read
        self._untrained = {codec.name: untrained(codec.model) for codec in self.codecs}

    def __call__(self, row: Row, pairs) -> None:
        for codec in self.codecs:
            fitted = fit(row.image, codec.side, self.mode)[0]
            for models, store in ((codec.model, self.features), (self._untrained[codec.name], self.random)):
                store.setdefault(codec.name, []).append(pooled(models, fitted))
        self.thumbnails.append(thumbnail(row.image))
        self.groups.append(group_of(row, self.group))
        self.known.update(row.columns)
        for column in self.columns:
            self.labels.setdefault(column, []).append(label_of(row, column))

    def results(self, how: Bootstrap) -> dict[str, dict]:
        """{column: {"classes", "images", "groups", "left_out", "folds", "majority", "pca", "models": {name: ...}}}.

        {column: {"withheld": reason}} where too few classes are left. UsageError: no picture has a label in a column.
        """
        return {column: self._result(column, how) for column in self.columns}

    def _result(self, column: str, how: Bootstrap) -> dict:
        labels = self.labels.get(column, [])
        if not any(label is not None for label in labels):
            raise UsageError(f"--probe {column}: no picture has it; there are: {', '.join(sorted(self.known))}")
        kept = usable(labels, self.groups)
        if len({labels[i] for i in kept}) < 2:
            return {"withheld": f"fewer than two classes of {MIN_IMAGES} images and {MIN_GROUPS} groups"}
        y = np.unique([labels[i] for i in kept], return_inverse=True)[1]
        groups = [self.groups[i] for i in kept]
        folds = divide(y, groups)
        score = Scorer(y, groups, folds, how)
        pixels = np.stack([self.thumbnails[i] for i in kept])
        record = {
            "classes": int(y.max()) + 1,
            "images": len(kept),
            "groups": len(set(groups)),
            "left_out": len(labels) - len(kept),
            "folds": len(folds),
            "majority": score.majority(),
            "pca": score(pixels, components=COMPONENTS),
            "models": {},
        }
        for name in self.features:
            record["models"][name] = score(np.stack([self.features[name][i] for i in kept])) | {
                "random_encoder": score(np.stack([self.random[name][i] for i in kept]))
            }
        return record


def label_of(row: Row, column: str) -> str | None:
    value = row.columns.get(column)
    if column in OF_IMAGE and (column == "modality" or value is None):
        value = getattr(row.image, column) or None
    return None if value is None else str(value)


def usable(labels: Sequence[str | None], groups: Sequence[str]) -> list[int]:
    """Indices of pictures whose class has MIN_IMAGES pictures and MIN_GROUPS groups at least."""
    images = Counter(label for label in labels if label is not None)
    spread: dict[str | None, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        spread.setdefault(label, set()).add(group)
    good = {label for label in images if images[label] >= MIN_IMAGES and len(spread[label]) >= MIN_GROUPS}
    return [i for i, label in enumerate(labels) if label in good]


def divide(y: np.ndarray, groups: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training, test) indices of each fold; no group is in both."""
    selection = require("sklearn.model_selection", "probes")
    folds = min(FOLDS, len(set(groups)), int(np.bincount(y).max()))
    splitter = selection.StratifiedGroupKFold(folds, shuffle=True, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes of fewer images than folds are allowed here
        divided = list(splitter.split(np.zeros(len(y)), y, groups))
    return [(train, test) for train, test in divided if len(test) and len(set(y[train])) > 1]


@dataclass
class Scorer:
    """Accuracies of classifiers over fixed folds."""

    y: np.ndarray  # (n,) classes
    groups: Sequence[str]
    folds: list[tuple[np.ndarray, np.ndarray]]
    how: Bootstrap

    def majority(self) -> dict:
        """Predicting the most frequent class of the training part."""
        return self._scores([np.bincount(self.y[train]).argmax().repeat(len(test)) for train, test in self.folds])

    def __call__(self, x: np.ndarray, components: int = 0) -> dict:
        """{"linear", "knn"} of features x (n, d), reduced to `components` by a PCA of the training part."""
        return {"linear": self._fit(x, _linear, components), "knn": self._fit(x, _neighbours, components)}

    def _fit(self, x: np.ndarray, make, components: int) -> dict:
        found = []
        for train, test in self.folds:
            parts = min(components, len(train), x.shape[1])
            model = _after_pca(make(len(train)), parts) if parts else _scaled(make(len(train)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a solver that stops at its limit is still a classifier
                found.append(model.fit(x[train], self.y[train]).predict(x[test]))
        return self._scores(found)

    def _scores(self, predictions: list[np.ndarray]) -> dict:
        tested = np.concatenate([test for _, test in self.folds])
        y, right = self.y[tested], np.concatenate(predictions) == self.y[tested]
        groups = [self.groups[i] for i in tested]
        recalls = [right[y == each].mean() for each in np.unique(y)]
        return {
            "accuracy": float(right.mean()),
            "balanced_accuracy": float(np.mean(recalls)),
            "interval": mean_interval(groups, right.astype(np.float64), self.how),
        }


def _linear(_: int):
    return require("sklearn.linear_model", "probes").LogisticRegression(max_iter=1000)


def _neighbours(samples: int):
    near = require("sklearn.neighbors", "probes")
    return near.KNeighborsClassifier(min(NEIGHBOURS, samples), metric="cosine")


def _scaled(classifier):
    pipeline, scale = require("sklearn.pipeline", "probes"), require("sklearn.preprocessing", "probes")
    return pipeline.make_pipeline(scale.StandardScaler(), classifier)


def _after_pca(classifier, components: int):
    """The components keep their sizes: scaled alike, the last of them would drown the first in noise."""
    pipeline, reduce = require("sklearn.pipeline", "probes"), require("sklearn.decomposition", "probes")
    return pipeline.make_pipeline(reduce.PCA(components, random_state=SEED), classifier)


# ---- features ----------------------------------------------------------------------------------------------


def untrained(model: Tokenizer) -> Tokenizer:
    """The same architecture with random weights of a fixed seed, on the model's device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        random = type(model)(copy.copy(model.config))
    random.precision = model.precision
    return random.to(model.device).eval()


@torch.no_grad()
def pooled(model: Tokenizer, fitted: MedicalImage) -> np.ndarray:
    """(width,): mean of the encoder's tokens at positions that hold a pixel of the picture."""
    hidden = model.latents(fitted.pixels[None], "encoder")[0].cpu()  # (N, width)
    inside = unpadded_mask(fitted.geometry, *fitted.pixels.shape[1:], PATCH).flatten()
    return hidden[inside].mean(0).double().numpy()


def thumbnail(image: MedicalImage, side: int = THUMBNAIL) -> np.ndarray:
    """(side * side,) in [-1, 1]: the whole picture, grey, both sides resized."""
    grey = image.pixels.mean(0)[None, None]
    small = F.interpolate(grey, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return small.flatten().double().numpy()
