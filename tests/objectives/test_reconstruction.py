"""Pixel distances against their formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meditok.objectives.reconstruction import l1, l2, ssim


def test_l1_and_l2_are_means_over_every_value():
    """Both equal NumPy's mean of |r - x| and (r - x)^2 in float64, the reconstruction not clamped."""
    r, x = 3 * torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    difference = r.numpy() - x.numpy()
    assert l1(r, x).item() == pytest.approx(np.abs(difference).mean(), rel=1e-14)
    assert l2(r, x).item() == pytest.approx((difference**2).mean(), rel=1e-14)
    assert l1(r.bfloat16(), x.bfloat16()).dtype == torch.float32


def test_ssim_is_scikit_images():
    """Of colour pictures in float64, where no border is padded: the mean over pictures and channels."""
    from skimage.metrics import structural_similarity

    draw = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 40, 33, generator=draw, dtype=torch.float64) * 2 - 1
    r = x + 0.3 * torch.randn(2, 3, 40, 33, generator=draw, dtype=torch.float64)
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2.0, channel_axis=0)
    theirs = [structural_similarity(a.numpy(), b.numpy(), **settings) for a, b in zip(r, x, strict=True)]
    assert ssim(r, x).item() == pytest.approx(np.mean(theirs), rel=1e-10)
    assert ssim(x, x).item() == pytest.approx(1.0)
