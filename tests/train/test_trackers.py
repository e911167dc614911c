"""What a run tells others beside log.csv: event files that TensorBoard reads back."""

from __future__ import annotations

import csv
import struct
from pathlib import Path

import pytest

from meditok.errors import UsageError
from meditok.train import run
from meditok.train.trackers import trackers

from . import stages


def interrupted(data: str, out: Path, track: str) -> None:
    """Four steps, interrupted in the third and gone on with from the second."""
    config = stages.settings(
        data=data, perceptual=0.0, contrastive=0.0, adversarial=0.0, track=track, steps=4, sheet_every=2
    )

    def interrupt(row: dict) -> None:
        if row.get("step") == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.start(config, out, device="cpu", report=interrupt)
    run.start(config, out, device="cpu", report=lambda row: None)  # from step 2


def test_tensorboard_reads_every_row_and_sheet_once_also_of_a_run_that_was_interrupted(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "out"
    interrupted(str(stages.pictures(tmp_path / "pictures")), out, track="tensorboard")
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    with open(out / "log.csv") as file:
        rows = list(csv.DictReader(file))
    for name in ("loss_total", "l1", "usage", "grad_norm"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(int(row["step"]), pytest.approx(float(row[name]), rel=1e-4)) for row in rows]
    assert [event.step for event in events.Images("reconstructions")] == [2, 4]


def records(path) -> list:
    """Records of a W&B file shorter than a block of 32 KiB: seven bytes, then (checksum, length, type) before each."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, found = path.read_bytes(), 7, []
    while at + 7 <= len(content) < 2**15:
        (length,) = struct.unpack_from("<H", content, at + 4)
        found.append(Record.FromString(content[at + 7 : at + 7 + length]))
        at += 7 + length
    return found


def test_weights_and_biases_is_told_every_row_and_sheet_under_one_name_and_no_path(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "out"
    interrupted(str(stages.pictures(tmp_path / "patient-name")), out, track="wandb")
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    told = [record for path in files for record in records(path)]
    assert len({record.run.run_id for record in told if record.WhichOneof("record_type") == "run"}) == 1
    rows = {}
    for record in told:
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        rows.setdefault(int(items["_step"]), {}).update(items) if items else None
    with open(out / "log.csv") as file:
        for row in csv.DictReader(file):
            for name in ("loss_total", "l1", "usage", "grad_norm"):
                assert float(rows[int(row["step"])][name]) == pytest.approx(float(row[name]), rel=1e-4)
    assert [step for step, row in rows.items() if any("reconstructions" in name for name in row)] == [2, 4]
    assert not any(b"patient-name" in path.read_bytes() for path in out.glob("wandb/**/*") if path.is_file())


def test_an_unknown_tracker_is_one_line():
    with pytest.raises(UsageError, match="--track=paper: 'paper' is unknown; choose of tensorboard, wandb"):
        trackers(stages.settings(track="paper"))
