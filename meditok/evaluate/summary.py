"""Scores of many pictures in a few numbers: per modality, their mean (macro), all pictures alike (micro), intervals.

The macro mean counts modalities of at least MIN_IMAGES pictures and MIN_GROUPS groups; others are shown, marked, and
left out. Intervals are percentiles of a bootstrap that draws whole groups with replacement within each modality, since
pictures of one patient or volume tell little more than one of them does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_IMAGES, MIN_GROUPS = 10, 5
ALWAYS = ("psnr", "ssim")  # told even where no picture has a value; other metrics are left out there
PSNR_CAP = 100.0  # dB: an error under 1e-5 of the range counts as that, so that a perfect picture has a mean


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn."""

    draws: int = 1000
    level: float = 0.95
    seed: int = 0

    def to_dict(self) -> dict:
        return {"draws": self.draws, "level": self.level, "seed": self.seed, "unit": "group, within each modality"}


def summarise(
    modalities: Sequence[str], groups: Sequence[str], scores: dict[str, Sequence[float]], how: Bootstrap
) -> dict:
    """{"overall", "overall_micro", "modalities"} of scores, each a value a picture (nan where it is undefined).

    Each entry holds {metric: mean} and "interval": {metric: [low, high]}, which is None with fewer than two groups; an
    entry of a modality also `n`, `groups`, `counted` (in the macro mean), and `undefined` where a metric has fewer
    values than n. None stands for a mean of nothing.
    """
    modality, group = np.asarray(modalities, dtype=object), np.asarray(groups, dtype=object)
    values = {name: _finite(name, np.asarray(each, dtype=np.float64)) for name, each in scores.items()}
    entries, drawn, counted = {}, {}, []
    for name in sorted(set(modalities)):
        chosen = modality == name
        mine = {metric: each[chosen] for metric, each in values.items()}
        members, index = np.unique(group[chosen].astype(str), return_inverse=True)
        drawn[name] = _draws(index, len(members), mine, how)
        entry = {"n": int(chosen.sum()), "groups": len(members)}
        entry["counted"] = entry["n"] >= MIN_IMAGES and entry["groups"] >= MIN_GROUPS
        if entry["counted"]:
            counted.append(name)
        mine = {metric: each for metric, each in mine.items() if metric in ALWAYS or not np.isnan(each).all()}
        entry |= {metric: _mean(each) for metric, each in mine.items()}
        undefined = {metric: int(np.isnan(each).sum()) for metric, each in mine.items() if np.isnan(each).any()}
        if undefined:
            entry["undefined"] = undefined
        entry["interval"] = {m: _interval(*drawn[name][m], how) if _several(index, mine[m]) else None for m in mine}
        entries[name] = entry
    overall: dict = {"modalities": counted, "n": sum(entries[name]["n"] for name in counted)}
    micro: dict = {"n": len(modality)}
    macro_intervals, micro_intervals = {}, {}
    for metric, each in values.items():
        if metric not in ALWAYS and np.isnan(each).all():
            continue
        names = [name for name in counted if entries[name].get(metric) is not None]
        overall[metric] = math.fsum(entries[name][metric] for name in names) / len(names) if names else None
        micro[metric] = _mean(each)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = sum(drawn[name][metric][0] / drawn[name][metric][1] for name in names)
        spread = names and all(entries[name]["interval"][metric] for name in names)
        macro_intervals[metric] = _interval(means, np.full(how.draws, len(names)), how) if spread else None
        sums, counts = (sum(drawn[name][metric][part] for name in entries) for part in (0, 1))
        several = any(entry["interval"].get(metric) for entry in entries.values())
        micro_intervals[metric] = _interval(sums, counts, how) if several else None
        counts_missing = (
            (overall, sum(entries[name]["n"] - _defined(entries[name], metric) for name in counted)),
            (micro, int(np.isnan(each).sum())),
        )
        for entry, missing in counts_missing:
            if missing:
                entry.setdefault("undefined", {})[metric] = missing
    overall["interval"], micro["interval"] = macro_intervals, micro_intervals
    return {"overall": overall, "overall_micro": micro, "modalities": entries}


def _several(index: np.ndarray, values: np.ndarray) -> bool:
    """Whether at least two groups have a value."""
    return len(np.unique(index[~np.isnan(values)])) > 1


def mean_interval(groups: Sequence[str], values: np.ndarray, how: Bootstrap) -> list[float] | None:
    """Interval of the mean of values (n,) whose groups are drawn with replacement; None with fewer than two groups."""
    members, index = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    if len(members) < 2:
        return None
    return _interval(*_draws(index, len(members), {"": values}, how)[""], how)


def _defined(entry: dict, metric: str) -> int:
    """How many pictures of a modality have a value."""
    return entry["n"] - entry.get("undefined", {}).get(metric, 0) if metric in entry else 0


def _finite(metric: str, values: np.ndarray) -> np.ndarray:
    return np.minimum(values, PSNR_CAP) if metric == "psnr" else values


def _mean(values: np.ndarray) -> float | None:
    """Of the values that are defined."""
    kept = values[~np.isnan(values)]
    return math.fsum(kept) / len(kept) if len(kept) else None


def _draws(index: np.ndarray, groups: int, values: dict[str, np.ndarray], how: Bootstrap) -> dict:
    """Per metric (sums, counts) of `draws` resamples of the groups; `index` is each picture's group."""
    random = np.random.default_rng(how.seed)
    times = random.multinomial(groups, np.full(groups, 1 / groups), size=how.draws).astype(np.float64)
    found = {}
    for metric, each in values.items():
        defined = ~np.isnan(each)
        sums = np.bincount(index[defined], weights=each[defined], minlength=groups)
        counts = np.bincount(index[defined], minlength=groups).astype(np.float64)
        found[metric] = times @ sums, times @ counts
    return found


def _interval(sums: np.ndarray, counts: np.ndarray, how: Bootstrap) -> list[float] | None:
    """Percentiles of the resampled means; a resample without a defined value counts for nothing."""
    means = sums[counts > 0] / counts[counts > 0]
    means = means[np.isfinite(means)]
    if not len(means):
        return None
    edge = (1 - how.level) / 2 * 100
    return [float(each) for each in np.percentile(means, [edge, 100 - edge])]
