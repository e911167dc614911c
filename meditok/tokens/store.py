"""Token outputs: one Parquet file, or a folder of parts with store.json and failures.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

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
    """Writes rows to a folder of parts of `shard_size` rows each.

    Every part appears whole; store.json says "complete": false until `close`, and readers refuse the folder
    until then. Rows are divided by their order alone, so the parts do not depend on how rows arrive.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        info: TokenInfo,
        extra: Sequence[str] = (),
        *,
        shard_size: int = SHARD_SIZE,
        description: dict | None = None,
    ):
        if shard_size < 1:
            raise UsageError(f"shard size {shard_size}: give at least 1 row a part")
        self.out, self.info, self.extra, self.shard_size = Path(out), info, tuple(extra), shard_size
        self.description = description or {}
        self.parts: list[dict] = []
        self._part: TokenWriter | None = None
        self._filled = 0
        self._closed = False
        self.out.mkdir(parents=True, exist_ok=True)
        for pattern in LEFTOVERS:  # of an earlier or interrupted run, see `plan_output`
            for path in self.out.glob(pattern):
                path.unlink(missing_ok=True)
        self._write_index(complete=False)

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
        self.parts.append({"file": part.path.name, "rows": self._filled})
        self._filled = 0
        self._write_index(complete=False)

    def close(self, settings: str = "") -> None:
        """Finish the last part and mark the store complete, once."""
        if self._closed:
            return
        if self._part is not None:
            self._finish_part()
        self._write_index(complete=True, settings=settings)
        self._closed = True

    def abort(self) -> None:
        """Drop the part in work; finished parts stay, in a store marked incomplete. None: no store stays."""
        if self._part is not None:
            self._part.abort()
            self._part = None
        if not self.parts:
            for name in (STORE, FAILURES):
                (self.out / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # was there before, with other things in it
                self.out.rmdir()

    def _write_index(self, *, complete: bool, settings: str = "") -> None:
        index = {"format": FORMAT, "complete": complete, "settings": settings}
        index |= self.info.to_metadata() | self.description
        index |= {"parts": self.parts, "rows": sum(part["rows"] for part in self.parts)}
        write_text(self.out / STORE, json.dumps(index, indent=1) + "\n")

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


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


def finished_settings(out: str | os.PathLike) -> tuple[str, int] | None:
    """(settings digest, listed failures) of an output that is finished, or None where there is none.

    UsageError: something else is in the way.
    """
    out = Path(out)
    listed = failures_path(out)
    if is_single_file(out):
        if not out.exists():
            return None
        if not out.is_file():
            raise UsageError(f"{out}: a folder of that name is in the way; choose another output")
        try:
            with TokenReader([out]) as reader:
                settings = reader.info.settings
        except BadInputError:
            settings = ""
    else:
        if out.is_file():
            raise UsageError(f"{out}: a file of that name is in the way; name a folder, or a file ending in .parquet")
        if not out.exists() or not any(out.iterdir()):
            return None
        index = read_index(out)
        if index is None:
            raise UsageError(f"{out}: a folder with other files in it; choose an empty or new one")
        if not index.get("complete"):
            return None
        settings = str(index.get("settings", ""))
    return settings, len(listed.read_text(encoding="utf-8").splitlines()) if listed.exists() else 0


def plan_output(out: str | os.PathLike, settings: str, *, overwrite: bool) -> int | None:
    """None where `out` must be written; where the same work is finished, the number of failures it lists.

    UsageError: another output is there and `overwrite` is not set, or something else is in the way.
    """
    found = finished_settings(out)
    if found is None or overwrite:
        return None
    if found[0] and found[0] == settings:
        return found[1]
    raise UsageError(
        f"{out}: holds the result of other inputs or options; pass --overwrite to replace it, or choose another output"
    )


def read_index(folder: Path) -> dict | None:
    """store.json of a folder, or None where there is none that can be read."""
    try:
        index = json.loads((folder / STORE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) and "parts" in index else None


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
