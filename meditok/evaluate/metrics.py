"""How close a reconstruction is to its picture.

Pictures are (C, H, W) tensors of equal shape; `data_range` is the difference between the largest and the smallest
value they may take. SSIM and MS-SSIM want values that start at 0, as intensities do: their luminance term depends on
the offset.
"""

from __future__ import annotations

import math

import torch

from .._lazy import require

WINDOW, SIGMA = 11, 1.5  # taps and standard deviation of the Gaussian of SSIM and MS-SSIM
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, of MS-SSIM
MS_SSIM_SIDE = WINDOW * 2 ** (len(SCALES) - 1)  # the coarsest of the scales must hold the window


def psnr(image: torch.Tensor, other: torch.Tensor, data_range: float) -> float:
    """Peak signal-to-noise ratio, 10 log10(range^2 / mean squared error) dB; inf if equal."""
    error = (image.double() - other.double()).square().mean().item()
    return 10 * math.log10(data_range**2 / error) if error else math.inf


def mae(image: torch.Tensor, other: torch.Tensor) -> float:
    """Mean absolute error, in the unit of the values."""
    return (image.double() - other.double()).abs().mean().item()


def ssim(image: torch.Tensor, other: torch.Tensor, data_range: float) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 taps, sigma 1.5; nan if a side is shorter."""
    metrics = require("skimage.metrics", "structural similarity")
    if min(image.shape[1:]) < WINDOW:
        return math.nan
    return float(
        metrics.structural_similarity(
            image.double().numpy(),
            other.double().numpy(),
            channel_axis=0,
            data_range=data_range,
            gaussian_weights=True,
            sigma=SIGMA,
            use_sample_covariance=False,
        )
    )


def ms_ssim(image: torch.Tensor, other: torch.Tensor, data_range: float) -> float:
    """Multi-scale structural similarity (Wang et al. 2003), five scales; nan if a side is under MS_SSIM_SIDE pixels."""
    metrics = require("torchmetrics.functional.image", "multi-scale structural similarity")
    if min(image.shape[1:]) < MS_SSIM_SIDE:
        return math.nan
    return float(
        metrics.multiscale_structural_similarity_index_measure(
            other.float()[None],  # float64 takes five times as long, for the seventh digit
            image.float()[None],
            kernel_size=WINDOW,
            sigma=SIGMA,
            data_range=data_range,
            betas=SCALES,
            normalize="relu",
        )
    )
