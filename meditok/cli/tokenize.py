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
    "manifest, or WebDataset tars. OUT: one file if it ends in .parquet, else a folder of parts.",
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
@click.option("--shard-size", type=int, default=8192, show_default=True, help="Rows a part of a folder.")
@opt.speaking
def command(inputs: tuple[str, ...], out: str | None, json_out: str | None, dry_run: bool, **options) -> int:
    from ..errors import UsageError
    from . import jobs

    if out is None and not dry_run:
        raise UsageError("tokenize: no output; name one with -o (OUT.parquet or a folder), or pass --dry-run")
    if out == json_out == "-":
        raise UsageError("tokenize: -o - and --json - both want stdout; give one of them a file")
    reading, settings, options = opt.sort(options)
    job = jobs.start(inputs, reading, settings, options, outputs=jobs.outputs_of(out, json_out))
    if out is None:
        return rehearse(job, json_out)
    if out != "-":
        return _tokenize(job, Path(out), options, json_out, dry_run=dry_run)
    with tempfile.TemporaryDirectory(prefix="meditok-") as folder:
        target = Path(folder) / "tokens.parquet"
        code = _tokenize(job, target, options, json_out, dry_run=dry_run)
        if target.exists():
            with open(target, "rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
    return code


def _tokenize(job, out: Path, options: dict, json_out: str | None, *, dry_run: bool) -> int:
    from ..tokens import store
    from . import jobs

    single = store.is_single_file(out)
    sharding = {} if single else {"shard_size": options["shard_size"]}
    digest = job.digest(**sharding)
    earlier = store.plan_output(out, digest, overwrite=options["overwrite"])
    if earlier is not None:
        console.info(f"{out}: nothing to do, made of the same inputs and options before", private=True)
        write_json(json_out, jobs.finished_report(out, job, earlier))
        return jobs.SOME_FAILED if earlier else 0
    if dry_run:
        return rehearse(job, json_out)
    if single:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = store.TokenWriter(out, job.info, job.settings.columns)
    else:
        writer = store.StoreWriter(out, job.info, job.settings.columns, **sharding)
    try:
        tally = jobs.tokenize_into(writer.write, job)
        store.write_failures(out, jobs.failure_records(tally, job.namer))
        writer.close(digest)
    except BaseException:
        writer.abort()
        raise
    write_json(json_out, jobs.report_of(tally, job, json_out))
    return jobs.exit_code(tally)
