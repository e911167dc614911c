"""What a model call accepts; every refusal is one line."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import DtypeError, NonFiniteError, ShapeError, TokenRangeError, TokenShapeError
from .config import PATCH

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


def as_images(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(B, 3, H, W) float32 on `device`; see Tokenizer.tokenize for what is refused."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, torch.Tensor):
        raise DtypeError(
            f"images: got {type(images).__name__}; give a float tensor (B, 3, H, W) in [-1, 1], "
            "or pass paths and MedicalImages to meditok.tokenize"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ShapeError(f"images: shape {tuple(images.shape)}; expected (B, 3, H, W)")
    height, width = images.shape[2:]
    if height % PATCH or width % PATCH or not height or not width:
        legal = tuple(max(PATCH, round(s / PATCH) * PATCH) for s in (height, width))
        raise ShapeError(
            f"images: {height} x {width} pixels; sides must be multiples of {PATCH} "
            f"(nearest: {legal[0]} x {legal[1]}), or let model.processor fit them"
        )
    if images.dtype == torch.uint8:
        return (images.to(device).float() / 127.5 - 1).contiguous()
    if not images.is_floating_point():
        raise DtypeError(f"images: dtype {images.dtype}; give floats in [-1, 1] or uint8 in 0..255")
    if not torch.compiler.is_compiling() and images.numel():
        _check_range(images)
    return images.to(device, torch.float32)


def _check_range(images: torch.Tensor) -> None:
    low, high = (float(v) for v in torch.aminmax(images))
    if not math.isfinite(low) or not math.isfinite(high):
        bad = int((~torch.isfinite(images)).sum())
        raise NonFiniteError(f"images: {bad} of {images.numel()} values are NaN or infinite; replace them first")
    if low < -1.0001 or high > 1.0001:
        raise DtypeError(
            f"images: values from {low:.6g} to {high:.6g}; expected [-1, 1] (uint8 tensors are read as 0..255)"
        )
    if low >= 0 and high > low:
        warnings.warn(
            f"images: values from {low:.3g} to {high:.3g}, none negative; expected [-1, 1], is this 0..1?",
            stacklevel=4,
        )


def is_described(tokens: Any) -> bool:
    """Whether these are Tokens: ids that know their model, grid and the geometry of each row."""
    from ..tokens import Tokens

    return isinstance(tokens, Tokens)


def as_ids(tokens: Any, model: Tokenizer) -> torch.Tensor:
    """(B, G, N) int64 on the model's device, of a tensor, an array or Tokens.

    TokenShapeError, TokenRangeError; CodebookMismatchError for Tokens made with another codebook.
    """
    if is_described(tokens):
        tokens.info.check_model(model, "tokens")
        tokens = tokens.ids
    if isinstance(tokens, np.ndarray):
        tokens = torch.from_numpy(tokens.astype(np.int64) if tokens.dtype.kind == "u" else np.ascontiguousarray(tokens))
    groups, codes = model.config.num_codebooks, model.config.codebook_size
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 3 or tokens.shape[1] != groups:
        shape = tuple(getattr(tokens, "shape", ())) or type(tokens).__name__
        raise TokenShapeError(f"tokens: {shape}; expected (B, {groups}, N), one row a codebook")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TokenRangeError(f"tokens: dtype {tokens.dtype}; ids are integers from 0 to {codes - 1}")
    tokens = tokens.to(model.device, torch.int64)
    if not torch.compiler.is_compiling() and tokens.numel():
        low, high = (int(v) for v in torch.aminmax(tokens))
        if low < 0 or high >= codes:
            where = tuple(int(i) for i in ((tokens < 0) | (tokens >= codes)).nonzero()[0])
            raise TokenRangeError(
                f"tokens: ids from {low} to {high}, first bad one at image {where[0]}, codebook "
                f"{where[1]}, position {where[2]}; ids run from 0 to {codes - 1} (K = {codes})"
            )
    return tokens


def square_grid(positions: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The (h, w) of `positions` tokens; TokenShapeError where it is neither given rightly nor a square."""
    if positions == 0:
        raise TokenShapeError("tokens: no positions; an image has at least one, (B, G, 0) was given")
    if grid is None:
        side = int(positions**0.5 + 0.5)  # not math.isqrt, which torch.compile cannot trace
        if side * side != positions:
            raise TokenShapeError(f"tokens: {positions} positions are no square; pass grid=(h, w)")
        return side, side
    if len(grid) != 2 or not all(isinstance(side, (int, np.integer)) and side > 0 for side in grid):
        raise TokenShapeError(f"tokens: grid {grid}; give two positive integers, (h, w)")
    if grid[0] * grid[1] != positions:
        raise TokenShapeError(
            f"tokens: {positions} positions do not fill grid {grid[0]} x {grid[1]}; give the grid they were made on"
        )
    return int(grid[0]), int(grid[1])
