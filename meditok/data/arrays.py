"""Arrays given as images: which ranks, channel counts, dtypes and ranges are taken, and as what.

(H, W), (H, W, 3|4), (3, H, W), each with an optional batch axis in front (B, H, W only as `layout="DHW"`).
uint8 is 0..255, uint16 its full range, floats must lie in [-1, 1].
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from meditok.data.windows import Window, apply_window
from meditok.errors import DtypeError, IntensityError, NonFiniteError, ShapeError

_HINT = "give (H, W), (H, W, 3), (3, H, W) or a batch of them; a stack of slices needs layout='DHW'"


def guess_layout(shape: tuple[int, ...], layout: str | None, where: str = "array") -> str:
    """The layout of an array of this shape: HW, HWC, CHW, DHW, BHWC or BCHW; ShapeError otherwise."""
    if any(n == 0 for n in shape[-2:]):
        raise ShapeError(f"{where}: shape {tuple(shape)} holds no pixels; {_HINT}")
    if layout is not None:
        channels = {"HWC": -1, "BHWC": -1, "CHW": -3, "BCHW": -3}.get(layout)
        if len(shape) != len(layout) or (channels is not None and shape[channels] not in (3, 4)):
            raise ShapeError(f"{where}: shape {tuple(shape)} does not fit layout {layout!r}; {_HINT}")
        return layout
    if len(shape) == 2:
        return "HW"
    if len(shape) in (3, 4):
        last, first = shape[-1] in (3, 4), shape[-3] == 3
        if last and first:
            raise ShapeError(
                f"{where}: shape {tuple(shape)} could have its channels first or last; pass layout='HWC' or 'CHW'"
            )
        if last or first:
            return ("B" if len(shape) == 4 else "") + ("HWC" if last else "CHW")
        if len(shape) == 3 and shape[0] == 1:
            return "DHW"
    raise ShapeError(f"{where}: shape {tuple(shape)} is not an image or a batch of images; {_HINT}")


def to_pixels(array, layout: str | None = None, where: str = "array") -> list[torch.Tensor]:
    """A list of float32 (3, H, W) tensors in [-1, 1] from a numpy array, torch tensor or anything array-like.

    Raises ShapeError, DtypeError (dtype or range, with the values seen), NonFiniteError (with the count).
    """
    array = as_numpy(array)
    layout = guess_layout(array.shape, layout, where)
    if array.shape[0] == 0:
        return []
    values = apply_window(array, range_of_array(array, where))
    if layout in ("HW", "HWC", "CHW"):
        values, layout = values[None], "B" + layout
    if layout in ("DHW", "BHW"):
        planes = np.broadcast_to(values[:, None], (len(values), 3, *values.shape[1:]))
    else:
        planes = values.transpose(0, 3, 1, 2) if layout == "BHWC" else values
        if planes.shape[1] == 4:
            planes = flatten_alpha(planes, where)
    return [torch.from_numpy(np.ascontiguousarray(plane)) for plane in planes]


def as_numpy(array) -> np.ndarray:
    """A view of the array where there can be one; bfloat16, which NumPy lacks, becomes float32."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.to(torch.float32).numpy() if array.dtype == torch.bfloat16 else array.numpy()
    return np.asarray(array)


def range_of_array(array: np.ndarray, where: str = "array") -> Window:
    """The range an array's dtype stands for; DtypeError or NonFiniteError if it may not be an image."""
    if array.dtype == np.uint8:
        return Window(0.0, 255.0, "full")
    if array.dtype.newbyteorder("=") == np.uint16:
        return Window(0.0, 65535.0, "full")
    if array.dtype.kind != "f":
        seen = f", values {array.min()}..{array.max()}" if array.size and array.dtype.kind in "iub" else ""
        raise DtypeError(f"{where}: dtype {array.dtype}{seen}; give uint8, uint16 or floats in [-1, 1]")
    if array.size:
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise NonFiniteError(f"{where}: {bad} of {array.size} values are NaN or infinite; replace them first")
        low, high = float(array.min()), float(array.max())
        if low < -1 or high > 1:
            raise DtypeError(
                f"{where}: {array.dtype} values {low:g}..{high:g} are outside [-1, 1]; rescale them, "
                "or give uint8 "
                "(0..255) or uint16 (0..65535)"
            )
        if low >= 0 and high > 0.5:
            warnings.warn(
                f"{where}: float values {low:g}..{high:g} look like 0..1, where -1..1 is meant; "
                "use 2 * x - 1 if they are",
                stacklevel=3,
            )
    return Window(-1.0, 1.0, "full")


def flatten_alpha(planes: np.ndarray, where: str) -> np.ndarray:
    """(B, 4, H, W) in [-1, 1] with alpha last -> (B, 3, H, W) over black; IntensityError if nothing shows."""
    alpha = (planes[:, 3:] + 1) / 2
    if alpha.min() >= 1:
        return planes[:, :3]
    if alpha.max() <= 0:
        raise IntensityError(f"{where}: alpha is 0 everywhere, so nothing shows; drop the alpha channel first")
    warnings.warn(f"{where}: partly transparent, laid over black", stacklevel=3)
    return (planes[:, :3] + 1) * alpha - 1
