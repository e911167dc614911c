"""Pixel distances."""

from __future__ import annotations

import torch

from . import wide

C1, C2 = (2 * 0.01) ** 2, (2 * 0.03) ** 2  # of SSIM on [-1, 1]


def l1(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(): mean |r - x| of two tensors (B, 3, H, W), in their units ([-1, 1]); r is not clamped."""
    return (wide(reconstruction) - wide(images)).abs().mean()


def l2(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(): mean (r - x)^2 of two tensors (B, 3, H, W), in squared units of theirs; r is not clamped."""
    return (wide(reconstruction) - wide(images)).square().mean()


def log_l2(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(): mean over images (B, 3, H, W) of ln(mse + 1e-4): every image's PSNR counts alike, however hard it is.

    The 1e-4, 46 dB on [-1, 1], bounds the weight of an image that is all but right.
    """
    squares = (wide(reconstruction) - wide(images)).square()
    return (squares.flatten(1).mean(1) + 1e-4).log().mean()


def ssim(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(): mean structural similarity of two tensors (B, 3, H, W) in [-1, 1], H and W at least 11; r is not clamped.

    Wang et al. 2004 (IEEE TIP 13, eq. 13): Gaussian window of 11 pixels and sigma 1.5, K = 0.01 and 0.03, data range 2,
    where the window fits; population variances.
    """
    r, x = wide(reconstruction), wide(images)
    down, across = (_window_means(size, r) for size in r.shape[2:])

    def mean(values: torch.Tensor) -> torch.Tensor:
        return down @ values @ across.T

    r_mean, x_mean = mean(r), mean(x)
    r_var, x_var = mean(r * r) - r_mean.square(), mean(x * x) - x_mean.square()
    covariance = mean(r * x) - r_mean * x_mean
    luminance = (2 * r_mean * x_mean + C1) / (r_mean.square() + x_mean.square() + C1)
    return (luminance * (2 * covariance + C2) / (r_var + x_var + C2)).mean()


def _window_means(size: int, like: torch.Tensor) -> torch.Tensor:
    """(size - 10, size): the Gaussian window's weights along one side, a row for each place it fits. As a matrix, since
    a product is faster on a CPU than a convolution of one channel."""
    offsets = torch.arange(size, device=like.device) - torch.arange(size - 10, device=like.device)[:, None] - 5
    weights = torch.exp(-offsets.to(like.dtype).square() / (2 * 1.5**2)) * (offsets.abs() <= 5)
    return weights / weights.sum(1, keepdim=True)
