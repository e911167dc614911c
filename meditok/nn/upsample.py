"""Nearest-neighbour x2 followed by a 3x3 convolution, on the small map: 2.25 or 4 multiplications an output, not 9.

In one dimension, with taps a, b, c, s = a + b + c and differences d_i = x_{i+1} - x_i of the zero-padded input,
    y_{2i} = s x_i - a d_{i-1},    y_{2i+1} = s x_i + c d_i,
and nested in two dimensions every output is a sum of products with nine folded kernels: one on the map, two on its
differences along each axis, four on the differences along both ("nine"). Without differences, each of the four output
parities is a 2x2 convolution with summed taps ("four"). Both equal the plain form up to rounding, borders included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.convolution import upsample_differences, upsample_gather
from ..ops.linear import linear
from .versions import version


def nine_kernels(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """weight (O, I, 3, 3) -> kernels of the map (O, I), its differences along h, along w (2O, I), along both (4O, I).

    In the weight's dtype, float32 at least; rows of a kernel are ordered by output parity, then by channel.
    """
    weight = weight.float() if weight.dtype.itemsize < 4 else weight
    rows = torch.stack((-weight[:, :, 0], weight.sum(2), weight[:, :, 2]))  # (3, O, I, 3): -a, s, c
    k = torch.stack((-rows[..., 0], rows.sum(-1), rows[..., 2]), 1)  # (3, 3, O, I)
    return k[1, 1], k[::2, 1].flatten(0, 1), k[1, ::2].flatten(0, 1), k[::2, ::2].flatten(0, 2)


def nine(
    x: torch.Tensor, kernels: tuple[torch.Tensor, ...], bias: torch.Tensor, norm: nn.LayerNorm | None = None
) -> torch.Tensor:
    """x (B, h, w, I), bias (O,) -> (B, 2h, 2w, O), then norm and GELU where a norm is given."""
    tall, wide, both = upsample_differences(x)
    parts = (linear(x, kernels[0], bias), *(linear(a, k) for a, k in zip((tall, wide, both), kernels[1:], strict=True)))
    return upsample_gather(*parts, None if norm is None else (norm.weight, norm.bias, norm.eps))


def four_kernels(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """weight (O, I, 3, 3) -> 2x2 kernels (O, I, 2, 2) of the parities (0, 0), (0, 1), (1, 0), (1, 1); taps summed in
    float32 at least."""
    w = weight.float() if weight.dtype.itemsize < 4 else weight
    rows = [
        torch.stack((w[:, :, 0], w[:, :, 1] + w[:, :, 2]), 2),
        torch.stack((w[:, :, 0] + w[:, :, 1], w[:, :, 2]), 2),
    ]
    return tuple(
        torch.stack(pair, 3)
        for r in rows
        for pair in ((r[..., 0], r[..., 1] + r[..., 2]), (r[..., 0] + r[..., 1], r[..., 2]))
    )


def four(x: torch.Tensor, kernels: tuple[torch.Tensor, ...], bias: torch.Tensor) -> torch.Tensor:
    """x (B, h, w, I), bias (O,) -> (B, 2h, 2w, O)."""
    batch, h, w, _ = x.shape
    x = F.pad(x, (0, 0, 1, 1, 1, 1)).permute(0, 3, 1, 2)
    parts = [
        F.conv2d(x[:, :, p : p + h + 1, q : q + w + 1], kernels[2 * p + q], bias).permute(0, 2, 3, 1)
        for p in (0, 1)
        for q in (0, 1)
    ]
    y = torch.stack((torch.stack(parts[:2], 3), torch.stack(parts[2:], 3)), 2)  # (B, h, 2, w, 2, O)
    return y.view(batch, 2 * h, 2 * w, len(bias))


class Upsample(nn.Module):
    """conv(F.interpolate(x, scale_factor=2, mode="nearest")) with a 3x3 convolution, (B, I, h, w) -> (B, O, 2h, 2w).

    Float32 and wider take the nine kernels; half precisions the four, whose error is smaller there.
    """

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, 3, padding=1)
        self._folded: tuple | None = None

    def forward(self, x: torch.Tensor, norm: nn.LayerNorm | None = None) -> torch.Tensor:
        """With a norm over the channels: F.gelu(norm(conv(doubled x)))."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x = x.permute(0, 2, 3, 1)
        if dtype.itemsize < 4:
            y = four(x, self._kernels(four_kernels, dtype), self.conv.bias)
            y = y if norm is None else F.gelu(F.layer_norm(y, norm.weight.shape, norm.weight, norm.bias, norm.eps))
        else:
            y = nine(x, self._kernels(nine_kernels, dtype), self.conv.bias, norm)
        return y.permute(0, 3, 1, 2)  # channels-last memory

    def _kernels(self, fold, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The folded weight, kept until the weight changes; made anew where a gradient or a graph passes through."""
        weight = self.conv.weight
        differentiated = torch.is_grad_enabled() and weight.requires_grad
        if torch.compiler.is_compiling() or differentiated or weight.is_inference():
            return tuple(kernel.to(dtype) for kernel in fold(weight))
        key = fold, dtype, version(weight)
        if self._folded is None or self._folded[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._folded = key, tuple(kernel.to(dtype) for kernel in fold(weight))
        return self._folded[1]

    def _apply(self, *arguments, **settings):
        # Moves and casts swap a Parameter's memory: the next one may lie where the last one lay, with other values.
        super()._apply(*arguments, **settings)
        self._folded = None
        return self

    def train(self, mode: bool = True):
        self._folded = None  # what was written through `.data` meanwhile has no version
        return super().train(mode)

    def _load_from_state_dict(self, *arguments):
        self._folded = None  # as above, where tensors are assigned
        super()._load_from_state_dict(*arguments)
