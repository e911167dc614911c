"""Training of small quantisers on one or several gloo processes; as a script, one process: RANK, WORLD, DIR."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from meditok.nn.quantizer import MultiCodebookQuantizer, VectorQuantizer

STEPS, ROWS = 50, 16  # rows are images of 5 tokens, over all processes
SCENARIOS = ("cosine", "l2", "accumulate", "empty")


def make(scenario: str, mode: str = "ema"):
    """Half of the codes lie opposite to all rows: they are never chosen until they are revived."""
    torch.manual_seed(0)
    settings = dict(codebook_update=mode, revive=True, window=10, decay=0.9)
    if scenario == "l2":
        quantizer = VectorQuantizer(12, 6, metric="l2", **settings)
    else:
        quantizer = MultiCodebookQuantizer(2, 12, 3, **settings)
    with torch.no_grad():
        codes = torch.rand(quantizer.codebook[:, :6].shape)
        quantizer.codebook.copy_(torch.cat([codes, -10 * codes], 1))
    quantizer.state.restart(quantizer.codebook, quantizer.metric)
    return quantizer


def batches():
    """The joined batches (ROWS, 5, 6): positive numbers around thirty places, more than there are codes."""
    generator = torch.Generator().manual_seed(1)
    places = 0.2 + torch.rand(30, 6, generator=generator)
    for _ in range(STEPS):
        chosen = torch.randint(30, (ROWS, 5), generator=generator)
        yield places[chosen] + 0.02 * torch.randn(ROWS, 5, 6, generator=generator)


def share(x: torch.Tensor, scenario: str, step: int, rank: int, world: int) -> list[torch.Tensor]:
    """Micro-batches of one process: its rows of the joined batch."""
    if scenario == "empty":  # the last process has no rows in even steps and no pass at all in odd ones
        if world > 1 and rank == world - 1:
            return [x[:0]] if step % 2 == 0 else []
        return list(x.chunk(max(1, world - 1))[rank : rank + 1])
    part = x.chunk(world)[rank]
    return list(part.split(3)) if scenario == "accumulate" else [part]


def train(scenario: str, rank: int = 0, world: int = 1, group=None):
    """50 EMA steps; the quantiser."""
    quantizer = make(scenario)
    for step, x in enumerate(batches()):
        for part in share(x, scenario, step, rank, world):
            quantizer(part)
        quantizer.update(group)
    return quantizer


def train_by_gradient(rank: int, world: int):
    """20 steps in gradient mode on averaged gradients, with revival."""
    quantizer = make("cosine", "gradient")
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5)
    for _, x in zip(range(20), batches(), strict=False):
        optimizer.zero_grad()
        quantizer(x.chunk(world)[rank]).loss.backward()
        dist.all_reduce(quantizer.codebook.grad)
        quantizer.codebook.grad /= world
        optimizer.step()
        quantizer.update()
    return quantizer


def result(quantizer) -> dict[str, torch.Tensor]:
    """Everything that must be equal on all processes."""
    return {name: value.detach().clone() for name, value in quantizer.state_dict().items() if "state.keys" not in name}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    pair = dist.new_group([0, 1])
    results = {(name, world): result(train(name, rank, world)) for name in SCENARIOS}
    results["gradient", world] = result(train_by_gradient(rank, world))
    if rank < 2:
        results |= {(name, 2): result(train(name, rank, 2, pair)) for name in SCENARIOS}
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
