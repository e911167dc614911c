"""`meditok train`: a tokenizer from a config and images, on one device or many."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from .console import console, write_json
from .options import speaking

SHOWN = ("step", "images_per_s", "share_of_peak", "usage")  # told in words of their own, not as "name value"


@click.command(
    "train",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    help="Train a tokenizer. CONFIG: a TOML file, or meditok-stage1, meditok-stage2, tiny-stage1, tiny-stage2. Every "
    "setting of it can be given as --key=value, such as --data=PATH --steps=N --init=CKPT --seed=N. An interrupted run "
    "goes on when the same command is given again. Under torchrun, on all its processes.",
)
@click.argument("config", metavar="CONFIG")
@click.option("--out", required=True, metavar="DIR", help="Checkpoints, log.csv, sheets, report and model.safetensors.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--fresh", is_flag=True, help="Start anew, removing what an earlier run left in DIR.")
@speaking
@click.pass_context
def command(ctx: click.Context, config: str, out: str, device: str, fresh: bool, json_out: str | None) -> int:
    from ..train import run
    from ..train.config import load_config

    settings = load_config(config, _changes(ctx.args))
    console.quiet |= os.environ.get("RANK", "0") != "0"  # one process of many speaks; errors come from any
    with display(settings.steps) as shown, _alarms():
        path = run.start(settings, Path(out), device=device, fresh=fresh, report=shown, say=shown.say)
    console.info(f"wrote {path}", private=True)
    write_json(json_out, shown.last)
    return 0


def _changes(arguments: list[str]) -> list[str]:
    """--key=value arguments as key=value; anything else is refused by name."""
    from ..errors import UsageError

    for argument in arguments:
        if not argument.startswith("--") or "=" not in argument:
            raise UsageError(f"train: {argument!r} is no setting; write --key=value")
    return [argument[2:] for argument in arguments]


class Shown:
    """Says each row of the log in one line."""

    def __init__(self):
        self.last: dict = {}

    def say(self, doing: str) -> None:
        """What is done before the first step."""
        console.info(doing)

    def __call__(self, row: dict) -> None:
        if "resumed" in row:
            console.info(f"going on from step {row['resumed']}", step=row["resumed"])
            return
        self.last = row
        told = [f"{name} {value}" for name, value in numbers(row)] + rates(row)
        console.info(f"step {row['step']}: {', '.join(told)}", **row)


class Bar(Shown):
    """The same on a terminal: one bar, under it how fast it goes, and the numbers of the last row in columns."""

    def __init__(self, steps: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__()
        columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left")
        self.progress = Progress("{task.description}", *columns, speed_estimate_period=600)
        self.task = self.progress.add_task("training", total=steps)

    def say(self, doing: str) -> None:
        self.progress.update(self.task, description=doing)

    def __call__(self, row: dict) -> None:
        if "resumed" in row:
            self.progress.reset(self.task, completed=row["resumed"], description="training")
            return
        self.last = row
        self.progress.update(self.task, completed=row["step"], description="training")

    def __rich__(self):
        from rich.columns import Columns
        from rich.console import Group
        from rich.text import Text

        if not self.last:
            return self.progress
        # Values of one width, so that nothing moves from row to row.
        cells = [Text(f"{name} {value:<9}", no_wrap=True) for name, value in numbers(self.last)]
        return Group(self.progress, Text("  ".join(rates(self.last)), no_wrap=True), Columns(cells, padding=(0, 1)))


def numbers(row: dict) -> list[tuple[str, str]]:
    """Names and values of a row, but for what `rates` tells."""
    return [(name, f"{value:.4g}") for name, value in row.items() if name not in SHOWN]


def rates(row: dict) -> list[str]:
    """["38.1 images/s", "21% of peak", "codebook usage 97%"]; what a task does not tell is left out."""
    texts = {"images_per_s": "{:.1f} images/s", "share_of_peak": "{:.0%} of peak", "usage": "codebook usage {:.0f}%"}
    return [text.format(row[name]) for name, text in texts.items() if name in row]


@contextlib.contextmanager
def display(steps: int) -> Iterator[Shown]:
    """A live bar on a terminal, else a line a row."""
    plain = console.quiet or console.log_json or not sys.stderr.isatty()
    if plain or importlib.util.find_spec("rich") is None:
        yield Shown()
        return
    from rich.console import Console as RichConsole
    from rich.live import Live

    with Live(bar := Bar(steps), console=RichConsole(stderr=True)):
        yield bar


@contextlib.contextmanager
def _alarms() -> Iterator[None]:
    """What the package logs while training, such as a collapsed codebook, said as the command's own warnings."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.warning(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("meditok")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
