"""Linear layers in 8-bit integers on a CPU, by PyTorch's dynamic quantisation.

Weights are rounded once, to 127 steps of each output's largest, activations in every call, to 256 steps of their range;
the sums of products are exact.
"""

from __future__ import annotations

import contextlib
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

_depth = 0  # of scopes entered
# weight -> (its memory and version, the bias's version, what PyTorch packed of both): a quarter of the weight's size
_packed = WeakTensorKeyDictionary()


@contextlib.contextmanager
def int8_layers():
    """Context in which the linear layers of transformer blocks compute in 8 bits, where no gradient is wanted."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def active() -> bool:
    return _depth > 0 and not torch.is_grad_enabled()


def norm_linear(
    x: torch.Tensor,
    layer: nn.Linear,
    norms: list[nn.LayerNorm],
    gate: nn.Linear | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """As nn.linear.norm_linear: x (..., K) -> (..., N), with GeGLU where there is a gate."""
    for norm in norms:
        x = norm(x)
    y = _product(x, layer)
    if gate is not None:
        y = F.gelu(y, approximate="tanh").mul_(_product(x, gate))
    return y if residual is None else y.add_(residual)


def _product(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    weight, bias = layer.weight, layer.bias
    key = weight.data_ptr(), weight._version, None if bias is None else bias._version
    found = _packed.get(weight)
    if found is None or found[0] != key:
        steps = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors of integers, which PyTorch keeps for these very layers
            whole = torch.quantize_per_channel(
                weight.detach(), steps.double(), torch.zeros_like(steps, dtype=torch.int64), 0, torch.qint8
            )
        found = _packed[weight] = key, torch.ops.quantized.linear_prepack(whole, bias)
    return torch.ops.quantized.linear_dynamic(x.contiguous(), found[1])
