"""CuPy arrays in the torch ops: read and written in place, on CuPy's current stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meditok.errors import ShapeError


def on_torch(op: Callable, *arguments: Any, **settings: Any) -> Any:
    """op(*arguments, **settings) of a torch op, its CuPy arguments (and None, and numbers) seen as tensors.

    Both libraries look at the same memory, through `__cuda_array_interface__`, in both directions; only arrays with
    negative strides, which torch has not, are copied. The op runs on the device of the arrays and on the stream that
    is CuPy's current one, so it is ordered with CuPy's own work; torch's own current stream is left as it was.
    """
    import cupy

    devices = {argument.device.id for argument in arguments if isinstance(argument, cupy.ndarray)}
    if len(devices) != 1:
        raise ShapeError(
            f"arrays on one device are needed, but those given are on {sorted(devices)}; move them together"
        )
    device = devices.pop()
    with cupy.cuda.Device(device):
        stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr, device=device)
        with torch.cuda.stream(stream):
            tensors = [
                torch.as_tensor(forward_strides(argument)) if isinstance(argument, cupy.ndarray) else argument
                for argument in arguments
            ]
            result = op(*tensors, **settings)
            if isinstance(result, tuple):
                return tuple(cupy.asarray(tensor.detach()) for tensor in result)
            return cupy.asarray(result.detach()) if isinstance(result, Tensor) else result


def forward_strides(array: Any) -> Any:
    """The array itself, or a copy where a stride is negative."""
    import cupy

    return cupy.ascontiguousarray(array) if any(stride < 0 for stride in array.strides) else array
