"""Arithmetic a part of the model runs in."""

from __future__ import annotations

import contextlib

import torch

from ..errors import MissingPartError

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
LATER = ("int8", "fp8")  # names that are taken, and not computed in yet
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
    """Context in which fp32 means float32 without TF32, and half precisions autocast."""
    if precision in _AUTOCAST:
        return torch.autocast(device.type, dtype=_AUTOCAST[precision])
    if device.type == "cuda" and not torch.compiler.is_compiling():
        stack = contextlib.ExitStack()
        stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(_tf32(precision == "tf32"))
        return stack
    return torch.autocast(device.type, enabled=False)
