"""Rows of the log and sheets, told to TensorBoard or Weights & Biases as they come, beside `log.csv`."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from .._lazy import require
from ..atomic import write_text
from ..errors import UsageError
from .config import TrainConfig


class Tracker(Protocol):
    def row(self, row: dict[str, float]) -> None:
        """A row of the log, with its `step`; or {"resumed": step}."""

    def sheet(self, path: Path, step: int) -> None:
        """A PNG of reconstructions."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in DIR/tensorboard; what an interrupted run told after the step it goes on from is purged."""

    package = "torch.utils.tensorboard"

    def __init__(self, out: Path, config: TrainConfig):
        self.module, self.folder = require(self.package, "--track=tensorboard"), out / "tensorboard"
        self.writer = self.module.SummaryWriter(str(self.folder))

    def row(self, row: dict[str, float]) -> None:
        if "resumed" in row:
            self.writer.close()
            self.writer = self.module.SummaryWriter(str(self.folder), purge_step=row["resumed"] + 1)
            return
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, row["step"])

    def sheet(self, path: Path, step: int) -> None:
        self.writer.add_image("reconstructions", _pixels(path), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of project "meditok" that goes on where DIR's did; WANDB_MODE and the like are the user's to set.

    It is told losses, sheets and settings, but no path, command line, source, package list or name of this machine.
    """

    package = "wandb"

    def __init__(self, out: Path, config: TrainConfig):
        self.wandb = require(self.package, "--track=wandb")
        name = out / "wandb" / "meditok-run-id"
        if not name.exists():
            name.parent.mkdir(parents=True, exist_ok=True)
            write_text(name, secrets.token_hex(8))
        quiet = self.wandb.Settings(
            console="off", save_code=False, disable_git=True, host="", x_disable_meta=True,
            x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        self.run = self.wandb.init(
            project="meditok", dir=str(out), id=name.read_text(encoding="utf-8"), resume="allow", settings=quiet,
            config=config.record(),
            name=f"{config.preset} aligned with {config.target}",
        )  # fmt: skip

    def row(self, row: dict[str, float]) -> None:
        if "resumed" not in row:
            self.run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def sheet(self, path: Path, step: int) -> None:
        self.run.log({"reconstructions": self.wandb.Image(_pixels(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


KINDS: dict[str, type[TensorBoard | WeightsAndBiases]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def trackers(config: TrainConfig) -> list[Callable[[Path, TrainConfig], Tracker]]:
    """Those that `config.track` names, to be made. UsageError: unknown; MissingPartError: a package is not here."""
    names = [name.strip() for name in config.track.split(",") if name.strip()]
    if unknown := [name for name in names if name not in KINDS]:
        raise UsageError(f"--track={config.track}: {unknown[0]!r} is unknown; choose of {', '.join(KINDS)}")
    for name in names:
        require(KINDS[name].package, f"--track={name}")
    return [KINDS[name] for name in names]


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
