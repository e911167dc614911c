"""Batches of any size are computed in parts that fit, and the parts change nothing."""

from __future__ import annotations

import os

import pytest
import torch

from meditok.models import plan
from meditok.models.config import PRESETS

from ..ops.helpers import run_python


@pytest.mark.parametrize("name", PRESETS)
def test_the_plan_covers_the_largest_maps_and_grows_with_the_image(name):
    """At least the last map and what it is added up from; four times for twice the side; half in half precision."""
    config = PRESETS[name]
    size = plan.image_bytes(config, 256, 256)
    last = 256 * 256 * config.decoder_widths[1] * 4
    hidden = 128 * 128 * config.expansion * config.decoder_widths[1] * 4
    assert size > last * (1 + 9 / 4) and size > hidden * (1 + 9 / 4)
    assert plan.image_bytes(config, 512, 512) == pytest.approx(4 * size) and size < 2**30
    assert plan.image_bytes(config, 256, 256, 2) == pytest.approx(size / 2)


@torch.no_grad()
def test_parts_are_whole_where_they_must_be(monkeypatch):
    sizes, config = [], PRESETS["tiny"]

    def run(x):
        sizes.append(len(x))
        return 2 * x

    x = torch.rand(5, 3)
    monkeypatch.setattr(plan, "images_at_once", lambda *_: 2)
    assert torch.equal(plan.in_parts(run, x, config, 16, 16), 2 * x) and sizes == [2, 2, 1]
    with torch.enable_grad():
        plan.in_parts(run, x, config, 16, 16)
    plan.in_parts(run, x[:0], config, 16, 16)
    assert sizes[3:] == [5, 0]


def test_as_many_images_as_the_free_memory_holds(monkeypatch):
    """80 % of what the device and torch's own cache have free, never less than one; one on a CPU."""
    config, cuda = PRESETS["tiny"], torch.device("cuda", 0)
    size = plan.image_bytes(config, 256, 256)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * size, 99 * size))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 7 * size)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * size)
    assert plan.images_at_once(config, 256, 256, cuda) == 8
    assert plan.images_at_once(config, 4096, 4096, cuda) == 1
    assert plan.images_at_once(config, 256, 256, torch.device("cpu")) == 1


HELD = """
import os, pathlib, torch, meditok
from meditok.models import plan
torch.set_num_threads(1)
model = meditok.build("vitamin-small", seed=0).eval()
convolutions = model.encoder.patch_embed["backbone"], model.decoder.convolve
inputs = torch.zeros(1, 3, 256, 256), torch.zeros(1, model.config.width, 16, 16)
def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024
with torch.no_grad():
    for run, x in zip(convolutions, inputs):
        run(x[..., :1, :1].expand(-1, -1, 32, 32).contiguous())  # folds weights, starts threads
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over
        before = status("VmRSS")
        run(x)
        print(status("VmHWM") - before, plan.image_bytes(model.config, 256, 256))
"""


def test_the_plan_holds_for_one_image():
    """What encoder and decoder convolutions take beyond weights and input, measured in a fresh process on the CPU."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not tell a process its peak")
    result = run_python(HELD)
    pairs = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(pairs) == 2, result.stderr
    assert all(held <= planned for held, planned in pairs), pairs
    assert max(held for held, _ in pairs) >= pairs[0][1] / 4, "the plan holds far more than is needed"
