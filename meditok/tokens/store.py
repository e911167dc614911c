"""Token outputs: one Parquet file, or a folder of parts with store.json and failures.jsonl."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from .._lazy import require
from ..atomic import write_text
from ..errors import BadInputError, UsageError
from .format import TokenReader, TokenWriter
from .schema import FORMAT, Description, TokenInfo

STORE, FAILURES = "store.json", "failures.jsonl"
LEFTOVERS = ("part-*.parquet", FAILURES, ".part-*.tmp", f".{STORE}.*.tmp", f".{FAILURES}.*.tmp")
SHARD_SIZE = 8192  # rows a part, unless asked otherwise


def is_single_file(out: str | os.PathLike) -> bool:
    """Whether this output name means one Parquet file rather than a folder."""
    return Path(out).suffix.lower() == ".parquet"


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


class StoreWriter:
    """Writes rows to a new folder of parts of `shard_size` rows each.

    What `meditok tokenize` writes can be gone on with after an interruption; this cannot, for rows say nothing of the
    files they came from.

    Every part appears whole; store.json says "complete": false until `close`, and readers refuse the folder until then.
    """

    def __init__(
        self, out: str | os.PathLike, info: TokenInfo, extra: Sequence[str] = (), *, shard_size: int = SHARD_SIZE
    ):
        if shard_size < 1:
            raise UsageError(f"shard size {shard_size}: give at least 1 row a part")
        self.out, self.info, self.extra, self.shard_size = Path(out), info, tuple(extra), shard_size
        self.parts: list[dict] = []
        self._part: TokenWriter | None = None
        self._filled = 0
        self._closed = False
        self.out.mkdir(parents=True, exist_ok=True)
        for pattern in LEFTOVERS:
            for path in self.out.glob(pattern):
                path.unlink(missing_ok=True)
        write_index(self.out, info, [], "", complete=False)

    def write(self, ids: np.ndarray, rows: Sequence[Description]) -> None:
        """Append rows: integer ids (R, G, N) with one description each. TokenShapeError, TokenRangeError."""
        start = 0
        while start < len(rows):
            if self._part is None:
                self._part = TokenWriter(self.out / part_name(len(self.parts)), self.info, self.extra)
            count = min(self.shard_size - self._filled, len(rows) - start)
            self._part.write(ids[start : start + count], rows[start : start + count])
            self._filled += count
            start += count
            if self._filled == self.shard_size:
                self._finish_part()

    def _finish_part(self) -> None:
        part, self._part = self._part, None
        part.close()
        size = part.path.stat().st_size
        self.parts.append(
            {"file": part.path.name, "rows": self._filled, "bytes": size, "sha256": file_digest(part.path)}
        )
        self._filled = 0

    def close(self, settings: str = "") -> None:
        """Finish the last part and mark the store complete, once."""
        if self._closed:
            return
        if self._part is not None:
            self._finish_part()
        write_index(self.out, self.info, self.parts, settings, complete=True)
        self._closed = True

    def abort(self) -> None:
        """Drop the part in work; finished parts stay, in a store marked incomplete. None: no store stays."""
        if self._part is not None:
            self._part.abort()
            self._part = None
        if not self.parts:
            (self.out / STORE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # was there before, with other things in it
                self.out.rmdir()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def write_index(folder: Path, info: TokenInfo, parts: list[dict], settings: str, *, complete: bool) -> None:
    """Write store.json."""
    index = {"format": FORMAT, "complete": complete, "settings": settings} | info.to_metadata()
    index |= {"parts": parts, "rows": sum(part["rows"] for part in parts)}
    write_text(folder / STORE, json.dumps(index, indent=1) + "\n")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def failures_path(out: str | os.PathLike) -> Path:
    """Where the failures of this output are listed: inside a store, beside a single file."""
    out = Path(out)
    return out.with_suffix(".failures.jsonl") if is_single_file(out) else out / FAILURES


def write_failures(out: str | os.PathLike, failures: Iterable[dict]) -> None:
    """List failures, one JSON object a line; a single file without failures has no such list."""
    path, lines = failures_path(out), [json.dumps(f) + "\n" for f in failures]
    if lines or not is_single_file(out):
        write_text(path, "".join(lines))
    else:
        path.unlink(missing_ok=True)


def plan_file(out: str | os.PathLike, plan: str, contents: Callable[[], str], *, overwrite: bool) -> int | None:
    """None where the token file `out` must be written; where the same work is finished, the failures it lists.

    `plan` and `contents()` are the digests of what a run would work on, see `file_settings`.
    UsageError: another output is there and `overwrite` is not set, or something else is in the way.
    """
    out = Path(out)
    if out.exists() and not out.is_file():
        raise UsageError(f"{out}: a folder of that name is in the way; choose another output")
    if not out.exists() or overwrite:
        return None
    try:
        with TokenReader([out]) as reader:
            settings = reader.info.settings
    except BadInputError:
        settings = ""
    if settings.startswith(plan) and settings == file_settings(plan, contents()):
        listed = failures_path(out)
        return len(listed.read_text(encoding="utf-8").splitlines()) if listed.exists() else 0
    raise UsageError(
        f"{out}: holds the result of other inputs or options; pass --overwrite to replace it, or choose another output"
    )


def file_settings(plan: str, contents: str) -> str:
    """What a token file's header says of its inputs: the digest of the plan, and that of the bytes read."""
    return plan + contents


def read_index(folder: Path) -> dict | None:
    """store.json of a folder, or None where there is none that can be read."""
    try:
        index = json.loads((folder / STORE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) and "parts" in index else None


def is_token_file(path: str | os.PathLike) -> bool:
    """Whether `path` is a store, finished or not, or a Parquet file whose header says that it holds tokens."""
    path = Path(path)
    if path.is_dir():
        return read_index(path) is not None
    if not (is_single_file(path) and path.is_file()):
        return False
    arrow = require("pyarrow", purpose="reading Parquet files")
    parquet = require("pyarrow.parquet", purpose="reading Parquet files")
    try:
        return b"meditok.format" in (parquet.read_metadata(path).metadata or {})
    except (arrow.ArrowException, OSError):
        return False  # whoever reads it says what is wrong with it


def open_tokens(path: str | os.PathLike) -> TokenReader:
    """A reader over a token file or a finished store. BadInputError: neither, or a store not finished."""
    path = Path(path)
    if not path.is_dir():
        return TokenReader([path])
    index = read_index(path)
    if index is None:
        raise BadInputError(
            f"{path}: no token store (no readable {STORE}); give a folder or file written by meditok tokenize"
        )
    if not index.get("complete"):
        raise BadInputError(f"{path}: unfinished store; run the same meditok tokenize again to finish it")
    parts = [path / Path(str(part.get("file"))).name for part in index["parts"]]
    if not parts:
        raise BadInputError(f"{path}: a store without rows")
    reader = TokenReader(parts)
    if len(reader) != index.get("rows"):
        raise BadInputError(
            f"{path}: {len(reader)} rows in its parts, {index.get('rows')} in {STORE}; a part was replaced "
            "or lost, run meditok tokenize --overwrite"
        )
    return reader
