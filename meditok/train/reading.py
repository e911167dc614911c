"""Processes that read: where they come from, how they end, and what becomes of their errors."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import DataLoader, Dataset

from ..errors import MeditokError
from .config import TrainConfig
from .distributed import World
from .signals import leave_to_parent


def each(ask: Callable, things: Sequence, config: TrainConfig, world: World) -> list:
    """What `ask` says of every thing, on every process: each asks about a part of them, in its processes that read."""
    mine = _Asked(ask, things[world.rank :: world.size])
    with contextlib.closing(through(DataLoader(mine, 16, collate_fn=list, **settings(config)))) as parts:
        answers = [answer for part in parts for answer in part]
    whole: list = [None] * len(things)
    for rank, part in enumerate(world.gather([answers])):
        whole[rank :: world.size] = part
    return whole


def through(loader: DataLoader) -> Iterator:
    """What a loader gives. Its workers end with this iterator: they leave signals to this process, which would wait
    for them at its own end. An error that one of them met is raised as it is."""
    iterator = iter(loader)
    try:
        for given in iterator:
            if isinstance(given, MeditokError):
                raise given
            yield given
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()


class _Asked(Dataset):
    def __init__(self, ask: Callable, things: Sequence):
        self.ask, self.things = ask, things

    def __len__(self) -> int:
        return len(self.things)

    def __getitem__(self, index: int):
        return self.ask(self.things[index])


def settings(config: TrainConfig) -> dict:
    """The DataLoader's settings for processes that read."""
    context = _workers() if config.workers else None
    return {"num_workers": config.workers, "multiprocessing_context": context, "worker_init_fn": leave_to_parent}


def _workers() -> multiprocessing.context.BaseContext:
    """Workers forked from a server that has the module of the data and no CUDA context, threads or model of ours."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["meditok.train.data"])
    return context
