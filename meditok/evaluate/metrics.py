"""How close a reconstruction is to its image."""

from __future__ import annotations

import math

import torch

from .._lazy import require


def psnr(image: torch.Tensor, other: torch.Tensor, data_range: float) -> float:
    """Peak signal-to-noise ratio of two (3, H, W) images, 10 log10(range^2 / mean squared error) dB; inf if equal."""
    error = (image.double() - other.double()).square().mean().item()
    return 10 * math.log10(data_range**2 / error) if error else math.inf


def ssim(image: torch.Tensor, other: torch.Tensor, data_range: float) -> float:
    """Structural similarity (Wang et al. 2004) of two (3, H, W) images: Gaussian window of 11 taps, sigma 1.5."""
    metrics = require("skimage.metrics", "structural similarity")
    return float(
        metrics.structural_similarity(
            image.numpy(),
            other.numpy(),
            channel_axis=0,
            data_range=data_range,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
