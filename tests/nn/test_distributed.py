"""Codebooks trained by real gloo processes: 4 of them, and 2 of those in a group of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import meditok

from . import ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the four processes ended with; a process that waits for another for 60 s fails."""
    folder = tmp_path_factory.mktemp("ranks")
    root = str(Path(meditok.__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, ranks.__file__, str(rank), "4", str(folder)], env=env, stderr=subprocess.PIPE)
        for rank in range(4)
    ]
    try:
        errors = [process.communicate(timeout=240)[1].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


CASES = [(name, world) for name in ranks.SCENARIOS for world in (2, 4)]


@pytest.mark.parametrize("scenario, world", [*CASES, ("gradient", 4)])
def test_every_process_ends_with_the_same_bits(results, scenario, world):
    """Codebook, EMA, usage and window after 50 steps with revivals, one process without rows included."""
    first = results[0][scenario, world]
    for other in results[1:world]:
        for name, value in other[scenario, world].items():
            if name not in ("state.rows", "state.passes"):  # a process's own: its candidates, how often it was called
                assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("scenario, world", CASES)
def test_processes_equal_one_process_on_the_joined_batch(results, scenario, world):
    """Also in which codes were revived and on which rows; micro-batches and an idle process make no difference."""
    found, expected = results[0][scenario, world], ranks.result(ranks.train(scenario))
    codebooks = [name for name in expected if name.endswith(("codebook", "codebook.weight"))]
    for name in (*codebooks, "state.ema_counts", "state.ema_sums"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    for name in ("state.steps", "state.window", "state.last", "state.revived"):
        assert torch.equal(found[name], expected[name]), name
    assert found["state.revived"] > 0


def test_micro_batches_count_once():
    """Two passes before update() are one EMA step over the joined rows."""
    whole, split = ranks.train("cosine"), ranks.train("accumulate")
    assert torch.equal(whole.state.last, split.state.last) and whole.state.steps == split.state.steps == ranks.STEPS
    torch.testing.assert_close(whole.codebook, split.codebook, rtol=1e-5, atol=1e-5)


def test_published_running_usage_is_that_of_the_joined_batch(results):
    """Shares averaged over processes of equal batches."""
    for name, value in ranks.result(ranks.train("cosine")).items():
        if "usage" in name:
            torch.testing.assert_close(results[0]["cosine", 4][name], value, rtol=1e-5, atol=1e-6)
