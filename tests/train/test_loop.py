"""The loop, with a task small enough to be checked by hand and real processes."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meditok.errors import BadInputError, UsageError
from meditok.train import checkpoint, loop
from meditok.train.config import TrainConfig

from . import launch, toy

TWO = {"steps": 6, "accumulate": 2, "clip": 0.5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of runs in processes of their own, by name; exit statuses by name; what they wrote to stderr)"""
    folder = tmp_path_factory.mktemp("runs")
    sigterm = {"signal": int(signal.SIGTERM), "signal_at": 3}
    jobs = {
        "two": ("two", {"steps": 6}, 2),
        "four": ("four", {"steps": 6}, 4),
        "killed": ("killed", {"steps": 10, "noise": 0.5, "kill": 7}, 1),
        "sharded": ("sharded", TWO | sigterm | {"sharded": True}, 2),
        "sharded again": ("sharded", TWO | {"sharded": True}, 2),
        "interrupted": ("interrupted", {"steps": 10, "signal": int(signal.SIGINT), "signal_at": 4}, 1),
        "terminated": ("terminated", {"steps": 10} | sigterm, 2),
    }
    started = [launch.Job(folder / name, options, processes) for name, options, processes in jobs.values()]
    statuses, said = launch.start("toy", started)
    assert "Warning" not in said
    return folder, dict(zip(jobs, statuses, strict=True)), said


def log_of(out: Path) -> list[dict]:
    with open(out / "log.csv") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "share_of_peak")} for row in rows]


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_killed_between_checkpoints_ends_as_one_that_was_not(runs, tmp_path):
    folder, statuses, _ = runs
    assert statuses["killed"] == [-signal.SIGKILL] and not (folder / "killed" / "model.safetensors").exists()
    toy.run(folder / "killed", steps=10, noise=0.5)
    toy.run(tmp_path / "whole", steps=10, noise=0.5)
    assert_same_weights(tmp_path / "whole", folder / "killed")
    assert log_of(tmp_path / "whole") == log_of(folder / "killed")
    assert [row["step"] for row in log_of(folder / "killed")] == [str(step) for step in range(1, 11)]


def assert_close_weights(a: Path, b: Path) -> None:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("many", ["two", "four"])
def test_processes_agree_with_one_on_the_joined_batch(runs, tmp_path, many):
    folder, statuses, said = runs
    assert set(statuses[many]) == {0}, said
    toy.run(tmp_path / "one", steps=6)
    assert_close_weights(tmp_path / "one", folder / many)
    for row, other in zip(log_of(tmp_path / "one"), log_of(folder / many), strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx({k: float(v) for k, v in other.items()}, rel=1e-4)


def test_sharded_weights_train_as_whole_ones_and_go_on_from_their_checkpoint(runs, tmp_path):
    folder, statuses, said = runs
    assert (statuses["sharded"], statuses["sharded again"]) == ([1, 1], [0, 0]), said
    assert checkpoint.existing(folder / "sharded")[-2].name == "step-00000004"  # of the signal
    toy.run(tmp_path / "one", **TWO)
    assert_close_weights(tmp_path / "one", folder / "sharded")


def test_micro_batches_count_once(tmp_path):
    toy.run(tmp_path / "one", steps=6)
    toy.run(tmp_path / "parts", steps=6, accumulate=4)
    assert_close_weights(tmp_path / "one", tmp_path / "parts")


def test_every_rank_stops_on_a_loss_that_is_not_finite(tmp_path):
    result = launch.under_torchrun("toy", 2, tmp_path / "out", limit=60, steps=10, poison=5, poisoned_rank=1)
    assert result.returncode != 0
    message = "step 6: loss fit is not finite on rank 1; "
    assert result.stderr.count(f"NonFiniteLossError: {message}") >= 2  # both ranks, in their own words, at once
    assert result.stderr.count("look at its batch, samples 44 to 47") >= 2
    assert [path.name for path in checkpoint.existing(tmp_path / "out")] == ["step-00000003"]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_newest_checkpoints_are_kept(tmp_path):
    toy.run(tmp_path / "out", steps=12, save_every=2, keep=2)
    assert [path.name for path in checkpoint.existing(tmp_path / "out")] == ["step-00000010", "step-00000012"]


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_the_run_ends_as_it_would_have(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "out", steps=10, interrupt=7)
    state = checkpoint.existing(tmp_path / "out")[-1] / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="step-00000006: the checkpoint cannot be read .* back to the one before"):
        toy.run(tmp_path / "out", steps=10)
    toy.run(tmp_path / "whole", steps=10)
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


def test_a_run_whose_checkpoints_are_all_damaged_stops(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "out", steps=10, interrupt=4)
    (state,) = checkpoint.existing(tmp_path / "out")
    (state / "state.json").write_text("{")
    with pytest.raises(BadInputError, match="cannot be read .* no older one is left; pass --fresh"):
        toy.run(tmp_path / "out", steps=10)


def test_a_signal_at_one_process_stops_all_after_the_step_with_a_checkpoint(runs, tmp_path):
    folder, statuses, said = runs
    assert (statuses["interrupted"], statuses["terminated"]) == ([1], [1, 1])
    assert said.count("stopped after step 5, a checkpoint is kept") == 1
    assert said.count("stopped after step 4, a checkpoint is kept") == 4  # two runs of two processes
    for name, last in (("interrupted", "step-00000005"), ("terminated", "step-00000004")):
        assert checkpoint.existing(folder / name)[-1].name == last
        assert not (folder / name / "model.safetensors").exists()
    toy.run(folder / "interrupted", steps=10)
    toy.run(tmp_path / "whole", steps=10)
    assert_same_weights(tmp_path / "whole", folder / "interrupted")


def test_another_number_of_processes_goes_on_within_rounding_and_says_so(runs, tmp_path):
    shutil.copytree(runs[0] / "terminated", tmp_path / "alone")
    with pytest.warns(UserWarning, match="going on with processes 2, now 1: the result agrees within rounding only"):
        toy.run(tmp_path / "alone", steps=10)
    toy.run(tmp_path / "whole", steps=10)
    assert_close_weights(tmp_path / "whole", tmp_path / "alone")


def test_the_exported_weights_are_the_exponential_average_over_the_steps(tmp_path):
    toy.run(tmp_path / "out", steps=8, save_every=1, keep=8, ema=0.3)
    average = toy.Toy().modules["model"].weight.detach()
    for step, folder in enumerate(checkpoint.existing(tmp_path / "out")):
        weight = load_file(folder / "state.safetensors")["module.model.weight"]
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    exported = load_file(tmp_path / "out" / "model.safetensors")["weight"]
    torch.testing.assert_close(exported, average)
    assert not torch.allclose(exported, weight)


def test_another_number_of_threads_is_said_to_change_the_last_bits(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "out", steps=10, interrupt=4)
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="going on with threads 1, now 2: the result agrees within rounding only"):
            toy.run(tmp_path / "out", steps=10)
    finally:
        torch.set_num_threads(1)


def test_columns_that_a_log_did_not_have_are_added_to_it(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss_total,old\n1,0.5,2\n")
    log = loop.Log(path, 1, write=True)
    log.write({"step": 2, "loss_total": 0.25, "new": 3.0})
    log.write({"step": 3, "loss_total": 0.125, "new": 4.0})
    assert path.read_text() == "step,loss_total,new,old\n1,0.5,,2\n2,0.25,3,\n3,0.125,4,\n"


def test_another_setting_is_not_gone_on_with(tmp_path):
    toy.run(tmp_path / "out", steps=4)
    with pytest.raises(UsageError, match="seed 0, now 3"):
        toy.run(tmp_path / "out", steps=4, seed=3)
    folder = checkpoint.existing(tmp_path / "out")[-1]
    made = json.loads((folder / "state.json").read_text())["config"]
    made = {key: tuple(value) if isinstance(value, list) else value for key, value in made.items()}
    with pytest.raises(UsageError, match="the images it is trained on are others"):
        checkpoint.load(folder, TrainConfig(**made), {"the images it is trained on": "others"})
    toy.run(tmp_path / "out", steps=4, keep=5, log_every=2)  # what changes no weight may change


def test_starting_over_removes_only_what_a_run_wrote(tmp_path):
    toy.run(tmp_path / "out", steps=4)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    loop.start_over(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["notes.txt"]


def test_seeds_of_steps_and_ranks_do_not_meet():
    seeds = {loop._mixed(seed, step, rank) for seed in range(3) for step in range(200) for rank in range(4)}
    assert len(seeds) == 3 * 200 * 4
