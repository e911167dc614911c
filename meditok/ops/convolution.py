"""Convolutions of inference on a CPU, channels last, fused with what follows them.

depthwise_gelu(x, w, b, stride) == F.gelu(F.conv2d(x, w, b, stride, padding=1, groups=C))
upsample_differences(x) == the differences of the zero-padded map along h, along w, along both
upsample_gather(level, tall, wide, both, norm) == the four parts of every output pixel added up (nn/upsample.py), then
    F.gelu(F.layer_norm(it, (O,), *norm)) where a norm is given
with x (B, h, w, C), w (C, 1, 3, 3). Every image's result depends on that image alone, whatever the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meditok import native
from meditok.errors import DtypeError, ShapeError
from meditok.ops import _native, reference
from meditok.ops._library import library, refuse_second_derivative
from meditok.ops.linear import fused

# ---- schema and kernels ------------------------------------------------------------------------------------

library.define("depthwise_gelu(Tensor x, Tensor weight, Tensor bias, int stride=1) -> Tensor")
library.define("upsample_differences(Tensor x) -> (Tensor, Tensor, Tensor)")
library.define(
    "upsample_gather(Tensor level, Tensor tall, Tensor wide, Tensor both, Tensor? gain=None, Tensor? bias=None, "
    "float eps=0.) -> Tensor"
)


def _is_float32(*tensors: Tensor | None) -> bool:
    """Float32 alone has kernels; DtypeError for a mixture."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) > 1:
        raise DtypeError(f"tensors are {', '.join(sorted(map(str, dtypes)))}; one dtype is needed")
    return dtypes == {torch.float32}


def _depthwise_native(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    if not _is_float32(x, weight, bias):
        return reference.depthwise_gelu(x, weight, bias, stride)
    batch, height, width, channels = x.shape
    out = x.new_empty(batch, -(-height // stride), -(-width // stride), channels)
    taps = weight.reshape(channels, 9).t().contiguous()
    _native.depthwise(x.contiguous(), stride, taps, bias.contiguous(), out)
    return out


def _differences_native(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not _is_float32(x):
        return reference.upsample_differences(x)
    batch, h, w, channels = x.shape
    outs = [x.new_empty(batch, *size, channels) for size in ((h + 1, w), (h, w + 1), (h + 1, w + 1))]
    if x.numel() == 0:
        return tuple(out.zero_() for out in outs)
    _native.upsample_differences(x.contiguous(), *outs)
    return tuple(outs)


def _gather_native(
    level: Tensor,
    tall: Tensor,
    wide: Tensor,
    both: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    if not _is_float32(level, tall, wide, both, gain, bias):
        return reference.upsample_gather(level, tall, wide, both, gain, bias, eps)
    batch, h, w, channels = level.shape
    out = level.new_empty(batch, 2 * h, 2 * w, channels)
    kept = [t if t is None else t.contiguous() for t in (level, tall, wide, both, gain, bias)]
    _native.upsample_gather(*kept, eps, out)
    return out


for _name, _reference, _kernel in (
    ("depthwise_gelu", reference.depthwise_gelu, _depthwise_native),
    ("upsample_differences", reference.upsample_differences, _differences_native),
    ("upsample_gather", reference.upsample_gather, _gather_native),
):
    library.impl(_name, _reference, "CompositeExplicitAutograd")
    if native.backend == "native":
        library.impl(_name, _kernel, "CPU")

# ---- fake --------------------------------------------------------------------------------------------------


@torch.library.register_fake("meditok::depthwise_gelu", lib=library)
def _depthwise_fake(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    batch, height, width, channels = x.shape
    return x.new_empty(batch, (height + stride - 1) // stride, (width + stride - 1) // stride, channels)


@torch.library.register_fake("meditok::upsample_differences", lib=library)
def _differences_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, h, w, channels = x.shape
    return tuple(x.new_empty(batch, *size, channels) for size in ((h + 1, w), (h, w + 1), (h + 1, w + 1)))


@torch.library.register_fake("meditok::upsample_gather", lib=library)
def _gather_fake(level, tall, wide, both, gain=None, bias=None, eps=0.0) -> Tensor:
    batch, h, w, channels = level.shape
    return level.new_empty(batch, 2 * h, 2 * w, channels)


# ---- autograd: where a gradient is wanted the references run, so the ops themselves never see one ------------------

for _name in ("depthwise_gelu", "upsample_differences", "upsample_gather"):
    refuse_second_derivative(_name)

# ---- public ------------------------------------------------------------------------------------------------


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """x (B, h, w, C), weight (C, 1, 3, 3), bias (C,), stride 1 or 2 -> (B, ceil(h / stride), ceil(w / stride), C).

    Raises ShapeError, DtypeError. PyTorch's functions run where the kernels do not serve; see ops/linear.py.
    """
    if x.ndim != 4 or weight.shape != (x.shape[-1], 1, 3, 3) or stride not in (1, 2):
        raise ShapeError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)} and stride is {stride}; "
            "(B, h, w, C), (C, 1, 3, 3) and 1 or 2 are needed"
        )
    run = torch.ops.meditok.depthwise_gelu if fused(x, weight, bias) else reference.depthwise_gelu
    return run(x, weight, bias, stride)


def upsample_differences(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, h, w, C) -> tall (B, h + 1, w, C), wide (B, h, w + 1, C), both (B, h + 1, w + 1, C)."""
    return (torch.ops.meditok.upsample_differences if fused(x) else reference.upsample_differences)(x)


def upsample_gather(
    level: Tensor, tall: Tensor, wide: Tensor, both: Tensor, norm: tuple[Tensor, Tensor, float] | None = None
) -> Tensor:
    """level (B, h, w, O), tall (B, h + 1, w, 2O), wide (B, h, w + 1, 2O), both (B, h + 1, w + 1, 4O) -> (B, 2h, 2w, O).

    norm: gain (O,), bias (O,) and eps of the layer norm before the GELU. Raises ShapeError, DtypeError.
    """
    batch, h, w, width = level.shape
    shapes = (batch, h + 1, w, 2 * width), (batch, h, w + 1, 2 * width), (batch, h + 1, w + 1, 4 * width)
    if tuple(tuple(part.shape) for part in (tall, wide, both)) != shapes:
        found = ", ".join(str(tuple(part.shape)) for part in (tall, wide, both))
        raise ShapeError(f"level has shape {tuple(level.shape)} and its parts {found}; {shapes} are needed")
    gain, bias, eps = norm or (None, None, 0.0)
    kernel = fused(level, tall, wide, both, gain, bias)
    run = torch.ops.meditok.upsample_gather if kernel else reference.upsample_gather
    return run(level, tall, wide, both, gain, bias, eps)
