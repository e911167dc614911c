"""Both stages on real pictures, small enough for a test: the decoder learns, and the alignment means something.

The margins were set before the test. By hand, seeds 0 and 1 (60 and 100 steps of stage 1) found the captions of 0.49
and 0.53 of the held-out pictures within their modality, the probe those of 0.43 and 0.47, chance 0.19; reconstructions
gained 0.08 and 0.18 dB.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import meditok
from meditok.data.augment import resize
from meditok.evaluate.metrics import psnr
from meditok.evaluate.probes import thumbnail
from meditok.evaluate.summary import Bootstrap
from meditok.evaluate.text import fitted_ridge, histogram, within
from meditok.models.files import write_model
from meditok.train import run
from meditok.train.config import load_config
from meditok.train.distributed import World
from meditok.train.items import find_items, read
from meditok.train.tasks.alignment import Alignment

DATA = Path(os.environ.get("MEDITOK_SHARED", Path(__file__).parents[3] / "shared")) / "data"
OVER_CHANCE, OVER_HISTOGRAM, DB_OVER_START = 0.2, 0.03, 0.05
COMMON = [f"data={DATA}", "include=train/*", "check=open"]


class Found(NamedTuple):
    start_db: float  # PSNR of the held-out pictures, mean
    trained_db: float
    r1: float  # within modalities, pictures to captions
    chance: float
    histogram: float


def both_stages(folder: Path, seed: int, steps: int = 80) -> Found:
    """Stage 1 from its fitted start, stage 2 from that, both on the training split; scored on the other."""
    first = load_config("tiny-stage1", [*COMMON, f"seed={seed}", f"steps={steps}", "start_patches=32768", "warmup=10"])
    items = find_items(first)
    task = Alignment(first, World(0, 1, torch.device("cpu")))
    run.fit_start(task, items, first)
    start = meditok.load(write_model(task.modules["generator"].core, folder / "start.safetensors"), device="cpu")
    run.start(first, folder / "one", device="cpu", report=lambda row: None)
    second = load_config("tiny-stage2", [*COMMON, f"seed={seed}", f"init={folder / 'one' / 'model.safetensors'}"])
    run.start(second, folder / "two", device="cpu", report=lambda row: None)
    model = meditok.load(folder / "two" / "model.safetensors", device="cpu")

    held = find_items(load_config("tiny-stage2", [*COMMON, "split=val"]))
    groups = [[item.source.columns["group"] for item in part] for part in (items, held)]
    assert not set(groups[0]) & set(groups[1])
    seen, unseen = ([read(item, None) for item in part] for part in (items, held))
    shown = torch.stack([resize(x, 256) for x in unseen])
    captions, truth = np.unique([item.caption for item in held], return_inverse=True)
    texts = model.embed_text(list(captions)).double().numpy()

    def scored(vectors: np.ndarray) -> dict:
        modality = np.array([item.modality for item in held])
        return within(vectors @ texts.T, truth, modality, groups[1], Bootstrap(100))

    known, places = np.unique([item.caption for item in items], return_inverse=True)
    wanted = model.embed_text(list(known)).double().numpy()[places]
    probe = fitted_ridge(np.stack([plain(x) for x in seen]), wanted)
    ours = scored(torch.cat([model.embed(part) for part in shown.split(16)]).double().numpy())
    theirs = scored(probe(np.stack([plain(x) for x in unseen])))
    before, after = (mean_psnr(each, shown) for each in (start, model))
    return Found(before, after, ours["r1"], ours["chance"], theirs["r1"])


def plain(pixels: torch.Tensor) -> np.ndarray:
    """What the probe sees: a histogram and a thumbnail."""
    return np.concatenate([histogram(pixels), thumbnail(SimpleNamespace(pixels=pixels))])


def mean_psnr(model, images: torch.Tensor) -> float:
    return float(
        np.mean(
            [psnr(x, y, 2.0) for part in images.split(16) for x, y in zip(part, model.reconstruct(part), strict=True)]
        )
    )


@pytest.mark.skipif(not DATA.is_dir(), reason="the training images are not here; set MEDITOK_SHARED")
def test_captions_of_held_out_pictures_are_found_above_chance_and_a_histogram(tmp_path):
    found = both_stages(tmp_path, seed=0)
    assert found.trained_db > found.start_db + DB_OVER_START, found
    assert found.r1 > found.chance + OVER_CHANCE, found
    assert found.r1 > found.histogram + OVER_HISTOGRAM, found
