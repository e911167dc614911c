"""Zero-shot classification and image-text retrieval in a model's text-aligned space.

Retrieval ranks unique captions, every picture of a caption being right for it; a tie counts against the model. What a
caption's modality alone gives away is taken out by ranking within modalities, against chance and against a probe that
sees nothing but an intensity histogram and a PCA of a thumbnail, mapped onto the texts by ridge regression and always
applied to groups it was not fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from .._lazy import require
from ..data.fit import fit
from ..errors import BadInputError, UsageError
from .held_out import group_of
from .probes import SEED, label_of, thumbnail, usable
from .summary import Bootstrap, mean_interval

if TYPE_CHECKING:
    from ..data import Row
    from .codecs import TokenizerCodec

RANKS = (1, 5, 10)
BINS, COMPONENTS, FOLDS = 32, 32, 5
TEMPLATE = "A {} image"
Embed = Callable[[list[str]], torch.Tensor]  # B texts -> (B, E) unit vectors


@dataclass
class TextCollector:
    """Watches an evaluation and keeps embeddings, captions, labels and what the histogram probe sees.

    MissingPartError: a model was not aligned with texts, or its text tower is not here.
    """

    codecs: Sequence[TokenizerCodec]
    zero_shot: Sequence[str] = ()  # columns whose values are the classes
    caption: str | None = None  # column of the captions
    template: str = TEMPLATE
    mode: str = "pad"
    group: str = "group"
    embeddings: dict[str, list[np.ndarray]] = field(default_factory=dict)
    plain: list[np.ndarray] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    labels: dict[str, list[str | None]] = field(default_factory=dict)
    modalities: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def __post_init__(self):
        if "{}" not in self.template:
            raise UsageError(f"--template {self.template!r}: has no {{}} for the class; write one")
        if self.caption:
            require("sklearn", "retrieval")
        for codec in self.codecs:  # before any picture is read
            codec.model.embed_text([self.template])

    def __call__(self, row: Row, pairs) -> None:
        for codec in self.codecs:
            fitted = fit(row.image, codec.side, self.mode)[0]
            vector = codec.model.embed(fitted.pixels[None])[0].double().cpu().numpy()
            self.embeddings.setdefault(codec.name, []).append(vector)
        self.plain.append(np.concatenate([histogram(row.image.pixels), thumbnail(row.image)]))
        self.modalities.append(row.image.modality)
        self.groups.append(group_of(row, self.group))
        for column in self.zero_shot:
            self.labels.setdefault(column, []).append(label_of(row, column))
        if self.caption:
            value = row.columns.get(self.caption)
            self.captions.append(str(value) if value else None)

    def results(self, how: Bootstrap) -> dict[str, dict]:
        """{model: {"zero_shot": {column: ...}, "retrieval": ...}}, each part where it was asked for."""
        found: dict[str, dict] = {}
        for codec in self.codecs:
            x, embed, record = np.stack(self.embeddings[codec.name]), codec.model.embed_text, {}
            if self.zero_shot:
                record["zero_shot"] = {column: self._zero_shot(column, x, embed, how) for column in self.zero_shot}
            if self.caption:
                record["retrieval"] = self._retrieval(x, embed, how)
            found[codec.name] = record
        return found

    def _zero_shot(self, column: str, x: np.ndarray, embed: Embed, how: Bootstrap) -> dict:
        labels = self.labels[column]
        kept = usable(labels, self.groups)
        names, y = np.unique([labels[i] for i in kept], return_inverse=True)
        if len(names) < 2:
            raise BadInputError(f"--zero-shot {column}: fewer than two classes of enough images; take another column")
        prompts = embed([self.template.replace("{}", name) for name in names]).double().cpu().numpy()
        right = ((x[kept] @ prompts.T).argmax(1) == y).astype(np.float64)
        return {
            "classes": len(names),
            "images": len(kept),
            "left_out": len(labels) - len(kept),
            "accuracy": float(right.mean()),
            "balanced_accuracy": float(np.mean([right[y == each].mean() for each in range(len(names))])),
            "chance": 1 / len(names),
            "interval": mean_interval([self.groups[i] for i in kept], right, how),
        }

    def _retrieval(self, x: np.ndarray, embed: Embed, how: Bootstrap) -> dict:
        kept = [i for i, caption in enumerate(self.captions) if caption]
        if not kept:
            raise UsageError(f"--retrieval: no picture has a {self.caption}; name the column with --caption")
        unique, truth = np.unique([self.captions[i] for i in kept], return_inverse=True)
        if len(unique) < 2:
            raise BadInputError("--retrieval: all pictures have the same caption; give captions that differ")
        texts = embed(list(unique)).double().cpu().numpy()
        groups, modality = [self.groups[i] for i in kept], np.array([self.modalities[i] for i in kept])
        similarity = x[kept] @ texts.T
        mapped = ridge(np.stack([self.plain[i] for i in kept]), texts[truth], groups)
        record = {"images": len(kept), "captions": len(unique), "left_out": len(self.captions) - len(kept)}
        record |= both_ways(similarity, truth, groups, how)
        record["within_modality"] = within(similarity, truth, modality, groups, how)
        if mapped is not None:
            record["within_modality"]["histogram_pca"] = within(mapped @ texts.T, truth, modality, groups, how)["r1"]
        return record


def histogram(pixels: torch.Tensor) -> np.ndarray:
    """(BINS,): shares of the grey values of pixels (3, H, W) in [-1, 1]."""
    counts = torch.histc(pixels.mean(0).float(), BINS, -1, 1)
    return (counts / counts.sum().clamp_min(1)).double().numpy()


def ridge(plain: np.ndarray, texts: np.ndarray, groups: Sequence[str]) -> np.ndarray | None:
    """Texts (n, E) predicted from plain (n, BINS + thumbnail) by folds of groups; None with fewer than two groups."""
    folds = min(FOLDS, len(set(groups)))
    if folds < 2:
        return None
    selection = require("sklearn.model_selection", "retrieval")
    found = np.zeros_like(texts)
    for train, test in selection.GroupKFold(folds).split(plain, groups=groups):
        found[test] = fitted_ridge(plain[train], texts[train])(plain[test])
    return found


def fitted_ridge(plain: np.ndarray, texts: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The map from plain (n, BINS + thumbnail), its thumbnails reduced by a PCA, to texts (n, E)."""
    linear, reduce, scale = (
        require(f"sklearn.{name}", "retrieval") for name in ("linear_model", "decomposition", "preprocessing")
    )
    pca = reduce.PCA(min(COMPONENTS, len(plain)), random_state=SEED).fit(plain[:, BINS:])

    def seen(rows: np.ndarray) -> np.ndarray:
        return np.hstack([rows[:, :BINS], pca.transform(rows[:, BINS:])])

    scaler = scale.StandardScaler().fit(seen(plain))
    model = linear.Ridge(1.0).fit(scaler.transform(seen(plain)), texts)
    return lambda rows: model.predict(scaler.transform(seen(rows)))


def ranks_of_captions(similarity: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(n,): place of each picture's caption among all, 1 the best; similarity (n, captions), truth (n,) indices."""
    own = similarity[np.arange(len(truth)), truth]
    return (similarity >= own[:, None]).sum(1)


def ranks_of_pictures(similarity: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(captions,): place of the best of each caption's pictures among those that are not its own, 1 the best."""
    own = truth[:, None] == np.arange(similarity.shape[1])
    best = np.where(own, similarity, -np.inf).max(0)
    return 1 + ((similarity >= best) & ~own).sum(0)


def both_ways(similarity: np.ndarray, truth: np.ndarray, groups: Sequence[str], how: Bootstrap) -> dict:
    """R@k from pictures to captions and back, with what chance gives; intervals of the first by groups."""
    n, captions = similarity.shape
    there, back = ranks_of_captions(similarity, truth), ranks_of_pictures(similarity, truth)
    positives = np.bincount(truth, minlength=captions)
    image_to_text: dict = {f"r{k}": float((there <= k).mean()) for k in RANKS}
    image_to_text["interval"] = {f"r{k}": mean_interval(groups, (there <= k) * 1.0, how) for k in RANKS}
    image_to_text["chance"] = {f"r{k}": min(1.0, k / captions) for k in RANKS}
    text_to_image: dict = {f"r{k}": float((back <= k).mean()) for k in RANKS}
    text_to_image["chance"] = {f"r{k}": float(np.mean([_hit(n, p, k) for p in positives])) for k in RANKS}
    return {"image_to_text": image_to_text, "text_to_image": text_to_image}


def _hit(n: int, positives: int, k: int) -> float:
    """Probability that k of n drawn at random hold one of the positives."""
    return 1 - math.comb(n - positives, k) / math.comb(n, k) if k < n else 1.0


def within(
    similarity: np.ndarray, truth: np.ndarray, modality: np.ndarray, groups: Sequence[str], how: Bootstrap
) -> dict:
    """R@1 from pictures to the captions of their own modality; modalities of a single caption are left out."""
    right, chance, kept = [], [], []
    for name in np.unique(modality):
        mine = np.flatnonzero(modality == name)
        captions, own = np.unique(truth[mine], return_inverse=True)
        if len(captions) < 2:
            continue
        right += list(ranks_of_captions(similarity[np.ix_(mine, captions)], own) == 1)
        chance += [1 / len(captions)] * len(mine)
        kept += [groups[i] for i in mine]
    if not right:
        return {"images": 0, "r1": None, "chance": None, "interval": None}
    hits = np.array(right, dtype=np.float64)
    return {
        "images": len(hits),
        "r1": float(hits.mean()),
        "chance": float(np.mean(chance)),
        "interval": mean_interval(kept, hits, how),
    }
