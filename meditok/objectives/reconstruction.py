"""Pixel distances and the entropy term of the codes."""

from __future__ import annotations

import torch

from . import wide


def l1(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(): mean |r - x| of two tensors (B, 3, H, W), in their units ([-1, 1]); r is not clamped."""
    return (wide(reconstruction) - wide(images)).abs().mean()


def l2(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(): mean (r - x)^2 of two tensors (B, 3, H, W), in squared units of theirs; r is not clamped."""
    return (wide(reconstruction) - wide(images)).square().mean()


def entropy(pieces: torch.Tensor, codebook: torch.Tensor, temperature: float = 0.01) -> torch.Tensor:
    """(): mean entropy of each piece's soft choice minus that of the average choice, in nats, mean over codebooks.

    pieces (N, G, C) and codebook (G, K, C) float with rows of length 1; soft choices are softmax(-|piece - row|^2 /
    temperature). Small where every piece is sure and all codes are used alike: between -ln K and 0 (Jansen et al. 2020,
    arXiv 1911.05894, section 3.2; Yu et al. 2024, arXiv 2310.05737, eq. 5). MedITok trains with weight 0.
    """
    pieces, codebook = wide(pieces).transpose(0, 1), wide(codebook)  # (G, N, C), (G, K, C)
    with torch.autocast(pieces.device.type, enabled=False):
        products = pieces @ codebook.transpose(1, 2)  # (G, N, K)
    distances = pieces.square().sum(-1, keepdim=True) - 2 * products + codebook.square().sum(-1).unsqueeze(1)
    log_choice = (-distances / temperature).log_softmax(-1)  # (G, N, K)
    choice = log_choice.exp()
    each = -(choice * log_choice).sum(-1).mean(-1)  # (G,)
    average = choice.mean(1)
    return (each + (average * (average + 1e-7).log()).sum(-1)).mean()
