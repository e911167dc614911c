"""Reading in worker processes, the results in the order of the tasks. Bounded memory; a dead worker is an error."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from ..errors import WorkerError

AHEAD = 16 << 20  # bytes of each worker's messages that wait to be taken; a worker that is further ahead stops
BUNDLE = 8  # pictures' worth of tasks sent at once: small files would otherwise wait for one another
MANY = 64  # tasks from which worker processes pay for their start
_ITEM, _WARNING, _FAILED, _DIED = range(4)
_DONE = b""  # the end of a task; all other messages are pickled pairs (kind, value)


def default_workers(tasks: int, *, share: float = 1, processes: int = 1) -> int:
    """Worker processes for so many tasks: none for a few, else that share of the cores of this machine.

    `processes` is how many runs share this machine.
    """
    if tasks < MANY:
        return 0
    return max(1, int(usable_cores() // processes * share))


def warm_up() -> None:
    """Start what starts workers, so that it imports what they need while this process does other things."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        _context()
        forkserver.ensure_running()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stream(
    function: Callable[[Any], Iterable],
    tasks: Sequence,
    workers: int,
    pictures: Sequence[int] | None = None,
    then: Callable[[Any], Any] | None = None,
) -> Iterator:
    """Every item of `function(task)` for every task, in order; `workers` 0 computes in this process.

    `function`, `then`, tasks (which have a `path`) and items must be picklable; `pictures` says how many each task
    holds, 1 unless told. Workers pass items through `then`, as long as there is a task for each of them; with fewer
    tasks than workers items come as they are, for this process to do it with the cores that are free.
    Close the generator to stop early. WorkerError: a worker died or failed; it names the task's path.
    """
    if workers == 0:
        for task in tasks:
            yield from function(task)
        return
    pool = _Pool(function, tasks, workers, pictures or [1] * len(tasks), then)
    try:
        yield from pool.items()
    finally:
        pool.close()


class _Messages:
    """Messages of one worker that wait to be taken, AHEAD bytes of them or a single one."""

    def __init__(self):
        self._waiting: deque[bytes] = deque()
        self._bytes, self._closed = 0, False
        self._changed = threading.Condition()

    def put(self, message: bytes) -> bool:
        """Wait for room; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._waiting or self._bytes < AHEAD)
            self._waiting.append(message)
            self._bytes += len(message)
            self._changed.notify_all()
            return not self._closed

    def take(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            message = self._waiting.popleft()
            self._bytes -= len(message)
            self._changed.notify_all()
            return message

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Pool:
    """The next bundle of tasks goes to the worker that is free first; results are taken bundle by bundle.

    Each worker has a thread here that sends it a bundle, waits for the end of it, and sends the next. A thread whose
    messages nobody takes stops receiving, and so its worker stops too. The bundle whose results are being taken was
    given away before all those that wait, so that its worker always finds room.
    """

    def __init__(
        self, function: Callable, tasks: Sequence, workers: int, pictures: Sequence[int], then: Callable | None
    ):
        self.tasks = tasks
        # Small enough that every worker has something to do.
        self.bundles = cut(pictures, max(1, min(BUNDLE, len(tasks) // (4 * workers))))
        self._left, self._taking = iter(range(len(self.bundles))), threading.Lock()
        self._owners: list[Future[int]] = [Future() for _ in self.bundles]
        context = _context()
        busy, self._busy = context.Pipe(duplex=False)  # closed once a worker has nothing left to do
        self.messages = [_Messages() for _ in range(workers)]
        self.connections, self.processes, self.threads = [], [], []
        try:
            for number in range(workers):
                ours, theirs = context.Pipe()
                self.connections.append(ours)
                process = context.Process(target=_work, args=(theirs, function, then, busy), daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                thread = threading.Thread(target=self._serve, args=(number,), daemon=True)
                self.threads.append(thread)
                thread.start()
        except BaseException:
            self.close()
            raise
        finally:
            busy.close()

    def items(self) -> Iterator:
        for (start, stop), owner in zip(self.bundles, self._owners, strict=True):
            worker = owner.result()
            for task in self.tasks[start:stop]:
                while True:
                    message = self.messages[worker].take()
                    if message == _DONE:
                        break
                    kind, value = pickle.loads(message)
                    if kind == _ITEM:
                        yield value
                    elif kind == _WARNING:
                        warnings.warn(value, stacklevel=2)
                    else:
                        raise self._error(task, worker, kind, value)

    def _next(self, number: int) -> tuple[int, int] | None:
        """The next bundle, for this worker; None if all are given away."""
        with self._taking:
            index = next(self._left, None)
            if index is None:
                self._busy.close()
                return None
        self._owners[index].set_result(number)
        return self.bundles[index]

    def _serve(self, number: int) -> None:
        connection, messages = self.connections[number], self.messages[number]
        try:
            while bundle := self._next(number):
                start, stop = bundle
                connection.send(self.tasks[start:stop])  # the worker is waiting for it
                left = stop - start
                while left:
                    message = connection.recv_bytes()
                    if not messages.put(message):
                        return
                    left -= message == _DONE
        except (EOFError, OSError):
            messages.put(pickle.dumps((_DIED, None)))
        except Exception as error:  # what cannot be pickled
            messages.put(pickle.dumps((_FAILED, _place(error))))

    def _error(self, task, worker: int, kind: int, value: str | None) -> WorkerError:
        path = getattr(task, "path", "input")
        if kind == _FAILED and value == "MemoryError":
            return WorkerError(f"{path}: out of memory while it was read; pass fewer --workers, or leave it out")
        if kind == _FAILED:
            return WorkerError(
                f"{path}: internal error while it was read ({value}); a defect of meditok, please report it"
            )
        process = self.processes[worker]
        process.join(5)
        code = process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = "out of memory? pass fewer --workers" if code == -signal.SIGKILL else "leave the file out"
        return WorkerError(f"{path}: the process that read it died ({how}); {hint}, or run the same command again")

    def close(self) -> None:
        for messages in self.messages:
            messages.close()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for thread in self.threads:
            thread.join()
        for connection in (*self.connections, self._busy):
            connection.close()


def cut(weights: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Consecutive ranges (start, stop) of items whose weights add up to `size` at most, or of a single item."""
    ranges, start, total = [], 0, 0
    for index, weight in enumerate(weights):
        if index > start and total + weight > size:
            ranges.append((start, index))
            start, total = index, 0
        total += weight
    return ranges + ([(start, len(weights))] if start < len(weights) else [])


def _context():
    """Processes that share no memory or lock with this one, whose threads a plain fork could not survive."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["meditok.bulk.preload"])
    return context


def _work(connection, function: Callable, then: Callable | None, busy) -> None:
    """The life of a worker process: bundles in, items out, until the other end is closed or gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)

    def send(kind: int, value) -> None:
        connection.send_bytes(pickle.dumps((kind, value)))

    def show(message, category, filename, lineno, file=None, line=None):
        if "meditok" in Path(filename).parts:  # others may quote header values
            send(_WARNING, str(message))

    warnings.showwarning = show
    try:
        while True:
            for task in connection.recv():
                for item in function(task):
                    send(_ITEM, item if then is None or busy.poll() else then(item))
                connection.send_bytes(_DONE)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            send(_FAILED, "MemoryError" if isinstance(error, MemoryError) else _place(error))


def _place(error: Exception) -> str:
    """Kind and place of an exception; its message may quote values."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}"
