"""Pictures through the model, in order, while others are read and written."""

from __future__ import annotations

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


class Encoder:
    """Runs the model in threads of its own, so that reading and writing go on meanwhile.

    In stable mode on a CPU every picture is computed alone, by one thread, and as many at a time as torch has
    threads: its ids depend on no other picture, and no thread waits for another within it. Otherwise batches of
    `settings.batch_size` run one after the other. Use as a context manager.
    """

    def __init__(self, model: Tokenizer, settings: Settings):
        self.model, self.settings = model, settings
        alone = settings.stable and model.device.type == "cpu"
        self._before = torch.get_num_threads()
        self.threads = self._before if alone else 1
        self._size = 1 if alone else settings.batch_size
        within = 1 if alone else self._before
        self._pool = ThreadPoolExecutor(self.threads, "model", torch.set_num_threads, (within,))
        self.seconds = 0.0  # that threads spent in the model
        self._lock = threading.Lock()

    def results(self, items: Iterator[Item], sources: int) -> Iterator[Result | End]:
        """Take the items of so many sources; yield one Result for each of their files, and each source's End.

        A failing file yields its error at once and no row; the others come out when their source (a file, or a
        series of files) is done. Memory: a few batches of pictures, and the tokens of one source.
        """
        results: dict[str, Result] = {}
        for item, ids in self._tokenized(self._of(items, sources)):
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
                result.ids.append(ids)
                result.rows.append(item.row)

    def _of(self, items: Iterator[Item], sources: int) -> Iterator[Item]:
        while sources:
            item = next(items)
            sources -= item.end is not None
            yield item

    def _tokenized(self, items: Iterable[Item]) -> Iterator[tuple[Item, np.ndarray | None]]:
        """Pairs (item, ids (G, N) or None), in order."""
        waiting: deque[tuple[Item, _Chunk | None, int]] = deque()
        chunk, running = _Chunk(), deque()
        for item in items:
            if item.pixels is None:
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
        found = self.model.tokenize(torch.stack(pixels), stable=self.settings.stable).cpu().numpy()
        pixels.clear()
        with self._lock:
            self.seconds += time.perf_counter() - started
        return found.astype(id_dtype(self.model.config.codebook_size))

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)  # its threads have set it for those that start later


def _ready(chunk: _Chunk | None) -> bool:
    return chunk is None or (chunk.ids is not None and chunk.ids.done())


def _taken(item: Item, chunk: _Chunk | None, place: int) -> tuple[Item, np.ndarray | None]:
    return item, None if chunk is None else chunk.ids.result()[place]


def encode(
    sources: Sequence[Source], model: Tokenizer, settings: Settings, namer: Namer, workers: int = 0
) -> Iterator[Result]:
    """One Result for each file of the sources, in order; see Encoder.results."""
    reader = Reader(settings.size_for(model), settings.fit, settings.columns, namer)
    with Encoder(model, settings) as encoder, closing(stream(reader, sources, workers)) as items:
        for result in encoder.results(items, len(sources)):
            if isinstance(result, Result):
                yield result
