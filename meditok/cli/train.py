"""`meditok train`: a tokenizer from a config and images, on one device or many."""

from __future__ import annotations

from pathlib import Path

import click

from .console import console, write_json
from .options import speaking


@click.command(
    "train",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    help="Train a tokenizer. CONFIG: a TOML file, or meditok-stage1, meditok-stage2, tiny-stage1, tiny-stage2. Every "
    "setting of it can be given as --key=value, such as --data=PATH --steps=N --init=CKPT --seed=N. An interrupted run "
    "goes on when the same command is given again. Under torchrun, on all its processes.",
)
@click.argument("config", metavar="CONFIG")
@click.option("--out", required=True, metavar="DIR", help="Checkpoints, log.csv, sheets and model.safetensors.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--fresh", is_flag=True, help="Start anew, removing what an earlier run left in DIR.")
@speaking
@click.pass_context
def command(ctx: click.Context, config: str, out: str, device: str, fresh: bool, json_out: str | None) -> int:
    from ..train import run
    from ..train.config import load_config

    settings = load_config(config, _changes(ctx.args))
    with console.progress("training", settings.steps) as advance:
        shown = Shown(advance)
        path = run.start(settings, Path(out), device=device, fresh=fresh, report=shown)
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
    """Says each row of the log in one line, and moves the bar."""

    def __init__(self, advance):
        self.advance, self.last, self.step = advance, {}, 0

    def __call__(self, row: dict) -> None:
        if "resumed" in row:
            console.info(f"going on from step {row['resumed']}", step=row["resumed"])
            row = {"step": row["resumed"]}
        else:
            values = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "step")
            console.info(f"step {row['step']}  {values}", **row)
            self.last = row
        self.advance(row["step"] - self.step)
        self.step = row["step"]
