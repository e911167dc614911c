"""The folder of a store while it is made: parts, what is known of each, the lock, and the swap on --overwrite.

store.json            complete: false until all parts are there
part-00000.parquet    appears whole
.part-00000.json      beside it until the store is complete: its sizes, digests and failures (a Record)
.lock                 held by the one run that writes here; the system lets go of it however that run ends
.overwrite/           the same once more, made beside a finished result that it will replace when it is complete
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..atomic import write_text
from ..errors import UsageError
from ..tokens.schema import TokenInfo
from ..tokens.store import FAILURES, STORE, file_digest, part_name, read_index, write_index

LOCK, STAGE = ".lock", ".overwrite"
_PART, _LISTS = r"part-\d{5,}", rf"({re.escape(STORE)}|{re.escape(FAILURES)})"
_OURS = re.compile(
    rf"{_PART}\.parquet|\.{_PART}\.json|{_LISTS}|\.({_PART}\.parquet|\.{_PART}\.json|{_LISTS})\.\w+\.tmp|"
    rf"{re.escape(LOCK)}|{re.escape(STAGE)}"
)


@dataclass
class Record:
    """What is known of a finished part."""

    file: str
    rows: int
    bytes: int
    sha256: str  # of the part
    ok: int  # input files that became rows of it
    inputs: str  # keyed digest of the bytes of its input files
    stamp: str  # keyed digest of their sizes and modification times
    failures: list[dict] = field(default_factory=list)

    def entry(self) -> dict:
        """As store.json lists it; the failures stand in failures.jsonl, those of one part after the other."""
        entry = asdict(self)
        entry["failed"] = len(entry.pop("failures"))
        return entry


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Make the folder and hold it alone. UsageError: another process has it. An empty folder is not left behind."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise _in_the_way(out) from None
    path = out / LOCK
    handle = _locked(path, out)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()


def _locked(path: Path, out: Path) -> int | None:
    if os.name == "nt":
        return None
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise UsageError(
                f"{out}: another process is writing to it; wait for that one, or choose another output"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)  # whoever held it has just finished and taken the file away


class StoreFolder:
    """One store being made or gone on with. Hold `lock(out)` around everything but `survey`."""

    def __init__(self, out: Path, info: TokenInfo, digest: str):
        self.out, self.info, self.digest = out, info, digest
        self.folder = out  # where parts are written: `out`, or the stage inside it
        self.complete = False  # whether `survey` found it finished, and whole

    # -- what is there -------------------------------------------------------------------------------------------
    def survey(self, *, overwrite: bool) -> dict[int, Record]:
        """Finished parts of this plan by index, those left out that are not what their record says.

        UsageError: the result, finished or not, of other inputs or options is there and `overwrite` is not set; or
        something else is in the way.
        """
        self.folder, self.complete = self.out, False
        if self.out.is_file():
            raise _in_the_way(self.out)
        if not self.out.exists():
            return {}
        index = read_index(self.out)
        if index is None:
            found = [path.name for path in self.out.iterdir()]
            if any(not _OURS.fullmatch(name) or re.fullmatch(rf"{_PART}\.parquet", name) for name in found):
                raise UsageError(f"{self.out}: a folder with other files in it; choose an empty or new one")
            return {}
        same, complete = index.get("settings") == self.digest, bool(index.get("complete"))
        if not same and not overwrite:
            what = "the result" if complete else "the unfinished result"
            raise UsageError(
                f"{self.out}: holds {what} of other inputs or options; pass --overwrite to replace it, or choose "
                "another output"
            )
        if complete and overwrite:
            self.folder = self.out / STAGE
            same = (read_index(self.folder) or {}).get("settings") == self.digest
        elif complete:
            records = self._listed(index)
            self.complete = len(records) == len(index["parts"])
            return records
        return self._records() if same else {}

    def _records(self) -> dict[int, Record]:
        records = {}
        for path in self.folder.glob(".part-*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                saved = json.loads(path.read_text(encoding="utf-8"))
                record = Record(**saved["record"])
                if saved["settings"] == self.digest and self._holds(record):
                    records[index_of(record.file)] = record
        return records

    def _listed(self, index: dict) -> dict[int, Record]:
        """Records of a finished store, from its index and its list of failures."""
        records = {}
        try:
            lines = (self.out / FAILURES).read_text(encoding="utf-8").splitlines()
            failures = [json.loads(line) for line in lines]
            failures = failures[len(failures) - sum(part["failed"] for part in index["parts"]) :]
            for part in index["parts"]:
                count = part["failed"]
                values = {key: value for key, value in part.items() if key != "failed"}
                record = Record(**values, failures=failures[:count])
                failures = failures[count:]
                if self._holds(record):
                    records[index_of(record.file)] = record
        except (OSError, ValueError, TypeError, KeyError):
            return {}
        return records

    def _holds(self, record: Record) -> bool:
        path = self.folder / Path(record.file).name
        try:
            return path.stat().st_size == record.bytes and file_digest(path) == record.sha256
        except OSError:
            return False

    # -- writing -------------------------------------------------------------------------------------------------
    def open(self, kept: dict[int, Record]) -> None:
        """Make the folder ready for this plan: `kept` parts stay, everything else of ours goes."""
        if self.folder == self.out:
            shutil.rmtree(self.out / STAGE, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        for record in kept.values():  # before a finished store is marked unfinished
            self.save(record)
        index = read_index(self.folder)
        if index is None or index.get("complete") or index.get("settings") != self.digest:
            self._write_index([])
        _sweep(
            self.folder, {name for record in kept.values() for name in (record.file, _sidecar(record.file))} | {STORE}
        )

    def save(self, record: Record) -> None:
        """Say beside a finished part what it is."""
        text = json.dumps({"settings": self.digest, "record": asdict(record)})
        write_text(self.folder / _sidecar(record.file), text)

    def saved(self, index: int) -> Record:
        path = self.folder / _sidecar(part_name(index))
        return Record(**json.loads(path.read_text(encoding="utf-8"))["record"])

    def finish(self, records: list[Record], failures: list[dict]) -> None:
        """Mark the store complete: `records` of all parts in order, and failures that belong to none."""
        listed = failures + [failure for record in records for failure in record.failures]
        write_text(self.folder / FAILURES, "".join(json.dumps(failure) + "\n" for failure in listed))
        self._write_index(records, complete=True)
        if self.folder != self.out:
            finish_swap(self.out)
        self.tidy(records)

    def _write_index(self, records: list[Record], *, complete: bool = False) -> None:
        write_index(self.folder, self.info, [record.entry() for record in records], self.digest, complete=complete)

    def tidy(self, records: Iterable[Record]) -> None:
        """Leave nothing but a complete store."""
        shutil.rmtree(self.out / STAGE, ignore_errors=True)
        _sweep(self.out, {record.file for record in records} | {STORE, FAILURES})

    def abandon(self) -> int:
        """After a failure or an interruption: the number of finished parts kept. Without any, no store stays."""
        kept = sum(1 for _ in self.folder.glob(".part-*.json"))
        if not kept and self.folder != self.out:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not kept:
            _sweep(self.out, set())
        return kept


def _in_the_way(out: Path) -> UsageError:
    return UsageError(f"{out}: a file of that name is in the way; name a folder, or a file ending in .parquet")


def finish_swap(out: Path) -> bool:
    """Let a complete stage take the place of the result beside it; goes on where a killed run stopped.

    False where there is none.
    """
    stage = out / STAGE
    index = read_index(stage)
    if index is None or not index.get("complete"):
        return False
    names = {Path(part["file"]).name for part in index["parts"]} | {FAILURES}
    (out / STORE).unlink(missing_ok=True)  # no reader shall see parts of two results
    for name in sorted(names):
        if (stage / name).exists():
            os.replace(stage / name, out / name)
    _sweep(out, names)
    os.replace(stage / STORE, out / STORE)
    shutil.rmtree(stage, ignore_errors=True)
    return True


def _sweep(folder: Path, keep: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in keep | {LOCK, STAGE} and _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _sidecar(part: str) -> str:
    return f".{Path(part).stem}.json"


def index_of(name: str) -> int:
    """Number of the part of that file name."""
    return int(Path(name).stem.rpartition("-")[2])
