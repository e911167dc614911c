"""Symmetric InfoNCE between image features and a teacher's, over all ranks (Radford et al. 2021, arXiv 2103.00020).

Rows with equal captions are true pairs of each other, so counting them as negatives would push right answers apart.
Here they are left out of each other's denominator (Huynh et al. 2022, arXiv 2011.11765, "false negative elimination"):
the positive stays the row's own pair, and a batch of one caption alone has loss 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from . import wide

MAX_LOG_SCALE = math.log(100)
NO_KEY = -1


def info_nce(
    images: torch.Tensor,
    targets: torch.Tensor,
    log_scale: torch.Tensor,
    same: torch.Tensor | None = None,
) -> torch.Tensor:
    """(): mean of the cross-entropies of s u_i.t_j over j and of s t_i.u_j over j with label i, halves averaged.

    images, targets (B, D): u and t before normalisation; log_scale (): ln s, learnt; same (B,) int64: rows with equal
    keys are no negatives of each other, NO_KEY equals nothing. In a process group every rank, with the same B, scores
    its own rows against all; the mean over ranks of the losses, and of their gradients as DistributedDataParallel takes
    it, is the loss of the joined batch. Evaluated in float32 or better.
    """
    with torch.autocast(images.device.type, enabled=False):
        u, t = (F.normalize(wide(x), dim=-1) for x in (images, targets))
        all_u, all_t = gather(torch.cat([u, t], dim=1)).split(u.shape[1], dim=1)
        scale = wide(log_scale).exp()
        first = rank() * len(u)
        labels = torch.arange(first, first + len(u), device=u.device)
        hidden = None
        if same is not None:
            hidden = (same.unsqueeze(1) == gather(same)) & (same != NO_KEY).unsqueeze(1)  # (B, ranks * B)
            hidden = hidden.scatter(1, labels.unsqueeze(1), False)
        halves = []
        for rows, columns in ((u, all_t), (t, all_u)):
            logits = scale * rows @ columns.T
            halves.append(F.cross_entropy(logits if hidden is None else logits.masked_fill(hidden, -torch.inf), labels))
    return (halves[0] + halves[1]) / 2


def retrieval_accuracy(images: torch.Tensor, targets: torch.Tensor, same: torch.Tensor | None = None) -> torch.Tensor:
    """(): share of images (B, D) whose nearest target of this rank's batch is their own or one with an equal key."""
    best = (F.normalize(wide(images), dim=-1) @ F.normalize(wide(targets), dim=-1).T).argmax(1)
    found = best == torch.arange(len(best), device=best.device)
    if same is not None:
        found |= (same[best] == same) & (same != NO_KEY)
    return found.float().mean()


def caption_keys(captions: Sequence[str]) -> torch.Tensor:
    """(B,) int64: equal for captions that differ in case and white space only; the same in every process.

    Empty captions are keyed like any other.
    """
    words = (" ".join(caption.casefold().split()).encode() for caption in captions)
    keys = [int.from_bytes(hashlib.blake2b(w, digest_size=8).digest(), "little") >> 1 for w in words]
    return torch.tensor(keys, dtype=torch.int64)


@torch.no_grad()
def clamp_log_scale_(log_scale: torch.Tensor) -> None:
    """Keep s = exp(log_scale) between 1 and 100; call it after every optimiser step."""
    log_scale.clamp_(0, MAX_LOG_SCALE)


def rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """Concatenation over ranks; a rank's gradient is the sum of what all ranks ask of its rows."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: torch.Tensor) -> torch.Tensor:
    """x (B, ...) of every rank in rank order, (ranks * B, ...), with gradient; x itself where there is one process."""
    return _Gather.apply(x) if _distributed() else x
