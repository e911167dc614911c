"""Training objectives: plain functions on tensors, each with the source of its formula."""

from __future__ import annotations

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is: what losses are evaluated in."""
    return x if x.dtype == torch.float64 else x.float()
