"""`meditok convert`: a published checkpoint becomes safetensors with its description."""

from __future__ import annotations

import click

from .console import console, write_json
from .options import speaking


@click.command(
    "convert",
    help="Turn a published checkpoint (.pth) into safetensors. The only command that unpickles, and only tensors.",
)
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--attention",
    type=click.Choice(["causal", "full"]),
    help="causal: MedITok, full: UniTok; needed where the file does not tell.",
)
@click.option("--name", help="Name written into the description.")
@speaking
def command(checkpoint: str, out: str, attention: str | None, name: str | None, json_out: str | None) -> int:
    from ..models.convert import convert

    path = convert(checkpoint, out, attention=attention, name=name)
    console.info(f"wrote {path}", private=True)
    write_json(json_out, {"out": str(path)} if json_out == "-" else {"bytes": path.stat().st_size})
    return 0
