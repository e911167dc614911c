"""Optimiser groups, the learning-rate schedule and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .sharding import local

NO_DECAY = ("norm_scale", "bn", "ln", "bias", "logit_scale")  # parts of names, as published


def parameter_groups(
    module: nn.Module, weight_decay: float, slow: Sequence[tuple[Iterable[nn.Parameter], float]] = ()
) -> list[dict]:
    """Trained parameters in groups; vectors, scalars and the names above do not decay, codebooks do. Sharded ones are
    in groups of their own, since one update cannot mix them with others, and so are those of `slow`: each of its pairs
    is parameters, which do not decay, and the share of the rate they learn at; shares of one parameter multiply."""
    shares: dict[int, float] = {}
    for parameters, share in slow:
        for parameter in parameters:
            shares[id(parameter)] = shares.get(id(parameter), 1.0) * share
    groups: dict[tuple[bool, bool, float], list] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not any(part in name for part in NO_DECAY)
            share = shares.get(id(parameter), 1.0)
            key = isinstance(parameter, DTensor), not decays or id(parameter) in shares, share
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else weight_decay, "share": key[2]}
        for key in sorted(groups)
    ]


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, final: float) -> float:
    """Linear from 0 over `warmup` steps, then a cosine to `final` x peak at the last one.

    Published: factor = final + (1 - final) (0.5 + 0.5 cos(pi p)), p = (step - warmup) / (steps - warmup - 1).
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup - 1)
    return peak * (final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def average_(average: dict[str, torch.Tensor], module: nn.Module, decay: float, step: int) -> None:
    """Exponential average of every float entry of the state dict in place; the others are copied.

    The decay grows as (1 + step) / (10 + step) until it reaches `decay`, so that the start is forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for name, value in module.state_dict().items():
        mean, value = local(average[name]), local(value)
        if value.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)
