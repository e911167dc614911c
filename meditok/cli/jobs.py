"""What the commands that read many files share: finding inputs, guarding outputs, counting, ending."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BadInputError, MeditokError, MissingPartError, UsageError
from ..pipeline import PATCH, Result, Settings, encode, fingerprint
from ..tokens.schema import Description, TokenInfo, check_extra
from .console import console

if TYPE_CHECKING:
    from ..data import Discovery, ReadOptions, Source
    from ..models.tokenizer import Tokenizer
    from ..tokens.keys import Namer

SOME_FAILED = 6


@dataclass
class Tally:
    """Counts of input files; found = ok + failed + ignored. `rows` counts pictures."""

    ok: int = 0
    failed: int = 0
    ignored: int = 0
    rows: int = 0
    rate: float = 0.0  # pictures a second
    failures: list[tuple[str, MeditokError]] = field(default_factory=list)  # (relative name, error)

    @property
    def found(self) -> int:
        return self.ok + self.failed + self.ignored

    def fail(self, name: str, error: MeditokError) -> None:
        self.failed += 1
        self.failures.append((name, error))

    def counts(self) -> dict[str, int]:
        return {
            "found": self.found,
            "ok": self.ok,
            "failed": self.failed,
            "ignored": self.ignored,
            "rows": self.rows,
        }

    def sentence(self) -> str:
        return (
            f"found {self.found} files: {self.ok} ok, {self.failed} failed, {self.ignored} ignored; "
            f"{self.rows} pictures"
        )


def outputs_of(out: str | None, json_out: str | None) -> list[str]:
    """The files and folders a run writes. UsageError: one cannot be written, or the report is the result."""
    written = [name for name in (out, json_out) if name not in (None, "-")]
    for name in written:
        folder = next(path for path in Path(os.path.abspath(name)).parents if path.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"{name}: {folder} is no folder that can be written to; choose another output")
    if len({os.path.realpath(name) for name in written}) < len(written):
        raise UsageError(f"--json {json_out}: is the output as well; choose another name for the report")
    return written


def find_inputs(inputs: Sequence[str], options: ReadOptions, outputs: Sequence[str] = ()) -> Discovery:
    """Walk the inputs and tell what the walk noticed. UsageError: an output is an input, or names collide."""
    from ..data import discover

    found = discover(inputs, options)
    guard_outputs(inputs, found, outputs)
    found.failed[:] = [(_relative(path, inputs), error) for path, error in found.failed]
    for warning in found.warnings:
        console.warning(warning, private=True)
    return found


def guard_outputs(inputs: Sequence[str], found: Discovery, outputs: Sequence[str]) -> None:
    """UsageError where an output is, or holds, a file that is read; files of earlier outputs do not count."""
    read = [blob.path for source in found.sources for blob in source.blobs]
    read += [path for path, _ in found.failed]
    for given in outputs:
        out = Path(os.path.realpath(given))
        inside = [path for path in read if _within(path, out)] + [p for p in inputs if Path(os.path.realpath(p)) == out]
        if inside:
            raise UsageError(f"{given}: is an input, or holds one ({inside[0]}); choose another output")
        found.ignored[:] = [(path, reason) for path, reason in found.ignored if not _within(path, out)]


def _relative(path: str, inputs: Sequence[str]) -> str:
    """Name of a failed file as its rows would have had it: relative to the input it came with."""
    for folder in inputs:
        if os.path.isdir(folder) and Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents:
            return Path(os.path.relpath(path, folder)).as_posix()
    return Path(path).name


def _within(path: str, folder: Path) -> bool:
    real = Path(os.path.realpath(path))
    return real == folder or folder in real.parents


def load_model(name: str, device: str, precision: str) -> Tokenizer:
    """The model; a forced backend that is not here is a MissingPartError."""
    try:
        from ..models.files import load

        return load(name, device=device, precision=precision)
    except ImportError as error:
        if "MEDITOK_" not in str(error):
            raise
        raise MissingPartError(f"{error}; use --backend auto") from None


def check_names(found: Discovery) -> None:
    """UsageError for a name that a token file cannot hold as text; for --keep-names."""
    for source in found.sources:
        for name in (source.name, *source.names.values()):
            if any("\ud800" <= letter <= "\udfff" for letter in name):
                raise UsageError(f"{name}: the name is not UTF-8; rename the file, or leave --keep-names out")


def check_columns(found: Discovery, wanted: Sequence[str]) -> None:
    """UsageError for a column to copy that no manifest has, or whose name the token file needs."""
    if not wanted:
        return
    check_extra(wanted)
    known = {name for source in found.sources for name in source.columns}
    known |= {name for source in found.sources for row in source.row_columns.values() for name in row}
    missing = [name for name in wanted if name not in known]
    if missing:
        have = ", ".join(sorted(known)) or "none at all"
        raise UsageError(f"--columns: no input has a manifest column {', '.join(missing)}; there are: {have}")


def backend(model: Tokenizer) -> str:
    """What computes: the device, and whose kernels run on it."""
    from .. import native

    level = f" {native.isa}" if native.isa and model.device.type == "cpu" else ""
    return f"{model.device.type}, {native.backend}{level}"


@dataclass
class Job:
    """One run: what is read, how, by which model, and what happens on a failure."""

    found: Discovery
    reading: ReadOptions
    settings: Settings
    model: Tokenizer
    namer: Namer
    on_error: str = "fail"

    @property
    def info(self) -> TokenInfo:
        """Header of the tokens this run makes."""
        side = self.settings.size_for(self.model) // PATCH
        return TokenInfo.of(self.model, (side, side), stable=self.settings.stable)

    def digest(self, **more) -> str:
        """Keyed digest of the inputs and of every option that changes the result."""
        making = asdict(self.settings)
        if self.settings.stable:
            del making["batch_size"]  # changes nothing then
        reading = {k: v for k, v in asdict(self.reading).items() if k != "limits"}
        return fingerprint(
            self.found.sources,
            {
                "model": self.model.hash,
                "precision": self.model.precision,
                "device_class": self.model.device.type,
                "read": reading,
                "make": making,
            }
            | more,
            self.namer,
        )


def start(
    inputs: Sequence[str],
    reading: ReadOptions,
    settings: Settings,
    options: dict,
    *,
    outputs: Sequence[str] = (),
) -> Job:
    """Find the inputs, then load the model. Errors as in find_inputs and load_model."""
    from ..tokens.keys import Namer

    namer = Namer(keep_names=settings.keep_names)
    console.use_names(namer.digest)
    found = find_inputs(inputs, reading, outputs)
    check_columns(found, settings.columns)
    if settings.keep_names:
        check_names(found)
    model = load_model(options["model"], options["device"], options["precision"])
    return Job(found, reading, settings, model, namer, options["on_error"])


def tokenize_into(write: Callable[[np.ndarray, list[Description]], None], job: Job) -> Tally:
    """Tokenise what was found, handing rows to `write`; returns the counts.

    With on_error "fail" the first failure is raised. BadInputError: nothing was found, or everything failed.
    """
    tally = Tally(ignored=len(job.found.ignored))
    started = time.monotonic()
    for path, error in job.found.failed:
        _failed(tally, str(path), error, job.on_error)
    with console.progress("tokenising", len(job.found.sources)) as advance:
        for result in encode(_counted(job.found.sources, advance), job.model, job.settings, job.namer):
            _take(tally, result, write, job.on_error)
    conclude(tally)
    tally.rate = tally.rows / max(time.monotonic() - started, 1e-9)
    console.info(f"{tally.sentence()}, {tally.rate:.1f} a second on {backend(job.model)}", **tally.counts())
    return tally


def _counted(sources: Iterable[Source], advance: Callable[[int], None]):
    for source in sources:
        yield source
        advance(1)


def _take(tally: Tally, result: Result, write: Callable, on_error: str) -> None:
    for warning in result.warnings:
        console.warning(warning, name=result.name)
    if result.error is not None:
        _failed(tally, result.name, result.error, on_error)
        return
    tally.ok += 1
    tally.rows += len(result.rows)
    if result.rows:
        write(np.stack(result.ids), result.rows)


def _failed(tally: Tally, name: str, error: MeditokError, on_error: str) -> None:
    if on_error == "fail":
        raise error
    console.failure(error, name=name)
    tally.fail(name, error)


def conclude(tally: Tally) -> None:
    """BadInputError unless at least one file was good."""
    if tally.ok:
        return
    if tally.failed:
        raise BadInputError(f"all {tally.failed} files failed; the first: {tally.failures[0][1]}")
    raise BadInputError(f"no images found ({tally.ignored} files ignored); give files or folders that hold some")


def exit_code(tally: Tally) -> int:
    return SOME_FAILED if tally.failed else 0


def failure_records(tally: Tally, namer: Namer, *, names: bool = False) -> list[dict]:
    """Failures for a file: keyed hash and kind of error, the message only where names may be told."""
    records = []
    for name, error in tally.failures:
        record = {
            "source": namer.name(name),
            "error": type(error).__name__,
            "exit_code": error.exit_code,
            "meaning": (type(error).__doc__ or "").split("\n")[0],
        }
        if names or namer.keep_names:
            record |= {"name": name, "message": str(error)}
        records.append(record)
    return records


def finished_report(out: Path, job: Job, failed: int) -> dict:
    """The JSON report of a run that found its work done before, `failed` files of it listed as failures."""
    from ..tokens.store import open_tokens

    files = sum(len(source.names) or 1 for source in job.found.sources) + len(job.found.failed)
    with open_tokens(out) as reader:
        tally = Tally(files - failed, failed, len(job.found.ignored), len(reader))
    return tally.counts() | job.info.to_metadata() | {"nothing_to_do": True}


def report_of(tally: Tally, job: Job, json_out: str | None) -> dict:
    """The JSON report of a run; names only on stdout or with --keep-names."""
    failures = failure_records(tally, job.namer, names=json_out == "-")
    run = {
        "backend": backend(job.model),
        "images_per_second": round(tally.rate, 3),
        "warnings": console.warned,
    }
    return tally.counts() | job.info.to_metadata() | run | {"failures": failures}
