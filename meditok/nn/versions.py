"""Telling whether weights have changed, for what is derived from them and kept.

PyTorch counts the writes to a tensor, but not those of a fused optimiser (torch.optim.AdamW(fused=True) leaves
`_version` as it was) nor those through `.data`, which other optimisers use. So the steps of whatever optimiser holds a
tensor are counted here as well.
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

_steps = WeakIdKeyDictionary()  # parameter -> optimiser steps it has been part of


def _count(optimizer: torch.optim.Optimizer, *_) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _steps[parameter] = _steps.get(parameter, 0) + 1


register_optimizer_step_post_hook(_count)


def version(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Differs from an earlier result once the tensor may hold other values. Unseen: writes through `.data` outside
    an optimiser. Inference tensors have no version."""
    return tensor.data_ptr(), tensor._version, _steps.get(tensor, 0)
