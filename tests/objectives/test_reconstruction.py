"""Pixel and entropy terms against their formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meditok.objectives.reconstruction import entropy, l1, l2


def test_l1_and_l2_are_means_over_every_value():
    """Both equal NumPy's mean of |r - x| and (r - x)^2 in float64, the reconstruction not clamped."""
    r, x = 3 * torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    difference = r.numpy() - x.numpy()
    assert l1(r, x).item() == pytest.approx(np.abs(difference).mean(), rel=1e-14)
    assert l2(r, x).item() == pytest.approx((difference**2).mean(), rel=1e-14)
    assert l1(r.bfloat16(), x.bfloat16()).dtype == torch.float32


def _entropy(pieces: np.ndarray, codebook: np.ndarray, temperature: float) -> float:
    """The published formula, one codebook and one piece at a time."""
    losses = []
    for g in range(codebook.shape[0]):
        choices = []
        for piece in pieces[:, g]:
            scores = -((piece - codebook[g]) ** 2).sum(1) / temperature
            weights = np.exp(scores - scores.max())
            choices.append(weights / weights.sum())
        each = np.mean([-(p * np.log(np.maximum(p, 1e-300))).sum() for p in choices])
        average = np.mean(choices, axis=0)
        losses.append(each + (average * np.log(average + 1e-7)).sum())
    return float(np.mean(losses))


def test_entropy_term_matches_the_formula_written_out():
    """Mean over codebooks of per-piece entropy minus the entropy of the average choice, with MedITok's 1e-7."""
    pieces = F.normalize(torch.randn(20, 2, 4, dtype=torch.float64), dim=-1)
    codebook = F.normalize(torch.randn(2, 7, 4, dtype=torch.float64), dim=-1)
    for temperature in (0.01, 0.3):
        assert entropy(pieces, codebook, temperature).item() == pytest.approx(
            _entropy(pieces.numpy(), codebook.numpy(), temperature), abs=1e-9
        )


def test_entropy_term_is_lowest_when_sure_and_even():
    """Pieces that sit on the codes, each used alike, reach -ln K; all on one code gives 0."""
    codebook = torch.eye(8).unsqueeze(0)
    assert entropy(codebook.transpose(0, 1), codebook).item() == pytest.approx(-np.log(8), abs=1e-5)
    assert entropy(codebook[:, :1].expand(-1, 8, -1).transpose(0, 1), codebook).item() == pytest.approx(0, abs=1e-5)


def test_entropy_term_is_float32_under_autocast():
    """At temperature 0.01 bfloat16 products would move the choices; autocast changes nothing."""
    pieces, codebook = F.normalize(torch.randn(20, 2, 4), dim=-1), F.normalize(torch.randn(2, 7, 4), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = entropy(pieces, codebook)
    assert torch.equal(found, entropy(pieces, codebook))


def test_entropy_gradient():
    """The gradient with respect to pieces and codebook is that of finite differences."""
    pieces = F.normalize(torch.randn(5, 1, 3, dtype=torch.float64), dim=-1).requires_grad_()
    codebook = F.normalize(torch.randn(1, 4, 3, dtype=torch.float64), dim=-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, c: entropy(p, c, 0.3), (pieces, codebook))
