"""How well a codebook is used: measures over a window of steps, the threshold for dead codes, the collapse alarm.

Counts are judged against what even use would give. A window holds `steps` optimiser steps and `tokens` rows a codebook,
so a code of K is expected tokens / K times:
    dead:      count < dead_share * tokens / K                    (0.01 is the share MedITok and UniTok call unused)
    window:    ends after a multiple of `window` steps, once tokens >= 10 * K: a code used evenly is then missed with
               probability exp(-10) = 5e-5, so that few tokens a step over many codes make no code look dead
    collapse:  perplexity < max(1.5, K / 10)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

EXPECTED_HITS = 10  # times a code is expected in a window before its count is judged
COLLAPSED_SHARE = 0.1  # perplexity over K below which the alarm sounds


def dead_below(tokens: float, codes: int, dead_share: float = 0.01) -> float:
    """Count under which a code is dead, of `tokens` rows over `codes` codes."""
    return dead_share * tokens / codes


def window_steps(tokens_per_step: float, codes: int, window: int) -> int:
    """Steps after which a window ends when every step has `tokens_per_step` rows a codebook."""
    return window * max(1, math.ceil(EXPECTED_HITS * codes / tokens_per_step / window))


@dataclass(frozen=True)
class CodebookHealth:
    """Use of every codebook over `steps` steps of `tokens` rows, all processes together."""

    steps: int
    tokens: int
    codes: int
    usage: tuple[float, ...]  # share of codes chosen at least once, a codebook each
    perplexity: tuple[float, ...]  # exp of the entropy of the codes' frequencies: 1 (one code) to K (even use)
    dead: tuple[float, ...]  # share of codes below the threshold
    revived: int  # codes revived since training began

    @property
    def usage_min(self) -> float:
        return min(self.usage)

    @property
    def perplexity_min(self) -> float:
        return min(self.perplexity)

    @property
    def dead_max(self) -> float:
        return max(self.dead)

    @property
    def collapsed(self) -> bool:
        """Whether the worst codebook is all but unused; False before any token was seen."""
        return self.tokens > 0 and self.perplexity_min < max(1.5, COLLAPSED_SHARE * self.codes)


def measure(counts: torch.Tensor, steps: int, dead_share: float, revived: int = 0) -> CodebookHealth:
    """counts (G, K) of a window -> its measures."""
    counts = counts.double().cpu()
    tokens = counts.sum(1, keepdim=True)  # (G, 1)
    share = counts / tokens.clamp_min(1)
    perplexity = torch.where(tokens[:, 0] > 0, torch.special.entr(share).sum(1).exp(), 0)
    codes = counts.shape[1]
    return CodebookHealth(
        steps=steps,
        tokens=int(tokens.max()),
        codes=codes,
        usage=tuple((counts > 0).double().mean(1).tolist()),
        perplexity=tuple(perplexity.tolist()),
        dead=tuple((counts < dead_below(tokens, codes, dead_share)).double().mean(1).tolist()),
        revived=revived,
    )


def alarm(health: CodebookHealth, settings: dict[str, object]) -> str:
    """One line for a collapsed codebook: which, how far, and the settings that usually cause it."""
    worst = health.perplexity.index(health.perplexity_min)
    used = round(health.usage[worst] * health.codes)
    named = ", ".join(f"{name}={value}" for name, value in settings.items())
    return (
        f"codebook {worst} has collapsed: {used} of {health.codes} codes used, perplexity {health.perplexity_min:.1f}, "
        f"over {health.steps} steps of {health.tokens / max(1, health.steps):.0f} tokens; look at {named}, "
        "the learning rate (too high?), the start of the codes (`start()` puts them on encoder outputs), "
        f"and the batch (a step gives each code {health.tokens / max(1, health.steps) / health.codes:.2g} tokens)"
    )
