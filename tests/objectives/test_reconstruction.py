"""Pixel distances against their formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meditok.objectives.reconstruction import l1, l2


def test_l1_and_l2_are_means_over_every_value():
    """Both equal NumPy's mean of |r - x| and (r - x)^2 in float64, the reconstruction not clamped."""
    r, x = 3 * torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    difference = r.numpy() - x.numpy()
    assert l1(r, x).item() == pytest.approx(np.abs(difference).mean(), rel=1e-14)
    assert l2(r, x).item() == pytest.approx((difference**2).mean(), rel=1e-14)
    assert l1(r.bfloat16(), x.bfloat16()).dtype == torch.float32
