"""Linear layers and 1x1 convolutions with the norms before and the residual after them, over the `linear` op."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.linear import linear
from . import int8


def norm_linear(
    x: torch.Tensor,
    layer: nn.Linear | nn.Conv2d,
    *norms: nn.LayerNorm | None,
    activation: str = "none",
    gate: nn.Linear | None = None,
    residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., K), channels last -> (..., N): activation(layer(norms(x))) + residual; see ops/linear.py.

    layer: a linear or a 1x1 convolution; `bias` stands for the layer's own; a norm of None is left out.
    """
    if int8.active() and isinstance(layer, nn.Linear):
        return int8.norm_linear(x, layer, [norm for norm in norms if norm is not None], gate, residual)
    return linear(
        x,
        layer.weight.flatten(1),
        layer.bias if bias is None else bias,
        norms=[(norm.weight, norm.bias, norm.eps) for norm in norms if norm is not None],
        activation=activation,
        gate=None if gate is None else (gate.weight, gate.bias),
        residual=residual,
    )


class Linear(nn.Linear):
    """nn.Linear whose rows depend on neither the batch nor the number of threads where the CPU kernel serves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm_linear(x, self)
