"""Shards through reading, model and writing on this machine: what every engine does with its share of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import MeditokError
from ..tokens.format import TokenWriter
from ..tokens.schema import Description, TokenInfo
from ..tokens.store import file_digest, part_name
from .encoding import Encoder, Result
from .folder import Record, StoreFolder
from .plan import Shard, digest_of
from .reading import PATCH, End, Reader
from .workers import stream

if TYPE_CHECKING:
    from ..models.tokenizer import Tokenizer
    from ..pipeline import Settings
    from ..tokens.keys import Namer

QUEUED = 8  # writes that may wait


class Listener(Protocol):
    """Who is told what happens."""

    def file(self, result: Result) -> None:
        """One input file is done; raises its error where failures end the run."""

    def pictures(self, count: int) -> None:
        """So many more pictures have been through the model."""


@dataclass
class Seconds:
    """Where the time of a run went. Reading and the model run in several processes and threads, which are added up."""

    wall: float = 0.0
    decode: float = 0.0
    model: float = 0.0
    write: float = 0.0
    workers: int = 0  # that decode, and run a small model; 0: in this process
    threads: int = 1  # that run the model


@dataclass
class Summary:
    """What became of the files of a shard."""

    rows: int = 0
    ok: int = 0
    failures: list[dict] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    stamps: list[str] = field(default_factory=list)


@dataclass
class Work:
    """What every shard of a run is made with."""

    model: Tokenizer
    settings: Settings
    namer: Namer
    workers: int = 0

    @property
    def info(self) -> TokenInfo:
        """Header of the tokens this makes."""
        side = self.settings.size_for(self.model) // PATCH
        return TokenInfo.of(self.model, (side, side), stable=self.settings.stable)


class Sink(Protocol):
    """Where the rows of a shard go."""

    def write(self, ids: np.ndarray, rows: Sequence[Description]) -> None: ...

    def finish(self, summary: Summary) -> None: ...

    def abort(self) -> None: ...


class Part:
    """A part of a store as a Sink."""

    def __init__(self, folder: StoreFolder, shard: Shard, work: Work):
        self.folder, self.namer = folder, work.namer
        self.writer = TokenWriter(folder.folder / part_name(shard.index), folder.info, work.settings.columns)
        self.write, self.abort = self.writer.write, self.writer.abort

    def finish(self, summary: Summary) -> None:
        self.writer.close()
        path = self.writer.path
        inputs, stamp = digest_of(summary.contents, self.namer), digest_of(summary.stamps, self.namer)
        self.folder.save(
            Record(
                path.name,
                summary.rows,
                path.stat().st_size,
                file_digest(path),
                summary.ok,
                inputs,
                stamp,
                summary.failures,
            )
        )


def run_shards(shards: Sequence[Shard], work: Work, open_sink: Callable[[Shard], Sink], listener: Listener) -> Seconds:
    """Tokenise shards, one after the other, each into a sink of its own; those finished before an error stay finished.

    WorkerError, OSError, and whatever the listener raises.
    """
    settings = work.settings
    reader = Reader(settings.size_for(work.model), settings.fit, settings.columns, work.namer, hashing=True)
    sources = [source for shard in shards for source in shard.sources]
    pictures = [count for shard in shards for count in shard.pictures]
    started, seconds = time.perf_counter(), Seconds(workers=work.workers)
    with (
        Encoder(work.model, settings) as encoder,
        closing(stream(reader, sources, work.workers, pictures, encoder.carried(work.workers))) as items,
        _Behind() as behind,
    ):
        for shard in shards:
            sink, summary = open_sink(shard), Summary()
            try:
                for result in encoder.results(items, len(shard.sources)):
                    if isinstance(result, End):
                        summary.contents.append(result.contents)
                        summary.stamps.append(result.stamp)
                        seconds.decode += result.seconds
                        continue
                    listener.file(result)
                    if result.error is not None:
                        summary.failures.append(failure_record(result.name, result.error, work.namer))
                        continue
                    summary.ok += 1
                    summary.rows += len(result.rows)
                    if result.rows:
                        behind.do(sink, sink.write, np.stack(result.ids), result.rows)
                    listener.pictures(len(result.rows))
                behind.do(sink, sink.finish, summary)
            except BaseException:
                behind.stop()
                sink.abort()
                raise
        behind.wait()
    seconds.model, seconds.write, seconds.threads = encoder.seconds, behind.seconds, encoder.threads
    seconds.wall = time.perf_counter() - started
    return seconds


class _Behind:
    """Calls of sinks, in order, in a thread; a few may wait. After an error its sink is aborted and no call is made;
    the next `do` or `wait` raises it.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, "writer")
        self._waiting: deque[Future] = deque()
        self._failed = False
        self.seconds = 0.0

    def do(self, sink: Sink, call: Callable, *arguments) -> None:
        self._waiting.append(self._pool.submit(self._call, sink, call, *arguments))
        while len(self._waiting) > QUEUED or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def _call(self, sink: Sink, call: Callable, *arguments) -> None:
        started = time.perf_counter()
        if self._failed:
            return
        try:
            call(*arguments)
        except BaseException:
            self._failed = True  # a part that lacks rows shall never be finished
            sink.abort()
            raise
        self.seconds += time.perf_counter() - started

    def wait(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()

    def stop(self) -> None:
        """Let what waits be done, so that finished parts are kept, and tell of no error."""
        self._pool.shutdown()
        self._waiting.clear()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()


def failure_record(name: str, error: MeditokError, namer: Namer, *, names: bool = False) -> dict:
    """A failure for a file: keyed hash and kind of error, name and message only where names may be told."""
    record = {
        "source": namer.name(name),
        "error": type(error).__name__,
        "exit_code": error.exit_code,
        "meaning": (type(error).__doc__ or "").split("\n")[0],
    }
    return record | ({"name": name, "message": str(error)} if names or namer.keep_names else {})
