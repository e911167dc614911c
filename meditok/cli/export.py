"""`meditok export`: a token file or store in formats that others read."""

from __future__ import annotations

import click

from . import options as opt
from .console import console, write_json


@click.command(
    "export",
    help="Write a token file or store as one .npz or .safetensors file, as WebDataset tars (one .tar, or a folder of "
    "them), or as a Hugging Face dataset folder (hf).",
)
@click.argument("tokens", metavar="TOKENS", type=click.Path())
@click.option("-o", "--output", "out", metavar="OUT", required=True, help="File or folder to write.")
@click.option(
    "--to", type=click.Choice(["npz", "safetensors", "webdataset", "hf"]), help="Format.  [default: as OUT ends]"
)
@click.option("--shard-size", type=int, default=8192, show_default=True, help="Rows a tar of a folder.")
@opt.overwriting
@opt.speaking
def command(tokens: str, out: str, to: str | None, shard_size: int, overwrite: bool, json_out: str | None) -> int:
    from ..tokens.interchange import export
    from .jobs import outputs_of

    outputs_of(out, json_out)
    counts = export(tokens, out, to, shard_size=shard_size, overwrite=overwrite)
    console.info(
        f"{counts['rows']} rows in {counts['files']} files of {counts['bytes']} bytes: {out}", private=True, **counts
    )
    write_json(json_out, counts)
    return 0
