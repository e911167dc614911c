"""Arithmetic a part of the model runs in."""

from __future__ import annotations

import contextlib

import torch

from ..errors import MissingPartError
from ..nn.int8 import int8_layers

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "int8")
LATER = ("fp8",)  # a name that is taken, and not computed in yet
INT8_ENGINES = ("x86", "onednn", "fbgemm")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device) -> str:
    """The precision, or MissingPartError where this device or version cannot compute in it."""
    reason = None
    if precision in LATER:
        reason = "not available in this version"
    elif precision not in PRECISIONS:
        reason = "unknown"
    elif precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        reason = f"not available on {device.type}; it needs an NVIDIA GPU of compute capability 8.0"
    elif precision == "fp16" and device.type == "cpu":
        reason = "not available on cpu; use fp32 or bf16"
    elif precision == "int8" and (device.type != "cpu" or torch.backends.quantized.engine not in INT8_ENGINES):
        reason = "not available here; it needs an x86 CPU"
    if reason:
        raise MissingPartError(f"precision {precision!r}: {reason}; choose one of {', '.join(PRECISIONS)}")
    return precision


@contextlib.contextmanager
def _tf32(allowed: bool):
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def precision_scope(device: torch.device, precision: str):
    """Context in which fp32 means float32 without TF32, half precisions autocast, and int8 is that of linear layers."""
    if precision in _AUTOCAST:
        return torch.autocast(device.type, dtype=_AUTOCAST[precision])
    if precision == "int8":
        return int8_layers()
    if device.type == "cuda" and not torch.compiler.is_compiling():
        stack = contextlib.ExitStack()
        stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(_tf32(precision == "tf32"))
        return stack
    return torch.autocast(device.type, enabled=False)
