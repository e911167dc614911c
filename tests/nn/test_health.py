"""Codebook health: measures, thresholds, the collapse alarm, and the revival of dead codes."""

from __future__ import annotations

import dataclasses
import logging
import math

import pytest
import torch

from meditok.errors import UsageError
from meditok.nn.health import dead_below, measure, window_steps
from meditok.nn.quantizer import MultiCodebookQuantizer, VectorQuantizer

from ..ops.helpers import METRICS, randn


@pytest.mark.parametrize(
    "tokens, codes, threshold, steps",
    [
        (131072, 4096, 0.32, 50),  # 512 images of 256 tokens: one step gives a code 32
        (16384, 4096, 0.04, 50),
        (256, 4096, 0.000625, 200),  # one image a step: a code is expected 10 times in 160 steps
        (2048, 512, 0.04, 50),
        (256, 65536, 0.0000390625, 2600),
        (4096, 16, 2.56, 50),
    ],
)
def test_threshold_and_window_follow_tokens_per_step_over_codes(tokens, codes, threshold, steps):
    """A code is dead below 1 % of tokens / K; a window is the next multiple of 50 steps that expects 10 per code."""
    assert dead_below(tokens, codes) == pytest.approx(threshold)
    assert window_steps(tokens, codes, window=50) == steps
    assert dead_below(steps * tokens, codes) == pytest.approx(steps * threshold)


def test_measures_of_known_counts():
    """Even use, one code, and none at all; the minimum is over codebooks."""
    health = measure(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]]), steps=2, dead_share=0.01)
    assert health.usage == (1, 0.25) and health.usage_min == 0.25
    assert health.perplexity == pytest.approx((4, 1)) and health.perplexity_min == pytest.approx(1)
    assert health.dead == (0, 0.75) and health.dead_max == 0.75
    assert (health.steps, health.tokens, health.codes) == (2, 20, 4) and health.collapsed
    nothing = measure(torch.zeros(1, 4, dtype=torch.int64), 0, 0.01)
    assert nothing.perplexity == (0,) and not nothing.collapsed
    assert dataclasses.asdict(health)["revived"] == 0


@pytest.mark.parametrize("mode", ["ema", "gradient", "frozen"])
def test_an_encoder_that_uses_three_codes_sounds_the_alarm_once_a_window(mode, caplog):
    """Within the window's steps, naming the codebook and the settings; again only when the next window ends."""
    quantizer = MultiCodebookQuantizer(2, 32, 4, codebook_update=mode, window=5)
    places = randn(3, 4)
    healthy, rigged = randn(64, 5, 4), places[torch.arange(64 * 5).view(64, 5) % 3]
    with torch.no_grad():
        quantizer.codebook.copy_(torch.cat([randn(1, 32, 4, seed=3)] * 2))
    quantizer.state.restart(quantizer.codebook, "cosine")
    steps = window_steps(64 * 5, 32, 5)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 2 * steps + 1):
            quantizer(torch.cat([healthy, rigged], -1))
            quantizer.update()
            assert len(caplog.records) == step // steps
    message = caplog.records[0].getMessage()
    assert message.startswith("codebook 1 has collapsed: 3 of 32 codes used") and "\n" not in message
    assert f"codebook_update={mode}, revive=False, commitment_weight=0.25, decay=0.99" in message
    assert quantizer.health().usage_min <= 3 / 32 and quantizer.health().steps == steps


def test_a_healthy_codebook_is_silent(caplog):
    quantizer = VectorQuantizer(16, 4, window=2)
    with caplog.at_level(logging.WARNING):
        for seed in range(6):
            quantizer(randn(20, 8, 4, seed=seed))
            quantizer.update()
    health = quantizer.health()
    assert not caplog.records and health.usage_min == 1 and health.perplexity_min > 8 and health.dead_max == 0


@pytest.mark.parametrize("mode", ["ema", "gradient"])
@pytest.mark.parametrize("metric", METRICS)
def test_dead_codes_move_onto_rows_of_the_last_step(metric, mode):
    """Unit rows for cosine; EMA state as if the row had been seen once; living codes stay."""
    quantizer = VectorQuantizer(8, 4, metric=metric, codebook_update=mode, window=3, decay=0.5)
    with torch.no_grad():
        quantizer.codebook.copy_(randn(1, 8, 4))
        quantizer.codebook[0, 5:] = -100 * quantizer.codebook[0, :5].mean(0)
    quantizer.state.restart(quantizer.codebook, metric)
    near = torch.nn.functional.normalize(quantizer.codebook[0, :5].detach(), dim=-1)
    for seed in range(3):
        before = quantizer.codebook.detach().clone()
        x = (near if metric == "cosine" else before[0, :5]).repeat(6, 1)[None] + 0.01 * randn(1, 30, 4, seed=seed)
        quantizer(x)
        quantizer.update()
    codebook, state = quantizer.codebook.detach(), quantizer.state
    assert state.revived == 3 == quantizer.health().revived
    seen = torch.nn.functional.normalize(x[0], dim=-1) if metric == "cosine" else x[0]
    for code in codebook[0, 5:]:
        assert torch.isclose(code, seen, atol=1e-6).all(1).any()
        assert metric == "l2" or code.norm() == pytest.approx(1, abs=1e-6)
    assert torch.equal(quantizer.assign(codebook[:, 5:]), torch.tensor([[5, 6, 7]]))
    if mode == "ema":
        assert state.ema_counts[0, 5:].tolist() == [1, 1, 1] and torch.equal(state.ema_sums[0, 5:], codebook[0, 5:])
    else:
        assert torch.equal(codebook[0, :5], before[0, :5])


def test_revival_off_and_frozen_leave_dead_codes_alone():
    for settings in (dict(revive=False), dict(codebook_update="frozen")):
        quantizer = VectorQuantizer(64, 4, window=1, **settings)
        before = quantizer.codebook.clone()
        for _ in range(3):
            quantizer(randn(1, 1, 4).expand(1, 640, 4))
            quantizer.update()
        assert quantizer.health().dead_max > 0.9 and quantizer.state.revived == 0
        turned = torch.nn.functional.cosine_similarity(quantizer.codebook, before, dim=-1) < 1 - 1e-6
        assert turned.sum() <= 1 and ("revive" in settings or torch.equal(quantizer.codebook, before))


def test_candidates_are_distinct_recent_and_blind_to_order_and_splits():
    """The same rows whether they come at once, shuffled, twice, or in pieces; rows of a later step go first."""
    rows = randn(1, 40, 4)

    def kept(*passes: torch.Tensor) -> list:
        quantizer = VectorQuantizer(16, 4)
        for x in passes:
            quantizer(x)
        return quantizer._candidates(None).sort(0).values.tolist()

    expected = kept(rows)
    assert len(expected) == 16
    assert kept(rows[:, torch.randperm(40)]) == kept(rows[:, :7], rows[:, 7:]) == kept(rows, rows) == expected
    quantizer = VectorQuantizer(16, 4, metric="l2", decay=1.0)
    for x in (rows, rows[:, :10] + 5):
        quantizer(x)
        quantizer.update()
    found = quantizer._candidates(None)
    assert len(found) == 16 and {tuple(row) for row in (rows[0, :10] + 5).tolist()} <= {
        tuple(row) for row in found[:, 0].tolist()
    }


def test_start_puts_codes_on_collected_rows():
    """Each distinct row once where there are enough, else again from the first; nothing seen: nothing moves."""
    quantizer = VectorQuantizer(8, 4, metric="l2")
    before = quantizer.codebook.clone()
    quantizer.start()
    assert torch.equal(quantizer.codebook, before)
    x = randn(1, 3, 4)
    quantizer.collect(x)
    quantizer.start()
    assert {tuple(code) for code in quantizer.codebook[0].tolist()} == {tuple(row) for row in x[0].tolist()}
    quantizer.collect(randn(2, 20, 4, seed=1))
    quantizer.start()
    assert len(quantizer.codebook[0].unique(dim=0)) == 8
    assert quantizer(x).loss.isfinite() and math.isfinite(quantizer.health().perplexity_min)
    with pytest.raises(UsageError, match="frozen"):
        VectorQuantizer(8, 4, codebook_update="frozen").start()
