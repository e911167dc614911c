"""`meditok tokenize` into a folder of parts: what is there already, who makes the rest, and how it ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..bulk import folder as store
from ..errors import MeditokError, UsageError
from ..tokens.store import FAILURES, read_index, write_index
from . import jobs
from .console import console, write_json
from .scan import rehearse

if TYPE_CHECKING:
    from ..bulk.engines import Engine
    from ..bulk.plan import Plan
    from ..data import ReadOptions
    from ..pipeline import Settings

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run(
    inputs: Sequence[str],
    out: Path,
    reading: ReadOptions,
    settings: Settings,
    options: dict,
    json_out: str | None,
    *,
    dry_run: bool,
) -> int:
    """Make, finish or leave the store `out`; returns the exit code."""
    from ..bulk.engines import engine_of

    with engine_of(options["engine"]) as engine:
        console.quiet |= not engine.leads  # one process tells what all of them do
        try:
            options = options | {"device": engine.device(options["device"])}
            outputs = jobs.outputs_of(str(out), json_out)
            job = jobs.start(inputs, reading, settings, options, outputs=outputs, processes=engine.neighbours)
            plan = job.plan(options["shard_size"])
            target = store.StoreFolder(out, job.info, plan.digest)
            if not engine.leads:
                return engine.follow(plan, job.work, target, jobs.Tally(record=_unsaid, on_error=job.on_error))
            code = _lead(job, plan, target, options, json_out, engine, dry_run=dry_run)
        except MeditokError as error:
            engine.release(error.exit_code)
            raise
        engine.release(code)
        return code


def _unsaid(*_, **__) -> dict:
    return {}


def _lead(
    job: jobs.Job,
    plan: Plan,
    target: store.StoreFolder,
    options: dict,
    json_out: str | None,
    engine: Engine,
    *,
    dry_run,
) -> int:
    out, overwrite = target.out, options["overwrite"]
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(store.lock(out))
            overwrite &= not store.finish_swap(out)
        kept = _unchanged(target.survey(overwrite=overwrite), job, plan, out)
        if target.complete:
            return _nothing_to_do(job, plan, target, kept, json_out, dry_run=dry_run)
        if dry_run:
            return rehearse(job, json_out)
        if job.on_error == "fail":  # parts with failures come from a run that skipped them
            kept = {index: record for index, record in kept.items() if not record.failures}
        try:
            target.open(kept)
            tally = _make(job, plan, target, kept, options, json_out, engine)
        except BaseException as error:
            raise _explained(error, out, target.abandon()) from error
    write_json(json_out, jobs.report_of(tally, job))
    return jobs.exit_code(tally)


def _unchanged(records: dict, job: jobs.Job, plan: Plan, out: Path) -> dict:
    """The finished parts, each with the present stamp of its inputs. UsageError: the bytes of some are others now."""
    for index, record in records.items():
        shard = plan.shards[index]
        stamp = shard.stamp(job.namer)
        if stamp == record.stamp:
            continue
        if shard.contents(job.namer) != record.inputs:
            raise UsageError(
                f"{out}: inputs of {record.file} have changed since it was made; pass --overwrite to make all parts "
                "again, or choose another output"
            )
        record.stamp = stamp
    return records


def _nothing_to_do(
    job: jobs.Job, plan: Plan, target: store.StoreFolder, kept: dict, json_out: str | None, *, dry_run: bool
) -> int:
    index = read_index(target.out)
    entries = [kept[number].entry() for number in sorted(kept)]
    if not dry_run:
        if entries != index["parts"]:  # inputs were copied or touched: their new stamps save reading them next time
            write_index(target.out, job.info, entries, plan.digest, complete=True)
        target.tidy(kept.values())
    console.info(f"{target.out}: nothing to do, made of the same inputs and options before", private=True)
    failed = len((target.out / FAILURES).read_text(encoding="utf-8").splitlines())
    write_json(json_out, jobs.finished_report(target.out, job, failed))
    return jobs.SOME_FAILED if failed else 0


def _make(
    job: jobs.Job,
    plan: Plan,
    target: store.StoreFolder,
    kept: dict,
    options: dict,
    json_out: str | None,
    engine: Engine,
) -> jobs.Tally:
    from ..bulk.engines import Recipe

    tally = job.tally(names=json_out == "-")
    unread = list(tally.failures)
    missing = [shard for shard in plan.shards if shard.index not in kept]
    if kept:
        console.info(f"{len(kept)} of {len(plan.shards)} parts are there already; making the other {len(missing)}")
    done = sum(sum(plan.shards[index].pictures) for index in kept)
    recipe = Recipe(options["model"], options["precision"])
    with console.progress("tokenising", plan.pictures, done) as tally.advance:
        tally.seconds = engine.make(missing, job.work, target, tally, recipe, job.on_error)
    records = [kept.get(shard.index) or target.saved(shard.index) for shard in plan.shards]
    tally.settle(records)
    tally.made = tally.rows - sum(record.rows for record in kept.values())
    tally.conclude()
    target.finish(records, unread)
    jobs.tell(tally, job)
    return tally


def _explained(error: BaseException, out: Path, kept: int) -> BaseException:
    """The error that ends a run, with what was kept and how to go on."""
    if kept:
        parts = "part is" if kept == 1 else "parts are"
        how = f"{kept} finished {parts} kept in {out}; run the same command again to go on"
    else:
        how = "nothing was kept"
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(how)
    if isinstance(error, OSError) and error.errno in _FULL:
        return OSError(error.errno, f"{os.strerror(error.errno)}; free some space: {how}", str(out))
    return error
