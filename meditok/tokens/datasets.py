"""Tokens for training: rows of a store at random (TokenDataset) or as shuffled, sharded batches (TokenStream).

Both give int64 tensors ready for an embedding: `sequence` None keeps (G, N), "position" or "codebook" gives the flat
(G * N) of `Tokens.to_sequence`, moved up by i * K for codebook i unless `offsets` is off.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..errors import UsageError
from .schema import TokenInfo, id_dtype
from .store import open_tokens
from .tokens import ORDERS

TAILS = ("keep", "drop", "pad")


class _Ids:
    """What both share: the shape in which ids are given."""

    info: TokenInfo

    def __init__(self, sequence: str | None, offsets: bool):
        if sequence not in (None, *ORDERS):
            raise UsageError(f"sequence {sequence!r}: choose one of {', '.join(ORDERS)}, or None for (G, N)")
        self.sequence, self.offsets = sequence, offsets

    @property
    def vocab_size(self) -> int:
        """Ids that can occur: K, or G * K in sequences with offsets."""
        groups = self.info.num_codebooks if self.sequence and self.offsets else 1
        return groups * self.info.codebook_size

    def _shaped(self, codes: np.ndarray) -> torch.Tensor:
        """(B, G, N) as stored -> int64 (B, G, N) or (B, G * N)."""
        ids = torch.from_numpy(codes.astype(np.int64))
        if self.sequence is None:
            return ids
        if self.offsets:
            ids += torch.arange(self.info.num_codebooks)[:, None] * self.info.codebook_size
        return (ids.transpose(1, 2) if self.sequence == "position" else ids).reshape(len(ids), -1)


class TokenDataset(_Ids, Dataset):
    """Rows of a token file or finished store by number: `dataset[i]` is int64 (G, N), or (G * N) with `sequence`.

    Opening decodes and checks all ids once into a temporary file, two bytes an id (four above K = 65,536), which is
    then mapped: a row costs no decoding, worker processes share the pages, and memory stays free. The file lies in
    `folder` (default: the system's, see TMPDIR) and goes with this object. Errors as in `Tokens.load`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        sequence: str | None = None,
        offsets: bool = True,
        folder: str | os.PathLike | None = None,
    ):
        super().__init__(sequence, offsets)
        with open_tokens(path) as reader:
            self.info = reader.info
            handle, self._file = tempfile.mkstemp(prefix="meditok-", suffix=".ids", dir=folder)
            self._remove = weakref.finalize(self, _remove, self._file, os.getpid())
            self._shape = len(reader), self.info.num_codebooks, self.info.positions
            with open(handle, "wb") as out:
                for codes in reader.codes():
                    codes.tofile(out)
        self._map()

    def _map(self) -> None:
        dtype = id_dtype(self.info.codebook_size)
        self._codes = np.memmap(self._file, dtype, "r", shape=self._shape) if self._shape[0] else np.zeros(self._shape)

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._shaped(self._codes[index][None])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """What a DataLoader asks for: a batch of rows at once."""
        return list(self._shaped(self._codes[np.asarray(indices)]))

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_codes", "_remove")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map()


def _remove(file: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker ends with a copy of the object
        Path(file).unlink(missing_ok=True)


class TokenStream(_Ids, IterableDataset):
    """Batches of a token file or finished store for a training loop: int64 (B, G, N), or (B, G * N) with `sequence`.

        stream = TokenStream("tokens/", batch_size=256, sequence="position", shuffle=True, seed=0)
        for epoch in range(epochs):
            stream.set_epoch(epoch)
            for ids in DataLoader(stream, batch_size=None, num_workers=4): ...

    Rows are divided among ranks and their workers by number, not by part: every row is given exactly once an epoch
    whatever the number of parts, none where there are fewer rows than workers. `tail` says what becomes of rows that
    do not divide evenly by the ranks: "keep" (a rank may get one row more), "drop" or "pad" (with rows of the
    beginning) for ranks that must take the same number of steps.

    Shuffling draws a new order each epoch from (seed, epoch): row groups in random order, and the rows of `mix` of them
    at a time among each other; memory is that of these row groups. The order does not depend on the number of ranks or
    workers. rank and world_size are those of torch.distributed unless given. Errors as in `Tokens.load`, as rows are
    read, and UsageError for options that make no sense.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        batch_size: int = 64,
        sequence: str | None = None,
        offsets: bool = True,
        shuffle: bool = False,
        seed: int = 0,
        mix: int = 16,
        rank: int | None = None,
        world_size: int | None = None,
        tail: str = "keep",
    ):
        super().__init__(sequence, offsets)
        if batch_size < 1 or mix < 1:
            raise UsageError(f"batch_size {batch_size}, mix {mix}: give at least 1")
        if tail not in TAILS:
            raise UsageError(f"tail {tail!r}: choose one of {', '.join(TAILS)}")
        self.path, self.batch_size, self.shuffle, self.seed, self.mix = Path(path), batch_size, shuffle, seed, mix
        if (rank is None) != (world_size is None):
            raise UsageError("rank and world_size: give both or neither")
        if rank is None:
            there = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} is not in 0..{world_size - 1}")
        self.rank, self.world_size = rank, world_size
        with open_tokens(path) as reader:
            self.info = reader.info
            self._sizes = reader.group_sizes()
            self.rows = len(reader)
        if tail == "drop" and self.rows < world_size:
            raise UsageError(f"{path}: {self.rows} rows for {world_size} ranks leave none with tail='drop'; use 'pad'")
        each = {"drop": self.rows // world_size, "pad": -(-self.rows // world_size)}.get(tail)
        self._first, self._last = (
            (rank * self.rows // world_size, (rank + 1) * self.rows // world_size)
            if each is None
            else (rank * each, (rank + 1) * each)
        )
        # in shared memory, so that workers that outlive an epoch see the next one
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of the next pass; `start` batches of this rank were taken before, and are left out.

        Save (epoch, batches taken) with a checkpoint and give them here to go on where it was made, with the same
        batch_size and number of workers.
        """
        if epoch < 0 or start < 0:
            raise UsageError(f"epoch {epoch}, start {start}: counting starts at 0")
        self._position[0], self._position[1] = epoch, start

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, taken = (int(value) for value in self._position)
        rows = self._last - self._first
        shares = [(self._first + i * rows // count, self._first + (i + 1) * rows // count) for i in range(count)]
        done, turn = _taken(taken, [-(-(last - first) // self.batch_size) for first, last in shares])
        mine = (number + turn) % count  # the loader asks worker 0 first: let it be the one whose turn it is
        first, last = shares[mine]
        return self._batches(epoch, first + done[mine] * self.batch_size, last)

    def _batches(self, epoch: int, first: int, last: int) -> Iterator[torch.Tensor]:
        """Rows first <= position < last of the epoch's order, in batches; positions past the end begin anew."""
        spans = [(first, min(last, self.rows))] if first < self.rows else []
        if last > self.rows:
            spans.append((max(0, first - self.rows), last - self.rows))
        held: list[np.ndarray] = []
        for codes in itertools.chain.from_iterable(self._pieces(epoch, *span) for span in spans):
            held.append(codes)
            while sum(map(len, held)) >= self.batch_size:
                joined = np.concatenate(held)
                yield self._shaped(joined[: self.batch_size])
                held = [joined[self.batch_size :]]
        if sum(map(len, held)):
            yield self._shaped(np.concatenate(held))

    def _pieces(self, epoch: int, first: int, last: int) -> Iterator[np.ndarray]:
        """The ids of positions first <= p < last, a piece at a time; only row groups with rows among them are read."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self._sizes)) if self.shuffle else None
        order = np.arange(len(self._sizes)) if order is None else order
        size = self.mix if self.shuffle else 1
        start = 0
        with open_tokens(self.path) as reader:  # in the process that reads: open files do not survive a fork
            for window in range(0, len(order), size):
                groups = order[window : window + size]
                sizes = [self._sizes[group] for group in groups]
                end = start + sum(sizes)
                if end > first and start < last:
                    rows = slice(max(first, start) - start, min(last, end) - start)
                    yield from self._window(reader, epoch, window, groups, sizes, rows)
                if end >= last:
                    return
                start = end

    def _window(self, reader, epoch, window, groups, sizes, rows) -> Iterator[np.ndarray]:
        if not self.shuffle:
            yield reader.group(groups[0])[rows]
            return
        chosen = np.random.default_rng((self.seed, epoch, window)).permutation(sum(sizes))[rows]
        codes = np.empty((len(chosen), self.info.num_codebooks, self.info.positions), id_dtype(self.info.codebook_size))
        start = 0
        for group, size in zip(groups, sizes, strict=True):
            here = np.flatnonzero((chosen >= start) & (chosen < start + size))
            if len(here):
                codes[here] = reader.group(group)[chosen[here] - start]
            start += size
        for at in range(0, len(codes), 4 * self.batch_size):
            yield codes[at : at + 4 * self.batch_size]


def _taken(batches: int, available: list[int]) -> tuple[list[int], int]:
    """(batches taken of each worker, whose turn it is) after a loader took `batches` of them in turn."""
    done = [0] * len(available)
    low, high = 0, max(available)
    while low < high:  # whole rounds that fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(n, middle) for n in available) <= batches else (low, middle - 1)
    done = [min(n, low) for n in available]
    left, turn = batches - sum(done), 0
    for index, n in enumerate(available):
        if left and n > low:
            done[index] += 1
            left -= 1
            turn = index + 1
    return done, turn % len(available)
