"""One real stage on a few pictures, as small as it gets."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import numpy as np
from PIL import Image

from meditok.train.config import TrainConfig
from meditok.train.run import start

MODEL = dict(
    ends="stages", stem_width=8, stage_widths=(8, 16), stage_depths=(1, 1), width=64, encoder_depth=1,
    expansion=2, decoder_depth=1, decoder_widths=(16, 8), decoder_depths=(1, 1), num_codebooks=2, codebook_size=32,
    embed_dim=16,
)  # fmt: skip

# Rates at which rounding stays rounding for a dozen steps: kinks of the networks' activations that it crosses, and
# codes that are nearly tied, move the next step's losses by what a gradient is wrong times the rate.
GENTLE = {"lr": 2e-5, "disc_lr": 2e-5}


def settings(**options) -> TrainConfig:
    values = dict(
        preset="tiny", model=MODEL, size=48, crop_scale=(0.9, 1.0), perceptual_net="stlpips-alexnet", teacher="offline",
        discriminator="efficientnet-lite0", adversarial_ramp=2, adversarial_fade=4, lr=1e-3, warmup=2, disc_lr=1e-3,
        disc_warmup=1, steps=4, batch=4, precision="fp32", save_every=2, log_every=1, sheet_every=100, workers=0,
        ema=0.9,
    )  # fmt: skip
    return TrainConfig(**values | options)


def pictures(folder: Path, count: int = 8) -> Path:
    """Photographs of noise with two captions, as a manifest."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["identifier", "caption", "modality"])
        for index in range(count):
            Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.png")
            writer.writerow([f"{index}.png", f"noise number {index // 2}", "us"])
    return folder / "pairs.csv"


def run(out: Path, **options) -> list[dict]:
    """Runs; returns the rows of the log as it was told them."""
    kill = options.pop("kill", -1)
    rows: list[dict] = []

    def report(row: dict) -> None:
        rows.append(row)
        if row.get("step") == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    start(settings(**options), out, device="cpu", report=report)
    return rows
