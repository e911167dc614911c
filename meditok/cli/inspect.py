"""`meditok inspect`: modality, syntax, size, window and errors of files, without tokenising them."""

from __future__ import annotations

import click

from . import options as opt
from .console import console, one_line, write_json


@click.command("inspect", help="Say of every file what it is, how it would be read, and what would fail.")
@click.argument("inputs", nargs=-1, required=True, metavar="IN...")
@opt.reading
@click.option("--keep-names", is_flag=True, help="Names instead of keyed hashes in a --json FILE.")
@opt.failing
@opt.speaking
def command(inputs: tuple[str, ...], json_out: str | None, keep_names: bool, on_error: str, **options) -> int:
    from ..tokens.keys import Namer
    from . import scan
    from .jobs import find_inputs, outputs_of

    reading, _, _ = opt.sort(options)
    namer = Namer(keep_names=keep_names)
    console.use_names(namer.digest)
    found = find_inputs(inputs, reading, outputs_of(None, json_out))
    records = scan.scan(found)
    if json_out != "-":
        _print_table(records)
        for record in records:
            for text in [*record["warnings"], *([record["error"]] if record["error"] else [])]:
                click.echo(one_line(text if record["path"] in text else f"{record['path']}: {text}"))
        for path, reason in found.ignored:
            click.echo(one_line(f"{path}: ignored, {reason}"))
    total = scan.counts(found, records)
    console.info(
        f"found {total['found']} files: {total['ok']} ok, {total['failed']} fail, {total['ignored']} "
        f"ignored; {total['rows']} pictures",
        **total,
    )
    write_json(json_out, scan.report(found, records, namer, json_out))
    return scan.predicted_code(records, on_error)


def _print_table(records: list[dict]) -> None:
    from .._lazy import require

    require("rich", purpose="the table of meditok inspect (--json - needs none)")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("file", "modality", "syntax", "size", "frames", "window", "low", "high", "unit", "result"):
        table.add_column(
            title, overflow="fold", justify="right" if title in ("size", "frames", "low", "high") else "left"
        )
    for record in records:
        size = f"{record['height']}x{record['width']}" if record.get("height") else ""
        low, high = (f"{record[k]:g}" if record.get(k) is not None else "" for k in ("low", "high"))
        table.add_row(
            Text(one_line(record["name"])),  # no markup
            record.get("modality") or "",
            record.get("syntax") or "",
            size,
            str(record["frames"] or ""),
            record.get("window") or "",
            low,
            high,
            record.get("unit") or "",
            record["error_type"] or "ok",
        )
    # A pipe has no width: give the table all it needs, so that no cell is folded into several lines.
    console_out = Console(highlight=False)
    Console(highlight=False, width=None if console_out.is_terminal else 240).print(table)
