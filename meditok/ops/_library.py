"""What every op file shares: the torch library, the core's dtype codes, and the checks."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meditok.errors import DtypeError, ShapeError, TokenRangeError

library = torch.library.Library("meditok", "FRAGMENT")

METRICS = {"cosine": 0, "l2": 1}
FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}  # csrc/common/dtype.h
FLOAT_NAMES = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3}
INTEGER_NAMES = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32")


def kind_of(*arrays: Any) -> str:
    """ "torch", "numpy" or "cupy"; arrays of different kinds, or of none of them, are a TypeError. None is
    skipped."""
    kinds = {_kind(array) for array in arrays if array is not None}
    if len(kinds) != 1:
        raise TypeError(
            f"arrays of one kind are needed, but {' and '.join(sorted(kinds))} were given; convert one of them"
        )
    return kinds.pop()


def _kind(array: Any) -> str:
    if isinstance(array, Tensor):
        return "torch"
    if isinstance(array, np.ndarray):
        return "numpy"
    if type(array).__module__.partition(".")[0] == "cupy":
        return "cupy"
    raise TypeError(f"a torch, numpy or cupy array is needed, but a {type(array).__name__} was given")


def check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is not one of 'cosine', 'l2'")


def dtype_name(array: Any) -> str:
    """ "float32" for torch.float32 and for NumPy's float32 of either byte order."""
    return getattr(array.dtype, "name", None) or str(array.dtype).removeprefix("torch.")


def check_float(name: str, array: Any) -> None:
    if dtype_name(array) not in FLOAT_NAMES:
        raise DtypeError(f"{name} has dtype {array.dtype}; float32, float16, bfloat16 or float64 is needed")


def check_integer(name: str, array: Any) -> None:
    if dtype_name(array) not in INTEGER_NAMES:
        raise DtypeError(f"{name} have dtype {array.dtype}; an integer type is needed, int64 by custom")


def check_rank(name: str, array: Any, axes: str) -> None:
    """axes: the expected shape in words, e.g. "(N, G, C)"."""
    if array.ndim != axes.count(",") + 1:
        raise ShapeError(f"{name} has shape {tuple(array.shape)}; {axes} is needed")


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        named = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ShapeError(f"tensors on one device are needed, but {named} were given; move them together")


def check_writable(**state: Any) -> None:
    """State that an update may write: one element one place, no two arrays the same, no leaf that autograd watches."""
    places = set()
    for name, array in state.items():
        strides = array.stride() if isinstance(array, Tensor) else array.strides
        if any(size > 1 and stride == 0 for size, stride in zip(array.shape, strides, strict=True)):
            raise ValueError(f"{name} is expanded: several of its elements lie in one place; pass {name}.clone()")
        if isinstance(array, Tensor) and array.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient and cannot be updated in place; call under torch.no_grad()")
        if isinstance(array, Tensor) and not torch.compiler.is_compiling() and array.numel() > 0:
            if array.data_ptr() in places:
                raise ValueError(f"{name} shares its memory with another array of the update; pass {name}.clone()")
            places.add(array.data_ptr())


def checked_ids(ids: Any, codes: int, lowest: int = 0) -> Any:
    """The ids as int64: narrow types cannot be compared with a K they do not hold. Where values are checked, every id
    is in lowest..codes - 1, else TokenRangeError with smallest, largest, K, position and codebook."""
    ids = ids.to(torch.int64) if isinstance(ids, Tensor) else ids.astype(np.int64, copy=False)
    if not _values_are_checked(ids) or 0 in ids.shape:
        return ids
    low, high = int(ids.min()), int(ids.max())
    if low >= lowest and high < codes:
        return ids
    outside = (ids < lowest) | (ids >= codes)
    first = np.argwhere(outside.cpu().numpy() if isinstance(outside, Tensor) else _to_numpy(outside))[0]
    raise TokenRangeError(
        f"ids run from {low} to {high}, but the codebook has K = {codes} codes (0..{codes - 1}); "
        f"first wrong id at position {first[0]} of codebook {first[-1]}; take the codebook the ids were made with"
    )


def refuse_second_derivative(name: str) -> None:
    """Differentiating `name`, the backward of an op, raises: without a formula PyTorch warns and goes on with zeros."""

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"meditok::{name} has no derivative of its own; call backward without create_graph=True, "
            f"or use meditok.ops.reference, which autograd differentiates any number of times"
        )

    torch.library.register_autograd(f"meditok::{name}", refuse, lib=library)


def plain(array: np.ndarray) -> np.ndarray:
    """The array itself unless its byte order, alignment or strides are foreign: then a copy the kernels can read."""
    steps = all(stride % array.itemsize == 0 for stride in array.strides)
    return array if array.dtype.isnative and array.flags.aligned and steps else _native_copy(array)


def to_torch(array: np.ndarray) -> Tensor:
    """A copy."""
    return torch.from_numpy(_native_copy(array))


def _native_copy(array: np.ndarray) -> np.ndarray:
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _to_numpy(array: Any) -> np.ndarray:
    return array.get() if hasattr(array, "get") else np.asarray(array)


def _values_are_checked(ids: Any) -> bool:
    if sys.modules["meditok.ops"].checks == "never":
        return False
    if not isinstance(ids, Tensor):
        return True
    if torch.compiler.is_compiling() or type(ids) not in (Tensor, torch.nn.Parameter) or ids.is_meta:
        return False
    if torch._C._functorch.maybe_get_level(ids) >= 0:  # inside vmap: a batched tensor has no values to look at
        return False
    return not (ids.is_cuda and torch.cuda.is_current_stream_capturing())
