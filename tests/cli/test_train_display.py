"""What `meditok train` shows while it runs: whole at the usual widths of a terminal, and a line a row elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from meditok.cli import train

ROW = {
    "step": 1250, "loss_total": -0.12345678, "l1": 0.081234, "l2": 0.012345, "vq": 0.0006818, "perceptual": 0.51893,
    "contrastive": 4.1589, "adversarial": -0.05598, "hinge": 2.087, "consistency": 1.042, "lr": 0.00096123,
    "grad_norm": 9.46412, "images_per_s": 1234.56, "share_of_peak": 0.4312, "logit_scale": 14.18234, "usage": 97.3,
    "usage_min": 43.75, "perplexity_min": 1811.12, "dead_max": 56.25, "revived": 0, "adversarial_weight": 10000.0,
}  # fmt: skip


def lines(bar: train.Bar, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(bar)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_every_number_stands_beside_its_name(width):
    bar = train.Bar(196_000)
    bar.say("looking at 33,400,000 images")
    assert "looking at 33,400,000 images" in lines(bar, width)[0] and len(lines(bar, width)) == 1
    bar(ROW)
    first, second, *table = lines(bar, width)
    assert "training" in first and "1250/196000" in first and "left" in first
    assert second.split("  ") == ["1234.6 images/s", "43% of peak", "codebook usage 97%"]
    shown = "\n".join(table)
    assert all(f"{name} {value:.4g} " in shown + " " for name, value in ROW.items() if name not in train.SHOWN)
    assert len(table) <= 7


def test_elsewhere_a_row_is_a_line(capfd):
    shown = train.Shown()
    shown(ROW)
    said = capfd.readouterr().err
    assert said.startswith("step 1250: loss_total -0.1235, l1 0.08123, ")
    assert said.endswith(", 1234.6 images/s, 43% of peak, codebook usage 97%\n") and said.count("\n") == 1
