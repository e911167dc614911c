"""InfoNCE against the formula in loops, masked duplicates, and process groups against the joined batch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import meditok
from meditok.objectives.contrastive import (
    NO_KEY,
    caption_keys,
    clamp_log_scale_,
    info_nce,
    retrieval_accuracy,
)

from . import ranks


def _by_hand(images, targets, log_scale, same=None) -> float:
    """One row and one direction at a time, in float64."""
    u = images / np.linalg.norm(images, axis=1, keepdims=True)
    t = targets / np.linalg.norm(targets, axis=1, keepdims=True)
    losses = []
    for a, b in ((u, t), (t, u)):
        for i in range(len(a)):
            others = [j for j in range(len(b)) if j == i or same is None or same[i] == NO_KEY or same[i] != same[j]]
            scores = [math.exp(log_scale) * float(a[i] @ b[j]) for j in others]
            losses.append(math.log(sum(map(math.exp, scores))) - math.exp(log_scale) * float(a[i] @ b[i]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("keyed", [False, True])
def test_info_nce_matches_the_formula_in_loops(keyed):
    """Both directions, own pair as label, equal keys left out of the denominator, NO_KEY equal to nothing."""
    x = ranks.inputs(3)
    same = x["same"] if keyed else None
    expected = _by_hand(x["images"].numpy(), x["targets"].numpy(), 2.0, same if same is None else same.tolist())
    assert info_nce(x["images"], x["targets"], x["log_scale"], same).item() == pytest.approx(expected, rel=1e-12)


def test_info_nce_gradient():
    """With respect to both features and the temperature, by finite differences, with masked rows."""
    x = ranks.inputs(1)
    leaves = [x[name].requires_grad_() for name in ("images", "targets", "log_scale")]
    same = torch.tensor([7, 7, 8, NO_KEY])
    assert torch.autograd.gradcheck(lambda *a: info_nce(*a, same), leaves)


def test_a_batch_of_one_caption_asks_for_nothing():
    """No negative is left, so loss and gradients are 0, and finite."""
    images = torch.randn(4, 6, requires_grad=True)
    loss = info_nce(images, torch.randn(4, 6), torch.tensor(2.0), torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and not images.grad.any()


def test_lower_precision_features_are_scored_in_float32():
    """bfloat16 features under autocast give the loss of the same values in float32."""
    u, t = torch.randn(2, 8, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(u, t, torch.tensor(2.0))
    assert loss.dtype == torch.float32 and torch.equal(loss, info_nce(u.float(), t.float(), torch.tensor(2.0)))


def test_temperature_stays_between_one_and_a_hundred():
    """ln s is clamped to [0, ln 100] in place."""
    for value, expected in ((-1.0, 0.0), (2.0, 2.0), (9.0, math.log(100))):
        log_scale = torch.nn.Parameter(torch.tensor(value))
        clamp_log_scale_(log_scale)
        assert log_scale.item() == pytest.approx(expected)


def test_caption_keys_ignore_case_and_space_and_do_not_depend_on_the_process():
    """Equal for the same words; pinned to BLAKE2b of nothing."""
    keys = caption_keys(["A chest  X-ray", "a CHEST x-ray ", "a chest CT", ""])
    assert keys[0] == keys[1] and len(set(keys.tolist())) == 3 and (keys >= 0).all()
    assert keys[3].item() == 6510301506637419378


def test_retrieval_accuracy_counts_equal_captions():
    """A nearest target with the same caption is a hit."""
    targets = torch.eye(3)
    images = torch.eye(3)[[1, 0, 2]]  # the first two look for each other
    assert retrieval_accuracy(images, targets).item() == pytest.approx(1 / 3)
    assert retrieval_accuracy(images, targets, torch.tensor([5, 5, 6])).item() == 1


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(Path(meditok.__file__).parents[1])}
    done = subprocess.run([sys.executable, ranks.__file__, folder], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_process_groups_equal_the_joined_batch(groups, world):
    """Values and gradients over 2 and 4 gloo processes, averaged as DistributedDataParallel does, are those of one
    process on the joined batch; the adaptive weight is the same on every rank."""
    joined = ranks.losses(**ranks.inputs(world))
    found = [torch.load(groups / f"{world}.{rank}.pt") for rank in range(world)]
    for name, expected in joined.items():
        parts = [one[name] for one in found]
        if name.endswith((".images", ".targets")):  # a rank holds its own rows; DDP divides by the number of ranks
            result = torch.cat(parts) / world
        elif name == "weight":
            assert all(torch.equal(part, parts[0]) for part in parts)
            result = parts[0]
        else:
            result = torch.stack(parts).mean(0)
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
