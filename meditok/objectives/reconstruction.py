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
