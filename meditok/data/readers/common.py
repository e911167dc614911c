"""What all readers share: non-finite values, the choice of the window, and the step from values to pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from meditok.data.options import ReadOptions
from meditok.data.windows import CT_WINDOWS, ValueStatistics, Window, parse_window
from meditok.errors import IntensityError, NonFiniteError


def replace_nonfinite(
    values: np.ndarray, policy: str, where: str, minimum: float | None = None
) -> tuple[np.ndarray, list[str]]:
    """Values without NaN or infinity, and the step taken; NonFiniteError with the count under "error"."""
    if values.dtype.kind != "f":
        return values, []
    finite = np.isfinite(values)
    bad = int(values.size - np.count_nonzero(finite))
    if bad == 0:
        return values, []
    if policy == "error":
        raise NonFiniteError(
            f"{where}: {bad} of {values.size} values are NaN or infinite; repair the file or pass --nonfinite zero|min"
        )
    if policy == "min":
        if minimum is None or not np.isfinite(minimum):
            if bad == values.size:
                raise NonFiniteError(
                    f"{where}: all {bad} values are NaN or infinite, with no minimum to take; give another file"
                )
            minimum = float(values[finite].min())
        fill = minimum
    else:
        fill = 0.0
    return np.where(finite, values, values.dtype.type(fill)), [f"nonfinite {policy}: {bad} values set to {fill:g}"]


def choose_window(
    options: ReadOptions,
    where: str,
    *,
    ct: bool,
    auto: Callable[[], Window],
    full: Callable[[], Window],
    statistics: Callable[[], ValueStatistics],
    file: Callable[[], Window] | None = None,
) -> Window:
    """The window asked for, under the rules of CONTRACTS.md section 5.

    `auto`, `full`, `file` and `statistics` are called only when needed. With options.mixed, a named CT
    window leaves pictures of other modalities to their own rule; for a single one it is an IntensityError.
    """
    request = parse_window(options.window)
    if request.kind == "named" and not ct:
        if not options.mixed:
            raise IntensityError(
                f"{where}: window {request.name!r} is in Hounsfield units and this is not CT; "
                "use auto, percentile or LOW:HIGH"
            )
        return auto()
    if request.kind in ("named", "range"):
        return Window(request.low, request.high, request.name)
    if request.kind == "percentile":
        return statistics().window(request.low, request.high)
    if request.kind == "file":
        if file is None:
            raise IntensityError(f"{where}: holds no window of its own; use another --window than file")
        return file()
    if request.kind == "full":
        return Window(*CT_WINDOWS["full"], "full") if ct else full()
    return Window(*CT_WINDOWS["default"], "default") if ct else auto()


def windowed(values: np.ndarray, window: Window) -> torch.Tensor:
    """Stored values (H, W) or (H, W, 3) -> contiguous float32 (3, H, W) in [-1, 1]."""
    if values.ndim == 3:  # turned while they are small
        return torch.from_numpy(window.apply(np.ascontiguousarray(values.transpose(2, 0, 1))))
    return to_tensor(window.apply(values))


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """float32 (H, W) or (H, W, 3) -> contiguous (3, H, W)."""
    if pixels.ndim == 2:
        return torch.from_numpy(np.ascontiguousarray(pixels)).expand(3, *pixels.shape).contiguous()
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
