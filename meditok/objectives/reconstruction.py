"""Pixel distances."""

from __future__ import annotations

import torch

from . import wide


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
