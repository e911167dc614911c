"""Reading everything without tokenising: what `inspect` prints and `--dry-run` predicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .console import console, write_json

if TYPE_CHECKING:
    from ..data import Discovery, Source
    from ..tokens.keys import Namer
    from .jobs import Job

TEXT_FIELDS = (
    "modality",
    "syntax",
    "height",
    "width",
    "frames",
    "window",
    "low",
    "high",
    "unit",
    "steps",
    "warnings",
    "error",
    "error_type",
    "exit_code",
)


@dataclass
class Probe:
    """Called with a source: its records, in one list. With a size they tell what fitting would fail on, too."""

    size: int | None = None
    mode: str = "pad"

    def __call__(self, source: Source) -> Iterator[list[dict]]:
        from ..bulk.reading import fitted_to

        check = partial(fitted_to, size=self.size, mode=self.mode) if self.size else None
        yield source.probe(check)


def scan(found: Discovery, probe: Probe | None = None, workers: int | None = None) -> list[dict]:
    """One record a file, as Source.probe gives them, those that failed already included."""
    from ..bulk.workers import default_workers, stream

    records = [
        {
            "name": str(path),
            "path": str(path),
            "frames": 0,
            "steps": [],
            "warnings": [],
            "error": str(error),
            "error_type": type(error).__name__,
            "exit_code": error.exit_code,
        }
        for path, error in found.failed
    ]
    with console.progress("reading", len(found.sources)) as advance:
        if workers is None:
            workers = default_workers(len(found.sources))
        with closing(stream(probe or Probe(), found.sources, workers)) as probed:
            for some in probed:
                records += some
                advance(1)
    return records


def counts(found: Discovery, records: list[dict]) -> dict[str, int]:
    """Files found = ok + failed + ignored, and pictures."""
    failed = sum(1 for record in records if record["error"])
    rows = sum(record["frames"] for record in records if not record["error"])
    return {
        "found": len(records) + len(found.ignored),
        "ok": len(records) - failed,
        "failed": failed,
        "ignored": len(found.ignored),
        "rows": rows,
    }


def predicted_code(records: list[dict], on_error: str) -> int:
    """What a run over these files would exit with."""
    from ..errors import BadInputError
    from .jobs import SOME_FAILED

    failures = [record for record in records if record["error"]]
    if len(failures) == len(records):
        return failures[0]["exit_code"] if failures and on_error == "fail" else BadInputError.exit_code
    if not failures:
        return 0
    return SOME_FAILED if on_error == "skip" else failures[0]["exit_code"]


def rehearse(job: Job, json_out: str | None) -> int:
    """Say what a run would do, write nothing but the report, and return what the run would."""
    records = scan(job.found, Probe(job.settings.size_for(job.model), job.settings.fit), job.workers)
    for record in records:
        if record["error"]:
            console.warning(f"would fail: {record['error']}", private=True)
    found = counts(job.found, records)
    console.info(
        f"dry run: found {found['found']} files: {found['ok']} ok, {found['failed']} would fail, "
        f"{found['ignored']} ignored; {found['rows']} pictures; nothing was written",
        **found,
    )
    write_json(json_out, report(job.found, records, job.namer, json_out))
    return predicted_code(records, job.on_error)


def report(found: Discovery, records: list[dict], namer: Namer, json_out: str | None) -> dict:
    """The JSON report: names and messages only on stdout or with --keep-names, else keyed hashes."""
    told = json_out == "-" or namer.keep_names
    files = []
    for record in records:
        shown = {"source": namer.name(record["name"])} | {key: record.get(key) for key in TEXT_FIELDS}
        if told:
            shown |= {"name": record["name"], "path": record["path"]}
        else:
            shown.pop("error")
            shown["warnings"] = len(record["warnings"])
        files.append(shown)
    ignored = [{"path": path, "reason": reason} if told else {"reason": reason} for path, reason in found.ignored]
    return counts(found, records) | {"files": files, "ignored_files": ignored}
