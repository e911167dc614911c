"""`meditok reconstruct`: tokenise and detokenise in one go."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from . import options as opt
from .console import write_json
from .scan import rehearse


@click.command(
    "reconstruct",
    help="Turn images into tokens and straight back: what the model keeps of them. "
    "Same files as tokenize followed by detokenize.",
)
@click.argument("inputs", nargs=-1, required=True, metavar="IN...")
@click.option("-o", "--output", "out", metavar="DIR", help="Folder to write to.")
@opt.modelling
@opt.batching
@opt.reading
@opt.fitting
@opt.naming
@opt.exporting
@opt.failing
@opt.overwriting
@opt.planning
@opt.speaking
def command(inputs: tuple[str, ...], out: str | None, json_out: str | None, dry_run: bool, **options) -> int:
    from ..errors import UsageError
    from ..tokens.format import TokenWriter
    from ..tokens.store import write_failures
    from . import jobs
    from .detokenize import decode_file

    if out is None and not dry_run:
        raise UsageError("reconstruct: no output; name a folder with -o, or pass --dry-run")
    if out is not None and os.path.isfile(out):
        raise UsageError(f"{out}: a file of that name is in the way; name a folder")
    reading, settings, options = opt.sort(options)
    job = jobs.start(inputs, reading, settings, options, outputs=jobs.outputs_of(out, json_out))
    if dry_run:
        return rehearse(job, json_out)
    # Through a real token file, so that the result is that of the two commands, and memory stays bounded.
    with tempfile.TemporaryDirectory(prefix="meditok-") as folder:
        tokens = Path(folder) / "tokens.parquet"
        with TokenWriter(tokens, job.info, settings.columns) as writer:
            tally, _ = jobs.tokenize_into(writer, job, job.plan(), names=json_out == "-")
        os.makedirs(out, exist_ok=True)
        written = decode_file(
            tokens,
            out,
            job.model,
            options["fmt"],
            options["values"],
            batch_size=settings.batch_size,
            overwrite=options["overwrite"],
        )
    if tally.failed:
        write_failures(out, tally.failures)
    write_json(json_out, jobs.report_of(tally, job) | written)
    return jobs.exit_code(tally)
