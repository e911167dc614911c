"""Tokens in memory: ids, a description of each row, and the header."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from ..errors import TokenRangeError, TokenShapeError, UsageError
from .schema import Description, TokenInfo, check_range, id_dtype

ORDERS = ("position", "codebook")


class Tokens:
    """Token ids of R pictures with what is needed to decode and to place them.

    `codes` (R, G, N) in the stored unsigned type, `ids` the same as int64 tensor, `rows` one Description
    each, `info` the TokenInfo. Indexing with a slice, list or boolean array gives Tokens of those rows.
    """

    def __init__(self, ids, rows: Sequence[Description], info: TokenInfo):
        ids = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
        expected = (len(rows), info.num_codebooks, info.positions)
        if ids.shape != expected:
            raise TokenShapeError(
                f"tokens: ids of shape {ids.shape}; {expected[0]} rows, G {expected[1]} and grid "
                f"{info.grid[0]} x {info.grid[1]} need {expected}"
            )
        if ids.dtype.kind not in "iu":
            raise TokenRangeError(f"tokens: dtype {ids.dtype}; ids are integers from 0 to {info.codebook_size - 1}")
        check_range(ids, info.codebook_size, "tokens")
        self.codes = ids.astype(id_dtype(info.codebook_size), copy=False)
        self.rows = list(rows)
        self.info = info

    @property
    def ids(self) -> torch.Tensor:
        """(R, G, N) int64."""
        return torch.from_numpy(self.codes.astype(np.int64))

    @property
    def vocab_size(self) -> int:
        """G * K: ids a sequence with offsets can hold."""
        return self.info.num_codebooks * self.info.codebook_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> Tokens:
        picked = np.atleast_1d(np.arange(len(self))[index])
        return Tokens(self.codes[picked], [self.rows[i] for i in picked], self.info)

    def __repr__(self) -> str:
        info = self.info
        return (
            f"Tokens({len(self)} rows, {info.num_codebooks} x {info.grid[0]}x{info.grid[1]} ids of "
            f"{info.codebook_size}, model {info.model})"
        )

    # -- sequences for language models ----------------------------------------------------------------------
    def to_sequence(self, order: str = "position", offsets: bool = True) -> torch.Tensor:
        """(R, N*G) int64 for autoregressive models.

        order "position": all G ids of position 0, then of position 1, ...; "codebook": all N ids of codebook
        0, then of codebook 1, .... With `offsets` codebook i's ids are moved up by i*K, so that every id
        means one code.
        """
        ids = self.ids
        if offsets:
            ids = ids + self._offsets()
        ids = ids.transpose(1, 2) if _checked(order) == "position" else ids
        return ids.reshape(len(self), ids.shape[1] * ids.shape[2])

    def from_sequence(self, sequence, order: str = "position", offsets: bool = True) -> Tokens:
        """Undo to_sequence: Tokens of (B, N*G) integers, made with this object's model and grid.

        Where B is the number of rows here, their descriptions are kept; otherwise (generated sequences) rows
        are plain pictures named generated-0, .... TokenShapeError, TokenRangeError.
        """
        sequence = torch.as_tensor(sequence)
        info = self.info
        groups, positions = info.num_codebooks, info.positions
        if sequence.ndim != 2 or sequence.shape[1] != groups * positions:
            raise TokenShapeError(
                f"sequence: shape {tuple(sequence.shape)}; expected (B, {groups * positions}) for G {groups} "
                f"and grid {info.grid[0]} x {info.grid[1]}"
            )
        if sequence.is_floating_point() or sequence.dtype == torch.bool:
            raise TokenRangeError(f"sequence: dtype {sequence.dtype}; ids are integers")
        sequence = sequence.to(torch.int64)
        if _checked(order) == "position":
            ids = sequence.reshape(-1, positions, groups).transpose(1, 2)
        else:
            ids = sequence.reshape(-1, groups, positions)
        ids = ids - self._offsets() if offsets else ids
        rows = (
            self.rows
            if len(ids) == len(self)
            else [Description(f"generated-{i}", info.grid[0] * 16, info.grid[1] * 16) for i in range(len(ids))]
        )
        return Tokens(ids, rows, info)

    def _offsets(self) -> torch.Tensor:
        return torch.arange(self.info.num_codebooks)[:, None] * self.info.codebook_size

    # -- files ----------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike) -> None:
        """Write a token file (Parquet), atomically, replacing one of that name."""
        from .format import TokenWriter

        extra = dict.fromkeys(name for row in self.rows for name in row.extra)
        with TokenWriter(path, self.info, tuple(extra)) as writer:
            writer.write(self.codes, self.rows)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokens:
        """Read a token file or a finished store whole.

        BadInputError: not one of ours, or broken; TokenShapeError, TokenRangeError, CodebookMismatchError: as
        the header and ids contradict each other.
        """
        from .store import open_tokens

        with open_tokens(path) as reader:
            codes, rows = [], []
            for batch, descriptions in reader.batches(512):
                codes.append(batch)
                rows.extend(descriptions)
            info = reader.info
        empty = np.zeros((0, info.num_codebooks, info.positions), id_dtype(info.codebook_size))
        return cls(np.concatenate([empty, *codes]), rows, info)


def _checked(order: str) -> str:
    if order not in ORDERS:
        raise UsageError(f"order {order!r}: choose one of {', '.join(ORDERS)}")
    return order
