"""Reading and writing one token file (Parquet), or the parts of a store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .._lazy import require
from ..atomic import atomic_path, remove_leftovers
from ..errors import BadInputError, TokenShapeError
from .schema import Description, TokenInfo, arrow_schema, check_range, from_batch, id_dtype, ids_of, to_batch

ROWS_PER_GROUP = 512  # a row group holds one dictionary (4096 ids, 8 KiB) for about 1.5 MiB of ids


class TokenWriter:
    """Writes one token file; it appears under its name when `close` ends well, and never in part.

    Rows are regrouped into row groups of a fixed size, so that the bytes do not depend on how they arrive.
    Use as a context manager: an exception inside the block leaves no file.
    """

    def __init__(self, path: str | os.PathLike, info: TokenInfo, extra: Sequence[str] = ()):
        require("pyarrow", purpose="writing token files")
        import pyarrow.parquet as pq

        self.path, self.info = Path(path), info
        self.schema = arrow_schema(info, tuple(extra))
        self._ids: list[np.ndarray] = []
        self._rows: list[Description] = []
        self._closed = False
        self._stack = contextlib.ExitStack()
        remove_leftovers(self.path)
        temporary = self._stack.enter_context(atomic_path(self.path))
        self._writer = pq.ParquetWriter(temporary, self.schema, use_dictionary=True, compression="zstd")

    def write(self, ids: np.ndarray, rows: Sequence[Description]) -> None:
        """Append rows: integer ids (R, G, N) with one description each. TokenShapeError, TokenRangeError."""
        info = self.info
        if ids.shape != (len(rows), info.num_codebooks, info.positions):
            raise TokenShapeError(
                f"{self.path.name}: ids of shape {ids.shape} for {len(rows)} rows; expected ({len(rows)}, "
                f"{info.num_codebooks}, {info.positions})"
            )
        check_range(ids, info.codebook_size, self.path.name)
        self._ids.extend(ids.astype(id_dtype(info.codebook_size), copy=False))
        self._rows.extend(rows)
        while len(self._rows) >= ROWS_PER_GROUP:
            self._flush(ROWS_PER_GROUP)

    def _flush(self, count: int) -> None:
        batch = to_batch(np.stack(self._ids[:count]), self._rows[:count], self.schema)
        self._writer.write_batch(batch, row_group_size=count)
        del self._ids[:count], self._rows[:count]

    def close(self, settings: str = "") -> None:
        """Finish the file, once. `settings` goes into its header (see TokenInfo)."""
        if self._closed:
            return
        try:
            if self._rows:
                self._flush(len(self._rows))
            if settings:
                self._writer.add_key_value_metadata({"settings": settings})
            self._writer.close()
        except BaseException:
            self.abort()
            raise
        self._closed = True
        self._stack.close()

    def abort(self) -> None:
        """Drop everything written so far, unless the file is finished."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(Exception):
            self._writer.close()
        error = InterruptedError("aborted")
        self._stack.__exit__(InterruptedError, error, None)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class TokenReader:
    """Rows of one token file, or of the parts of a store, in order and a batch at a time.

    BadInputError: no such file, no Parquet, not ours; CodebookMismatchError: another format version, or parts
    made by different models.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        require("pyarrow", purpose="reading token files")
        self.paths = [Path(p) for p in paths]
        self._files = [self._open(path) for path in self.paths]
        infos = [
            TokenInfo.from_metadata(file.metadata.metadata, str(path))
            for file, path in zip(self._files, self.paths, strict=True)
        ]
        self.info = infos[0]
        for info, path in zip(infos, self.paths, strict=True):
            if (info.codebook_hash, info.model_hash, info.grid) != (
                self.info.codebook_hash,
                self.info.model_hash,
                self.info.grid,
            ):
                raise BadInputError(
                    f"{path}: model {info.model_hash}, grid {info.grid}, but {self.paths[0]} has model "
                    f"{self.info.model_hash}, grid {self.info.grid}; these parts are not of one store"
                )
        for file, path in zip(self._files, self.paths, strict=True):
            missing = {"id", "tokens", "height", "width"} - set(file.schema_arrow.names)
            if missing:
                raise BadInputError(f"{path}: columns {', '.join(sorted(missing))} are missing; write the file again")
            self._check_length(file, path)
        known = set(arrow_schema(self.info).names)
        self.extra = tuple(n for n in self._files[0].schema_arrow.names if n not in known)

    @staticmethod
    def _open(path: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not path.is_file():
            raise BadInputError(
                f"{path}: no such token file; give a .parquet file or a folder written by meditok tokenize"
            )
        try:
            file = pq.ParquetFile(path)
            _ = file.schema_arrow.names  # decodes them, which a damaged file may not allow
            return file
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadInputError(f"{path}: no Parquet file ({_reason(error)}); write it anew") from None

    def _check_length(self, file, path: Path) -> None:
        """TokenShapeError for lists of another fixed length than the header's, before one is read: Parquet repeats a
        value at no cost, so that a few kilobytes may hold lists without end."""
        length = getattr(file.schema_arrow.field("tokens").type, "list_size", None)
        expected = self.info.num_codebooks * self.info.positions
        if length not in (None, expected):
            raise TokenShapeError(
                f"{path}: rows of {length} ids; grid {self.info.grid[0]} x {self.info.grid[1]} with "
                f"{self.info.num_codebooks} codebooks needs {expected}; write the file again"
            )

    def __len__(self) -> int:
        return sum(f.metadata.num_rows for f in self._files)

    def check(self) -> None:
        """Read and check every id, keeping none. TokenShapeError, TokenRangeError."""
        for _ in self.codes():
            pass

    def codes(self, size: int = 512) -> Iterator[np.ndarray]:
        """Ids alone, (R, G, N) with R <= size. TokenShapeError, TokenRangeError."""
        for batch, path in self._batches(size, columns=["tokens"]):
            yield ids_of(batch.column("tokens"), self.info, str(path))

    def group_sizes(self) -> list[int]:
        """Rows of every row group, in order: what can be decoded by itself."""
        return [
            file.metadata.row_group(index).num_rows
            for file in self._files
            for index in range(file.metadata.num_row_groups)
        ]

    def group(self, number: int) -> np.ndarray:
        """Ids (R, G, N) of one row group. TokenShapeError, TokenRangeError."""
        import pyarrow as pa

        part = 0
        while number >= self._files[part].metadata.num_row_groups:
            number -= self._files[part].metadata.num_row_groups
            part += 1
        file, path = self._files[part], self.paths[part]
        try:
            column = file.read_row_group(number, columns=["tokens"], use_threads=False).column("tokens")
            return ids_of(column.combine_chunks(), self.info, str(path))
        except (pa.ArrowException, OSError) as error:
            raise BadInputError(f"{path}: broken Parquet ({_reason(error)}); write it anew") from None

    def descriptions(self) -> Iterator[Description]:
        """Every row's description, without reading its ids."""
        names = [name for name in self._files[0].schema_arrow.names if name != "tokens"]
        for batch, path in self._batches(256, columns=names):
            yield from from_batch(batch, str(path))

    def batches(self, size: int = 64) -> Iterator[tuple[np.ndarray, list[Description]]]:
        """Ids (R, G, N), R <= size, with their descriptions. TokenShapeError, TokenRangeError."""
        for batch, path in self._batches(size):
            yield ids_of(batch.column("tokens"), self.info, str(path)), from_batch(batch, str(path))

    def _batches(self, size: int, columns: Sequence[str] | None = None):
        import pyarrow as pa

        for file, path in zip(self._files, self.paths, strict=True):
            try:
                for batch in file.iter_batches(batch_size=size, columns=columns):
                    yield batch, path
            except (pa.ArrowException, OSError) as error:
                raise BadInputError(f"{path}: broken Parquet ({_reason(error)}); write it anew") from None

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> TokenReader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
