"""What the commands that read many files share: finding inputs, guarding outputs, counting, ending."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..bulk.encoding import Result, can_travel
from ..bulk.plan import Plan, make_plan
from ..bulk.run import Seconds, Summary, Work, failure_record, run_shards
from ..bulk.workers import default_workers, stream, warm_up
from ..errors import BadInputError, MeditokError, MissingPartError, UsageError
from ..pipeline import Settings
from ..tokens.schema import TokenInfo, check_extra
from .console import console

if TYPE_CHECKING:
    import torch

    from ..bulk.folder import Record
    from ..data import Discovery, ReadOptions
    from ..models.tokenizer import Tokenizer
    from ..tokens.format import TokenWriter
    from ..tokens.keys import Namer

SOME_FAILED = 6
MANY_HEADERS = 1000  # DICOM files whose headers take longer than worker processes to start


@dataclass
class Tally:
    """Counts of input files; found = ok + failed + ignored. `rows` counts pictures. Told of results as they come."""

    ignored: int = 0
    ok: int = 0
    failed: int = 0
    rows: int = 0
    made: int = 0  # rows made by this run; those of an earlier one were there
    seconds: Seconds = field(default_factory=Seconds)
    failures: list[dict] = field(default_factory=list)  # as files hold them
    told: list[dict] = field(default_factory=list)  # the same as the report tells them
    record: Callable[..., dict] | None = None  # of a failure
    unread: int = 0  # how many of them failed before they were read
    names: bool = False  # whether the report tells names and messages
    on_error: str = "fail"
    advance: Callable[..., None] = lambda step=0, failed=0: None
    _first: MeditokError | None = None

    @property
    def found(self) -> int:
        return self.ok + self.failed + self.ignored

    @property
    def rate(self) -> float:
        """Pictures made a second."""
        return self.made / max(self.seconds.wall, 1e-9)

    def file(self, result: Result) -> None:
        for warning in result.warnings:
            console.warning(warning, name=result.name)
        if result.error is not None:
            self.fail(result.name, result.error)
            return
        self.ok += 1
        self.rows += len(result.rows)
        self.made += len(result.rows)

    def pictures(self, count: int) -> None:
        self.advance(count)

    def fail(self, name: str, error: MeditokError) -> None:
        """Count a failure, or raise it where the first one ends the run."""
        if self.on_error == "fail":
            raise error
        console.failure(error, name=name)
        self._first = self._first or error
        self.failed += 1
        self.failures.append(self.record(name, error))
        self.told.append(self.record(name, error, names=self.names))
        self.advance(0, failed=1)

    def conclude(self) -> None:
        """BadInputError unless at least one file was good."""
        if self.ok:
            return
        if self._first is not None:
            raise BadInputError(f"all {self.failed} files failed; the first: {self._first}")
        if self.failed:
            raise BadInputError(f"all {self.failed} files failed")
        raise BadInputError(f"no images found ({self.ignored} files ignored); give files or folders that hold some")

    def settle(self, records: Sequence[Record]) -> None:
        """Take ok, rows and failures from the records of all parts, whoever made them, and when."""
        self.ok, self.rows = sum(record.ok for record in records), sum(record.rows for record in records)
        told = {failure["source"]: failure for failure in self.told}
        before = self.failures[: self.unread]
        self.failures = before + [failure for record in records for failure in record.failures]
        self.told = [told.get(failure["source"], failure) for failure in self.failures]
        self.failed = len(self.failures)

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


def find_inputs(
    inputs: Sequence[str], options: ReadOptions, outputs: Sequence[str] = (), *, workers: int | None = None
) -> Discovery:
    """Walk the inputs and tell what the walk noticed. UsageError: an output is an input, or names collide.

    `workers` processes read DICOM headers where there are many; None: as many as the machine has cores.
    """
    from ..data import discover

    def through(function: Callable, tasks: Sequence) -> Iterator:
        some = default_workers(len(tasks)) if workers is None else workers
        return stream(function, tasks, some if len(tasks) >= MANY_HEADERS else 0)

    found = discover(inputs, options, console.progress, through)
    guard_outputs(inputs, found, outputs)
    found.failed[:] = [(found.names[path], error) for path, error in found.failed]  # as rows would be named
    for warning in found.warnings:
        console.warning(warning, private=True)
    return found


def guard_outputs(inputs: Sequence[str], found: Discovery, outputs: Sequence[str]) -> None:
    """UsageError where an output is, or holds, a file that is read; files of earlier outputs do not count."""
    read = [blob.path for source in found.sources for blob in source.blobs]
    read += [path for path, _ in found.failed]
    for given in outputs:
        out = Path(os.path.realpath(given))
        held = [path for path in read if _within(path, out)] if out.exists() else []
        inside = held + [p for p in inputs if Path(os.path.realpath(p)) == out]
        if inside:
            raise UsageError(f"{given}: is an input, or holds one ({inside[0]}); choose another output")
        found.ignored[:] = [(path, reason) for path, reason in found.ignored if not _within(path, out)]


def _within(path: str, folder: Path) -> bool:
    real = Path(os.path.realpath(path))
    return real == folder or folder in real.parents


def load_model(name: str, device: str, precision: str) -> Tokenizer:
    """The model; a forced backend that cannot run it here is a MissingPartError."""
    try:
        from ..models.files import load

        model = load(name, device=device, precision=precision)
    except ImportError as error:
        if "MEDITOK_" not in str(error):
            raise
        raise MissingPartError(f"{error}; use --backend auto") from None
    _check_backend(model.device)
    return model


def _check_backend(device: torch.device) -> None:
    """MissingPartError: the backend that was asked for has no kernels for this device."""
    from .. import native

    if device.type == "cuda":
        try:
            native.cuda_backend(device.index or 0)
        except RuntimeError as error:
            raise MissingPartError(f"{error}; use --backend auto") from None
    elif native.backend == "triton" and native.cpu_backend() != "triton":
        raise MissingPartError(
            f"--backend triton: its kernels run on CUDA devices, and the model is on the {device.type}; "
            "use --backend auto"
        )


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
    workers: int = 0

    @property
    def work(self) -> Work:
        return Work(self.model, self.settings, self.namer, self.workers)

    @property
    def info(self) -> TokenInfo:
        """Header of the tokens this run makes."""
        return self.work.info

    def plan(self, shard_size: int | None = None) -> Plan:
        """The parts of this run, one for everything without `shard_size`, and the digest of what decides them."""
        making = asdict(self.settings)
        if self.settings.stable:
            del making["batch_size"]  # changes nothing then
        settings = {
            "model": self.model.hash,
            "precision": self.model.precision,
            "device_class": self.model.device.type,
            "read": {k: v for k, v in asdict(self.reading).items() if k != "limits"},
            "make": making,
        }
        tile = self.settings.size_for(self.model) if self.settings.fit == "tile" else None
        return make_plan(self.found, settings, self.namer, shard_size, tile)

    def tally(self, *, names: bool = False) -> Tally:
        """Counts to begin with: what was ignored and what failed before it was read. Raises that with on_error fail.

        `names`: the report tells failures with names and messages.
        """

        record = partial(failure_record, namer=self.namer)
        tally = Tally(len(self.found.ignored), record=record, names=names, on_error=self.on_error)
        for name, error in self.found.failed:
            tally.fail(str(name), error)
        tally.unread = tally.failed
        return tally


def start(
    inputs: Sequence[str],
    reading: ReadOptions,
    settings: Settings,
    options: dict,
    *,
    outputs: Sequence[str] = (),
    processes: int = 1,
) -> Job:
    """Find the inputs, then load the model. Errors as in find_inputs and load_model.

    `processes` is how many runs share this machine.
    """
    from ..tokens.keys import Namer

    namer = Namer(keep_names=settings.keep_names)
    console.use_names(namer.digest)
    found = find_inputs(inputs, reading, outputs, workers=options.get("workers"))
    check_columns(found, settings.columns)
    if settings.keep_names:
        check_names(found)
    if default_workers(len(found.sources)) and options.get("workers") != 0:
        warm_up()
    model = load_model(options["model"], options["device"], options["precision"])
    workers = options.get("workers")
    if workers is None:
        workers = workers_for(len(found.sources), model, settings, processes)
    return Job(found, reading, settings, model, namer, options["on_error"], workers)


def workers_for(sources: int, model: Tokenizer, settings: Settings, processes: int = 1) -> int:
    """Worker processes for so many sources, by the machine: one a core if they run the model or it has a device of its
    own; else one for two cores, which the threads of the model need.
    """
    whole = model.device.type != "cpu" or can_travel(model, settings)
    return default_workers(sources, share=1 if whole else 0.5, processes=processes)


@dataclass
class _Whole:
    """One token file as the sink of everything; closed by whoever opened it."""

    writer: TokenWriter
    summary: Summary | None = None

    def __post_init__(self):
        self.write, self.abort = self.writer.write, self.writer.abort

    def finish(self, summary: Summary) -> None:
        self.summary = summary


def tokenize_into(writer: TokenWriter, job: Job, plan: Plan, *, names: bool = False) -> tuple[Tally, str]:
    """Tokenise what was found into one file, left open; returns the counts and the keyed digest of all bytes read.

    With on_error "fail" the first failure is raised. BadInputError: nothing was found, or everything failed.
    """
    from ..bulk.plan import digest_of

    tally, sink = job.tally(names=names), _Whole(writer)
    with console.progress("tokenising", plan.pictures) as tally.advance:
        tally.seconds = run_shards(plan.shards, job.work, lambda _: sink, tally)
    tally.conclude()
    tell(tally, job)
    return tally, digest_of(sink.summary.contents, job.namer)


def tell(tally: Tally, job: Job) -> None:
    """The last line of a run."""
    rate = f", {tally.rate:.1f} a second on {backend(job.model)}" if tally.made else ""
    console.info(f"{tally.sentence()}{rate}", **tally.counts())


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM, as schedulers send it, stops a run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(tally: Tally) -> int:
    return SOME_FAILED if tally.failed else 0


def finished_report(out: Path, job: Job, failed: int) -> dict:
    """The JSON report of a run that found its work done before, `failed` files of it listed as failures."""
    from ..tokens.store import open_tokens

    files = sum(len(source.names) or 1 for source in job.found.sources) + len(job.found.failed)
    with open_tokens(out) as reader:
        tally = Tally(len(job.found.ignored), files - failed, failed, len(reader))
    return tally.counts() | job.info.to_metadata() | {"nothing_to_do": True}


def report_of(tally: Tally, job: Job) -> dict:
    """The JSON report of a run."""
    run = {
        "backend": backend(job.model),
        "images_per_second": round(tally.rate, 3),
        "made_now": tally.made,
        "seconds": {name: round(value, 3) for name, value in asdict(tally.seconds).items()},
        "warnings": console.warned,
    }
    return tally.counts() | job.info.to_metadata() | run | {"failures": tally.told}
