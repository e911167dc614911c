"""The processes of a run: one alone, or many under torchrun, with the few agreements they need.

Every collective is made by every rank in the same order, whatever its batch. Inside a step TIMEOUT bounds how long a
rank waits for another; where one works at its own pace while the others wait (reading data before the first step,
writing a checkpoint) PATIENCE does, on a group of its own: a process that dies is noticed at once all the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import MeditokError
from ..models.files import pick_device

TIMEOUT = timedelta(seconds=float(os.environ.get("MEDITOK_DIST_TIMEOUT", "600")))
PATIENCE = timedelta(days=7)


class LostProcessError(MeditokError):
    """Another process of the run ended, or did not answer in time."""


@dataclass(frozen=True)
class World:
    """This process among `size` of them."""

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None  # of all ranks, over gloo, with PATIENCE; None for a process alone

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def largest(self, value: int) -> int:
        """The largest of the ranks' integers."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def sum(self, value: int) -> int:
        """The sum of the ranks' integers."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor)
        return int(tensor)

    def gather(self, values: list) -> list:
        """The lists of all ranks, picklable, one after the other; however long another rank takes to make its own."""
        if self.size == 1:
            return values
        lists: list[list] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, values, group=self.patient)
        return [value for each in lists for value in each]

    def wait(self) -> None:
        """Until every rank is here, however long its work takes."""
        if self.size > 1:
            dist.barrier(group=self.patient)


ALONE = World(0, 1, torch.device("cpu"))


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """The world torchrun describes in the environment, or this process alone; gloo on CPU, NCCL on CUDA.

    Errors as `pick_device`; of many processes each takes the CUDA device of its number, and LostProcessError where
    another one is gone.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = pick_device(device)
    if cuda := place.type == "cuda":
        index = os.environ.get("LOCAL_RANK", "0") if size > 1 else place.index or 0
        place = pick_device(f"cuda:{index}")
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield World(rank, size, place, dist.new_group(backend="gloo", timeout=PATIENCE))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise LostProcessError(
            f"rank {rank}: another process has ended, or not answered for {TIMEOUT.total_seconds():.0f} s; "
            "what it said tells why; the same command goes on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()
