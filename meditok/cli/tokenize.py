"""`meditok tokenize`: images to a token file or store."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import click

from . import options as opt
from .console import console, write_json
from .scan import rehearse


@click.command(
    "tokenize",
    help="Turn images into tokens. IN: files, folders, globs, a CSV or Parquet "
    "manifest, or WebDataset tars. OUT: one file if it ends in .parquet, else a folder of parts; "
    "the same command again finishes a folder that was interrupted. Ctrl-C and SIGTERM keep finished parts and exit "
    "with 130.",
)
@click.argument("inputs", nargs=-1, required=True, metavar="IN...")
@click.option("-o", "--output", "out", metavar="OUT", help="Parquet file, folder, or - for stdout.")
@opt.modelling
@opt.batching
@opt.reading
@opt.fitting
@opt.naming
@opt.failing
@opt.overwriting
@opt.planning
@opt.bulk
@opt.speaking
def command(inputs: tuple[str, ...], out: str | None, json_out: str | None, dry_run: bool, **options) -> int:
    from ..errors import UsageError
    from ..tokens.store import is_single_file
    from . import jobs, store_run

    if not (out or (out is None and dry_run)):
        raise UsageError("tokenize: no output; name one with -o (OUT.parquet or a folder), or pass --dry-run")
    if out == json_out == "-":
        raise UsageError("tokenize: -o - and --json - both want stdout; give one of them a file")
    reading, settings, options = opt.sort(options)
    single = out == "-" or (out is not None and is_single_file(out))
    if single and options["engine"] != "local":
        raise UsageError(f"--engine {options['engine']}: writes a folder of parts; name one with -o")
    with jobs.stoppable():
        if out is not None and not single:
            return store_run.run(inputs, Path(out), reading, settings, options, json_out, dry_run=dry_run)
        job = jobs.start(inputs, reading, settings, options, outputs=jobs.outputs_of(out, json_out))
        if out is None:
            return rehearse(job, json_out)
        if out != "-":
            return _into_file(job, Path(out), options, json_out, dry_run=dry_run)
        with tempfile.TemporaryDirectory(prefix="meditok-") as folder:
            target = Path(folder) / "tokens.parquet"
            code = _into_file(job, target, options, json_out, dry_run=dry_run)
            if target.exists():
                with open(target, "rb") as file:
                    shutil.copyfileobj(file, sys.stdout.buffer)
        return code


def _into_file(job, out: Path, options: dict, json_out: str | None, *, dry_run: bool) -> int:
    from ..tokens import store
    from . import jobs

    plan = job.plan()
    earlier = store.plan_file(
        out, plan.digest, lambda: plan.shards[0].contents(job.namer), overwrite=options["overwrite"]
    )
    if earlier is not None:
        console.info(f"{out}: nothing to do, made of the same inputs and options before", private=True)
        write_json(json_out, jobs.finished_report(out, job, earlier))
        return jobs.SOME_FAILED if earlier else 0
    if dry_run:
        return rehearse(job, json_out)
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = store.TokenWriter(out, job.info, job.settings.columns)
    try:
        tally, contents = jobs.tokenize_into(writer, job, plan, names=json_out == "-")
        store.write_failures(out, tally.failures)
        writer.close(store.file_settings(plan.digest, contents))
    except BaseException:
        writer.abort()
        raise
    write_json(json_out, jobs.report_of(tally, job))
    return jobs.exit_code(tally)
