"""The `meditok` command: one file a command, loaded when it is called."""

from __future__ import annotations

import importlib
import sys

import click

from .console import console, run_guarded

# Command -> what --help says of it. Kept here so that `meditok --help` imports none of them.
COMMANDS = {
    "tokenize": "Turn images into a token file.",
    "detokenize": "Turn a token file back into pictures and volumes.",
    "reconstruct": "Tokenise and detokenise in one go.",
    "export": "Write tokens as npz, safetensors, WebDataset or Hugging Face datasets.",
    "inspect": "Say what files are, and what would fail.",
    "demo": "Tokenise a few real scans and show the result.",
    "doctor": "Say what is installed, compiled and usable.",
    "train": "Train a tokenizer from a config and images.",
    "evaluate": "Measure how good tokenizers are, on images they have not seen.",
    "convert": "Turn a published checkpoint into safetensors.",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f".{name}", __name__).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from .. import __version__

        click.echo(f"meditok {__version__}: research use, not a medical device")
        ctx.exit(0)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version and exit.",
)
def group() -> None:
    """Medical images to discrete tokens and back.

    Research use, not a medical device.
    """


def run(arguments: list[str] | None = None) -> int:
    """Run the command line (without the program's name) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name need not be text, and is told all the same
            stream.reconfigure(errors="backslashreplace")
    return run_guarded(lambda: group.main(args=arguments, prog_name="meditok", standalone_mode=False))


def main() -> None:
    """Entry point of the `meditok` command."""
    sys.exit(run(sys.argv[1:]))


__all__ = ["COMMANDS", "console", "group", "main", "run"]
