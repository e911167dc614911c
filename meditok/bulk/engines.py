"""Who makes the parts of a store: this process, the ranks of torchrun, or actors of Ray. The bytes are the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from ..errors import UsageError
from .folder import StoreFolder
from .plan import Plan, Shard
from .run import Listener, Part, Seconds, Work, run_shards

ENGINES = ("local", "torchrun", "ray")


@dataclass
class Recipe:
    """How to load the model of a run elsewhere."""

    model: str
    precision: str


class Engine(AbstractContextManager):
    """Makes parts in this process. Use as a context manager."""

    leads = True  # surveys the folder, speaks, and finishes the store
    neighbours = 1  # runs like this one on this machine

    def device(self, asked: str) -> str:
        """The device this process shall use where `asked` for on the command line."""
        return asked

    def make(
        self,
        shards: Sequence[Shard],
        work: Work,
        target: StoreFolder,
        listener: Listener,
        recipe: Recipe,
        on_error: str,
    ) -> Seconds:
        """Make these parts; each is there, with its record, or an error is raised."""
        return run_shards(shards, work, lambda shard: Part(target, shard, work), listener)

    def release(self, code: int) -> None:
        """Let others who wait for parts to make end with this exit code."""

    def __exit__(self, *_) -> None:
        pass


class Torchrun(Engine):
    """One of the processes that torchrun started: rank 0 surveys and finishes, parts are dealt out in turn."""

    def __init__(self):
        try:
            self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            self.local, self.neighbours = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        except (KeyError, ValueError):
            raise UsageError(
                "--engine torchrun: not started by torchrun; run torchrun --nproc-per-node N -m meditok tokenize ..."
            ) from None
        import torch.distributed as dist

        self._dist = dist
        # As long as a run may take: ranks wait for the slowest.
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        self.leads, self._released = self.rank == 0, self.rank != 0

    def device(self, asked: str) -> str:
        import torch

        usable = asked == "cuda" or (asked == "auto" and torch.cuda.is_available())
        return f"cuda:{self.local}" if usable else asked

    def make(self, shards, work, target, listener, recipe, on_error) -> Seconds:
        self._share((target.folder, [shard.index for shard in shards], 0))
        seconds = super().make(shards[:: self.world], work, target, listener, recipe, on_error)
        self._dist.barrier()
        return seconds

    def follow(self, plan: Plan, work: Work, target: StoreFolder, listener: Listener) -> int:
        """Make what rank 0 deals out to this rank; returns the exit code."""
        folder, indexes, code = self._share(None)
        if folder is None:
            return code
        target.folder = Path(folder)
        mine = [plan.shards[index] for index in indexes[self.rank :: self.world]]
        run_shards(mine, work, lambda shard: Part(target, shard, work), listener)
        self._dist.barrier()
        return 0

    def release(self, code: int) -> None:
        if not self._released:
            self._share((None, [], code))

    def _share(self, value):
        """The value that rank 0 gives."""
        self._released = True
        box = [value]
        self._dist.broadcast_object_list(box, src=0)
        return box[0]

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._dist.destroy_process_group()


def engine_of(name: str) -> Engine:
    """The engine of that name. UsageError: not started as it must be; MissingPartError: its package is missing."""
    if name == "torchrun":
        return Torchrun()
    if name == "ray":
        from .ray_engine import Ray

        return Ray()
    return Engine()
