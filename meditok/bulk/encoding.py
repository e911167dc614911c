"""Pictures through the model, in order, while others are read and written."""

from __future__ import annotations

import pickle
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import BadInputError, MeditokError
from ..tokens.schema import Description, id_dtype
from .reading import End, Item, Reader
from .workers import stream

if TYPE_CHECKING:
    from ..data import Source
    from ..models.tokenizer import Tokenizer
    from ..pipeline import Settings
    from ..tokens.keys import Namer

SMALL = 256 << 20  # bytes of weights up to which every worker may hold them


@dataclass
class Result:
    """One input file: its rows, or the error it failed with."""

    name: str  # path relative to the input it came with; for terminals and keyed hashes only
    path: str
    ids: list[np.ndarray] = field(default_factory=list)  # (G, N) each
    rows: list[Description] = field(default_factory=list)
    error: MeditokError | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class _Chunk:
    """Pictures that go through the model together."""

    pixels: list[torch.Tensor] = field(default_factory=list)
    ids: Future | None = None


def alone(model: Tokenizer, settings: Settings) -> bool:
    """Whether every picture is computed alone, by one thread, so that its ids depend on no other picture."""
    return settings.stable and model.device.type == "cpu"


def can_travel(model: Tokenizer, settings: Settings) -> bool:
    """Whether workers may hold the model themselves: its results do not depend on them, and it is small."""
    return alone(model, settings) and sum(p.nbytes for p in model.parameters()) <= SMALL


class Carried:
    """The model as worker processes have it, a copy of their own: gives items ids in place of their pixels.

    In threads of one process, Python's lock costs a small model a third of its speed, and pictures passed between
    processes cost as much again.
    """

    def __init__(self, model: Tokenizer):
        self._pickled, self._model = pickle.dumps(model), None

    def __call__(self, item: Item) -> Item:
        if self._model is None:
            self._model, self._pickled = pickle.loads(self._pickled), b""
        if item.pixels is not None:
            started = time.perf_counter()
            item.ids = _ids(self._model, [item.pixels], stable=True)[0]
            item.pixels, item.seconds = None, time.perf_counter() - started
        return item


def _ids(model: Tokenizer, pixels: list[torch.Tensor], *, stable: bool) -> np.ndarray:
    """(B, G, N) as token files hold them."""
    found = model.tokenize(torch.stack(pixels), stable=stable).cpu().numpy()
    return found.astype(id_dtype(model.config.codebook_size))


class Encoder:
    """Runs the model in threads of its own, so that reading and writing go on meanwhile.

    Pictures that are computed `alone` go through it one a thread, as many at a time as torch has threads, and no
    thread waits for another within one. Otherwise batches of `settings.batch_size` run one after the other. Use as a
    context manager.
    """

    def __init__(self, model: Tokenizer, settings: Settings):
        self.model, self.settings = model, settings
        single = alone(model, settings)
        self._before = torch.get_num_threads()
        self.threads = self._before if single else 1
        self._size = 1 if single else settings.batch_size
        within = 1 if single else self._before
        self._pool = ThreadPoolExecutor(self.threads, "model", torch.set_num_threads, (within,))
        self.seconds = 0.0  # that threads and workers spent in the model
        self._lock = threading.Lock()

    def carried(self, workers: int) -> Carried | None:
        """What so many workers do with the pictures they read: the model, where there is one for every thread."""
        if workers >= self.threads and can_travel(self.model, self.settings):
            return Carried(self.model)
        return None

    def results(self, items: Iterator[Item], sources: int) -> Iterator[Result | End]:
        """Take the items of so many sources; yield one Result for each of their files, and each source's End.

        A failing file yields its error at once and no row; the others come out when their source (a file, or a
        series of files) is done. Memory: a few batches of pictures, and the tokens of one source.
        """
        results: dict[str, Result] = {}
        for item in self._tokenized(self._of(items, sources)):
            if item.end is not None:
                for name, path in item.end.files:
                    if name not in results:
                        error = BadInputError(f"{path}: holds no picture of the --frame asked for")
                        yield Result(name, path, error=error)
                yield from (result for result in results.values() if result.error is None)
                yield item.end
                results = {}
                continue
            result = results.setdefault(item.name, Result(item.name, item.path))
            if result.error is not None:
                continue
            result.warnings += [warning for warning in item.warnings if warning not in result.warnings]
            if item.error is not None:
                yield replace(result, error=item.error, ids=[], rows=[])
                result.error = item.error
            else:
                result.ids.append(item.ids)
                result.rows.append(item.row)

    def _of(self, items: Iterator[Item], sources: int) -> Iterator[Item]:
        while sources:
            item = next(items)
            sources -= item.end is not None
            yield item

    def _tokenized(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items in order, those with pixels given ids instead."""
        waiting: deque[tuple[Item, _Chunk | None, int]] = deque()
        chunk, running = _Chunk(), deque()
        for item in items:
            if item.pixels is None:
                self._spent(item.seconds)
                waiting.append((item, None, 0))
            else:
                waiting.append((item, chunk, len(chunk.pixels)))
                chunk.pixels.append(item.pixels)
                item.pixels = None  # the chunk's alone from here on
            if len(chunk.pixels) == self._size:
                running.append(self._submit(chunk))
                chunk = _Chunk()
            while running and running[0].done():
                running.popleft()
            if len(running) > 2 * self.threads:
                running.popleft().result()
            while waiting and _ready(waiting[0][1]):
                yield _taken(*waiting.popleft())
        if chunk.pixels:
            self._submit(chunk)
        while waiting:
            yield _taken(*waiting.popleft())

    def _submit(self, chunk: _Chunk) -> Future:
        chunk.ids = self._pool.submit(self._run, chunk.pixels)
        return chunk.ids

    def _run(self, pixels: list[torch.Tensor]) -> np.ndarray:
        started = time.perf_counter()
        found = _ids(self.model, pixels, stable=self.settings.stable)
        pixels.clear()
        self._spent(time.perf_counter() - started)
        return found

    def _spent(self, seconds: float) -> None:
        with self._lock:
            self.seconds += seconds

    def __enter__(self) -> Encoder:
        if self.threads > 1:
            torch.set_num_threads(1)  # reading shares the cores with those threads
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)  # its threads have set it for those that start later


def _ready(chunk: _Chunk | None) -> bool:
    return chunk is None or (chunk.ids is not None and chunk.ids.done())


def _taken(item: Item, chunk: _Chunk | None, place: int) -> Item:
    if chunk is not None:
        item.ids = chunk.ids.result()[place]
    return item


def encode(sources: Sequence[Source], model: Tokenizer, settings: Settings, namer: Namer) -> Iterator[Result]:
    """One Result for each file of the sources, in order, all in this process; see Encoder.results."""
    reader = Reader(settings.size_for(model), settings.fit, settings.columns, namer)
    with Encoder(model, settings) as encoder, closing(stream(reader, sources, 0)) as items:
        for result in encoder.results(items, len(sources)):
            if isinstance(result, Result):
                yield result
