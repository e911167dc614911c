"""Run by test_contrastive.py: the losses on every rank of gloo groups of 2 and 4 processes, written to a file.

A script of its own, since processes forked from it before any computation start at once and share its imports.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from meditok.objectives.adversarial import adaptive_weight
from meditok.objectives.contrastive import info_nce

ROWS = 4  # a rank


def inputs(world: int) -> dict[str, torch.Tensor]:
    """The joined batch of a world, float64; keys repeat within and across ranks."""
    g = torch.Generator().manual_seed(world)
    rows = world * ROWS
    return {
        "images": torch.randn(rows, 6, generator=g, dtype=torch.float64),
        "targets": torch.randn(rows, 6, generator=g, dtype=torch.float64),
        "log_scale": torch.tensor(2.0, dtype=torch.float64),
        "same": torch.arange(rows) % 5 - 1,
        "last": torch.randn(6, 6, generator=g, dtype=torch.float64),
    }


def losses(images, targets, log_scale, same, last) -> dict[str, torch.Tensor]:
    """Values and gradients for some rows of the batch: what one rank works out."""
    leaves = [t.clone().requires_grad_() for t in (images, targets, log_scale)]
    found = {}
    for name, keys in (("plain", None), ("masked", same)):
        loss = info_nce(*leaves, keys)
        found[name] = loss.detach()
        for leaf, gradient in zip(("images", "targets", "log_scale"), torch.autograd.grad(loss, leaves), strict=True):
            found[f"{name}.{leaf}"] = gradient
    last = last.clone().requires_grad_()
    output = images @ last
    parts = [torch.autograd.grad(loss, output)[0] for loss in (output.square().mean(), output.sigmoid().mean())]
    found["weight"] = adaptive_weight(output, *parts, last)
    return found


def _run(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    mine = {
        name: value[rows] if name in ("images", "targets", "same") else value for name, value in inputs(world).items()
    }
    torch.save(losses(**mine), folder / f"{world}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in (2, 4):
        mp.start_processes(_run, (world, Path(sys.argv[1])), nprocs=world, start_method="fork")
