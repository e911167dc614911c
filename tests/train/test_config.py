"""Configs: read, changed from the command line, and refused in one line."""

from __future__ import annotations

import dataclasses

import pytest

from meditok.errors import UsageError
from meditok.train.config import TrainConfig, bundled_configs, load_config


def test_every_bundled_config_loads():
    assert bundled_configs() == ["meditok-stage1", "meditok-stage2", "tiny-stage1", "tiny-stage2"]
    for name in bundled_configs():
        assert isinstance(load_config(name), TrainConfig)


def test_the_published_stages_differ_only_in_what_they_align_with_and_for_how_long():
    first, second = (dataclasses.asdict(load_config(f"meditok-stage{stage}")) for stage in (1, 2))
    assert {key for key in first if first[key] != second[key]} == {"target", "contrastive", "steps"}


def test_changes_keep_the_types_of_the_settings(tmp_path):
    config = load_config(
        "tiny-stage1", ["steps=5", "lr=1", "betas=[0.5, 0.6]", "data=12", 'model={"embed_dim": 64}', "weights-ok=false"]
    )
    assert (config.steps, config.lr, config.betas, config.data) == (5, 1.0, (0.5, 0.6), "12")
    assert isinstance(config.lr, float) and config.model == {"embed_dim": 64} and config.weights_ok is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stps=3", "no setting stps; near it: steps"),
        ("steps=many", "steps = 'many' should be int"),
        ("steps=true", "steps = True should be int"),
        ("steps=0", "steps = 0 makes no sense"),
        ("size=100", "size = 100 makes no sense"),
        ("accumulate=0", "accumulate = 0 makes no sense"),
        ("batch=9", "batch = 9 makes no sense"),
        ("workers=-1", "workers = -1 makes no sense"),
        ("sheet_every=0", "sheet_every = 0 makes no sense"),
        ("betas=[0.9, 1.0]", "betas = .0.9, 1.0. makes no sense"),
        ("betas=[1]", "betas = \\[1\\] should be tuple\\[float, float\\]"),
        ("steps", "write --key=value"),
    ],
)
def test_a_change_that_makes_no_sense_is_one_line(change, message):
    with pytest.raises(UsageError, match=message):
        load_config("tiny-stage1", ["accumulate=2", change])


def test_a_file_starts_from_its_base_and_its_tables_only_group(tmp_path):
    (tmp_path / "base.toml").write_text('steps = 7\n[data]\ndata = "here"\n')
    (tmp_path / "own.toml").write_text('base = "base.toml"\n[run]\nsteps = 8\n')
    config = load_config(str(tmp_path / "own.toml"))
    assert (config.steps, config.data) == (8, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [("steps = ", "not TOML"), ("[run]\nstep = 3\n", "no setting step"), ('base = "own.toml"\n', "back to itself")],
)
def test_a_file_that_makes_no_sense_is_one_line(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(str(path))
    with pytest.raises(UsageError, match="neither a file nor one of"):
        load_config(str(tmp_path / "gone.toml"))
