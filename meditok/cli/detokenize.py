"""`meditok detokenize`: a token file to pictures and volumes."""

from __future__ import annotations

import os
from pathlib import Path

import click

from . import options as opt
from .console import console, write_json


@click.command(
    "detokenize",
    help="Turn a token file or store back into PNG pictures and NIfTI volumes. Needs only that file and the model.",
)
@click.argument("tokens", metavar="TOKENS", type=click.Path())
@click.option("-o", "--output", "out", metavar="DIR", required=True, help="Folder to write to.")
@opt.modelling
@click.option("--batch-size", type=int, default=16, show_default=True, help="Pictures a pass.")
@opt.exporting
@opt.overwriting
@opt.planning
@opt.speaking
def command(
    tokens: str,
    out: str,
    model: str,
    device: str,
    precision: str,
    batch_size: int,
    fmt: str | None,
    values: str | None,
    overwrite: bool,
    dry_run: bool,
    json_out: str | None,
) -> int:
    from ..errors import UsageError
    from .jobs import load_model, outputs_of

    real, source = Path(os.path.realpath(out)), Path(os.path.realpath(tokens))
    for given in outputs_of(out, json_out):
        if source in (path := Path(os.path.realpath(given)), *path.parents):
            raise UsageError(f"{given}: is the input, or in it; choose another output")
    if real.is_file():
        raise UsageError(f"{out}: a file of that name is in the way; name a folder")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: give at least 1")
    loaded = load_model(model, device, precision)
    counts = decode_file(tokens, out, loaded, fmt, values, batch_size=batch_size, overwrite=overwrite, dry_run=dry_run)
    write_json(json_out, counts)
    return 0


def decode_file(
    tokens: str | os.PathLike,
    out: str | os.PathLike,
    model,
    fmt: str | None,
    values: str | None,
    *,
    batch_size: int = 16,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, int]:
    """Decode a token file into a folder; every id is checked before the first file is written. Returns
    counts.
    """
    from ..tokens.export import PictureWriter
    from ..tokens.layout import plan_layout
    from ..tokens.restore import restore
    from ..tokens.store import open_tokens

    with open_tokens(tokens) as reader:
        reader.info.check_model(model, str(tokens))
        reader.check()
        layout = plan_layout(reader.descriptions(), fmt, values)
        for warning in layout.warnings:
            console.warning(warning, private=True)
        writer = PictureWriter(out, layout, values, overwrite=overwrite)
        if dry_run:
            console.info(f"{len(reader)} rows would be written as {layout.volumes()} volumes and pictures")
            return {"rows": len(reader), "volumes": layout.volumes()}
        with console.progress("decoding", len(reader)) as advance:
            for picture in restore(reader.batches(batch_size), reader.info, reader.descriptions(), model, str(tokens)):
                writer.write(picture)
                advance(1)
        counts = {"rows": len(reader), "pictures": writer.pictures, "volumes": writer.volumes}
    done = f"{counts['rows']} rows: {counts['pictures']} pictures and {counts['volumes']} volumes in {out}"
    console.info(done, private=True, **counts)
    if writer.kept:
        console.info(f"{writer.kept} files were there already, byte for byte the same")
    if writer.wrote_native:
        console.info("native values: what lay outside a row's window (low to high in the token file) is lost")
    return counts
