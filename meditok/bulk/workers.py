"""Reading in worker processes, the results in the order of the tasks. Bounded memory; a dead worker is an error."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import WorkerError

AHEAD = 16  # messages of each worker that wait to be taken; a worker that is further ahead stops
BUNDLE = 8  # pictures' worth of tasks sent at once: small files would otherwise wait for one another
MANY = 64  # tasks from which worker processes pay for their start
_ITEM, _DONE, _WARNING, _FAILED, _DIED = range(5)


def default_workers(tasks: int, *, on_gpu: bool, processes: int = 1) -> int:
    """Worker processes for so many tasks: none for a few; else one core in two, or all cores beside a GPU.

    `processes` is how many runs share this machine.
    """
    if tasks < MANY:
        return 0
    cores = usable_cores() // processes
    return max(1, cores - 1 if on_gpu else cores // 2)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stream(
    function: Callable[[Any], Iterable], tasks: Sequence, workers: int, pictures: Sequence[int] | None = None
) -> Iterator:
    """Every item of `function(task)` for every task, in order; `workers` 0 computes in this process.

    `function`, tasks (which have a `path`) and items must be picklable; `pictures` says how many each task holds,
    1 unless told. Close the generator to stop early. WorkerError: a worker died or failed; it names the task's path.
    """
    if workers == 0:
        for task in tasks:
            yield from function(task)
        return
    pool = _Pool(function, tasks, workers, pictures or [1] * len(tasks))
    try:
        yield from pool.items()
    finally:
        pool.close()


class _Pool:
    """Bundle i of the tasks goes to worker i mod n, and its results come back through queue i mod n.

    Each worker has a thread here that sends it a bundle, waits for the end of it, and sends the next. A thread
    whose queue is full stops receiving, and so its worker stops too.
    """

    def __init__(self, function: Callable, tasks: Sequence, workers: int, pictures: Sequence[int]):
        self.tasks = tasks
        # Small enough that every worker has something to do.
        self.bundles = cut(pictures, max(1, min(BUNDLE, len(tasks) // (4 * workers))))
        context = _context()
        self.queues = [queue.Queue(AHEAD) for _ in range(workers)]
        self.stopped = threading.Event()
        self.connections, self.processes, self.threads = [], [], []
        try:
            for number in range(workers):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(there, function), daemon=True)
                self.connections.append(here)
                process.start()
                there.close()
                self.processes.append(process)
                thread = threading.Thread(target=self._serve, args=(number,), daemon=True)
                self.threads.append(thread)
                thread.start()
        except BaseException:
            self.close()
            raise

    def items(self) -> Iterator:
        for number, (start, stop) in enumerate(self.bundles):
            worker = number % len(self.queues)
            for task in self.tasks[start:stop]:
                while True:
                    kind, value = self.queues[worker].get()
                    if kind == _ITEM:
                        yield value
                    elif kind == _WARNING:
                        warnings.warn(value, stacklevel=2)
                    elif kind == _DONE:
                        break
                    else:
                        raise self._error(task, worker, kind, value)

    def _serve(self, number: int) -> None:
        connection = self.connections[number]
        try:
            for start, stop in self.bundles[number :: len(self.queues)]:
                connection.send(self.tasks[start:stop])  # the worker is waiting for it
                left = stop - start
                while left:
                    message = connection.recv()
                    if not self._put(number, message) or message[0] == _FAILED:
                        return
                    left -= message[0] == _DONE
        except (EOFError, OSError):
            self._put(number, (_DIED, None))
        except Exception as error:  # what cannot be pickled
            self._put(number, (_FAILED, _place(error)))

    def _put(self, number: int, message: tuple) -> bool:
        while not self.stopped.is_set():
            with contextlib.suppress(queue.Full):
                self.queues[number].put(message, timeout=0.1)
                return True
        return False

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
        self.stopped.set()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for thread in self.threads:
            thread.join()
        for connection in self.connections:
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


def _work(connection, function: Callable) -> None:
    """The life of a worker process: bundles in, items out, until the other end is closed or gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)

    def show(message, category, filename, lineno, file=None, line=None):
        if "meditok" in Path(filename).parts:  # others may quote header values
            connection.send((_WARNING, str(message)))

    warnings.showwarning = show
    try:
        while True:
            for task in connection.recv():
                for item in function(task):
                    connection.send((_ITEM, item))
                connection.send((_DONE, None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send((_FAILED, "MemoryError" if isinstance(error, MemoryError) else _place(error)))


def _place(error: Exception) -> str:
    """Kind and place of an exception; its message may quote values."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}"
