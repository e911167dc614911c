"""What a command says: data on stdout, everything else on stderr; errors in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from ..errors import MeditokError, UsageError

INTERRUPTED = 130


@dataclass
class Console:
    """How this run speaks. Names and paths appear on the terminal only; logs carry keyed hashes."""

    quiet: bool = False
    debug: bool = False
    log_json: bool = False
    warned: int = 0
    _hasher: Callable[[str], str] | None = field(default=None, repr=False)

    def reset(self) -> None:
        self.__init__()

    def use_names(self, hasher: Callable[[str], str]) -> None:
        """How a path becomes the keyed hash that a log may hold."""
        self._hasher = hasher

    def info(self, message: str, *, private: bool = False, **fields) -> None:
        """Results in words; `fields` go to the JSON log, `private` says that the text names a file."""
        if not self.quiet:
            self._emit("info", message, fields, private=private)

    def warning(self, message: str, *, name: str = "", private: bool = False) -> None:
        """Something to know; `name` is the file it is about, `private` says that the text names a file."""
        self.warned += 1
        self._emit("warning", message, {}, name, private)

    def failure(self, error: MeditokError, *, name: str = "") -> None:
        """An input that failed while others go on."""
        fields = {"error": type(error).__name__, "exit_code": error.exit_code}
        self._emit("error", str(error), fields, name, private=True)

    def _emit(self, level: str, message: str, fields: dict, name: str = "", private: bool = False) -> None:
        if self.log_json:
            record = {"level": level} | fields
            if not private:
                record["message"] = message
            if name and self._hasher:
                record["source"] = self._hasher(name)
            click.echo(json.dumps(record), err=True)
            return
        prefix = "" if level == "info" else f"meditok: {level}: "
        about = f"{name}: " if name and name not in message else ""
        click.echo(f"{prefix}{one_line(about + message)}", err=True)

    @contextlib.contextmanager
    def progress(self, label: str, total: int | None, done: int = 0) -> Iterator[Callable[..., None]]:
        """A bar on stderr, on a terminal only: how many, images a second, time left, failures.

        Yields advance(step=1, failed=0). `done` were there before.
        """
        plain = self.quiet or self.log_json or not sys.stderr.isatty()
        if plain or importlib.util.find_spec("rich") is None:
            yield lambda step=1, failed=0: None
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        told = TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[failures]}")
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), *told
        with Progress(*columns, console=RichConsole(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total, completed=done, rate="", failures="")
            failures = 0

            def advance(step: int = 1, failed: int = 0) -> None:
                nonlocal failures
                failures += failed
                speed = bar.tasks[task].speed
                rate = f"{speed:.1f}/s" if speed else ""
                bar.update(task, advance=step, rate=rate, failures=f"{failures} failed" if failures else "")

            yield advance


console = Console()


def run_guarded(call: Callable[[], int | None]) -> int:
    """Run a command; every way it can end becomes an exit code and at most one line on stderr."""
    console.reset()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return int(call() or 0)
        except MeditokError as error:
            return _fail(error, str(error), error.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            return UsageError.exit_code
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            where = f" (see {context.command_path} --help)" if context else ""
            return _fail(error, error.format_message().rstrip(".") + where, UsageError.exit_code)
        except (KeyboardInterrupt, click.Abort) as interruption:
            kept = str(interruption) or str(interruption.__cause__ or "")  # click puts its own in place of Python's
            click.echo(f"meditok: interrupted; {kept or 'nothing unfinished was kept'}", err=True)
            return INTERRUPTED
        except BrokenPipeError:
            # Whoever read stdout has left; what Python still flushes at exit goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return _fail(error, f"{where}{error.strerror or type(error).__name__}", 1)
        except Exception as error:
            if "OutOfMemory" in type(error).__name__ or isinstance(error, MemoryError):
                return _fail(error, "out of memory; pass a smaller --batch-size, or --device cpu", 1)
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(at.filename).name}:{at.lineno}"
            return _fail(
                error,
                f"internal error ({type(error).__name__} at {place}); this is a defect of meditok, please "
                "report it; --debug shows where",
                1,
            )


def _fail(error: BaseException, message: str, code: int) -> int:
    if console.debug:
        # Frames and source lines only: messages of libraries may quote header values.
        for block in traceback.format_tb(error.__traceback__):
            click.echo(block.rstrip(), err=True)
    if console.log_json:
        meaning = (type(error).__doc__ or "").split("\n")[0]
        record = {"level": "error", "error": type(error).__name__, "meaning": meaning, "exit_code": code}
        click.echo(json.dumps(record), err=True)
    else:
        click.echo(f"meditok: error: {one_line(message)}", err=True)
    return code


def one_line(text: str) -> str:
    """Text for a terminal: one line, and what a file's name could command it with made visible."""
    text = " ".join(text.split())
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    # Warnings of other packages may quote header values; ours do not.
    if "meditok" in Path(filename).parts or str(message).startswith("meditok"):
        console.warning(str(message), private=True)


def write_json(target: str | None, value: object) -> None:
    """Write `value` as JSON to a file, or to stdout for "-"; nothing for None."""
    if target is None:
        return
    text = json.dumps(value, indent=1, default=str) + "\n"
    if target == "-":
        click.echo(text, nl=False)
        return
    from ..atomic import write_text

    write_text(target, text)
