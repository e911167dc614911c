"""What a run tells others beside log.csv: event files that TensorBoard reads back."""

from __future__ import annotations

import csv

import pytest

from meditok.errors import UsageError
from meditok.train import run
from meditok.train.trackers import trackers

from . import stages


def test_tensorboard_reads_every_row_and_sheet_once_also_of_a_run_that_was_interrupted(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data, out = str(stages.pictures(tmp_path / "pictures")), tmp_path / "out"
    config = stages.settings(
        data=data, perceptual=0.0, contrastive=0.0, adversarial=0.0, track="tensorboard", steps=4, sheet_every=2
    )

    def interrupt(row: dict) -> None:
        if row.get("step") == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.start(config, out, device="cpu", report=interrupt)
    run.start(config, out, device="cpu", report=lambda row: None)  # from step 2
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    with open(out / "log.csv") as file:
        rows = list(csv.DictReader(file))
    for name in ("loss_total", "l1", "usage", "grad_norm"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(int(row["step"]), pytest.approx(float(row[name]), rel=1e-4)) for row in rows]
    assert [event.step for event in events.Images("reconstructions")] == [2, 4]


def test_an_unknown_tracker_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="--track=paper: 'paper' is unknown; choose of tensorboard, wandb"):
        trackers(tmp_path, stages.settings(track="paper"))
