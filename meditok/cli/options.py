"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields

import click

from ..errors import UsageError
from .console import console


def _together(*decorators: Callable) -> Callable:
    def decorate(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _choice(option: str, values: str, help: str, default: str | None = None, **more) -> Callable:
    """An option of a few values, given as "a b c"; its default is shown where there is one."""
    return click.option(
        option, type=click.Choice(values.split()), default=default, show_default=bool(default), help=help, **more
    )


def _flag(option: str, help: str) -> Callable:
    return click.option(option, is_flag=True, help=help)


def _manner(option: str, help: str) -> Callable:
    """A flag that sets the field of its name on the console, before anything is said."""

    def callback(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        setattr(console, parameter.name, value)

    return click.option(option, is_flag=True, expose_value=False, callback=callback, is_eager=True, help=help)


def report_file(ctx: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """A name that a report can be written to; "-" is stdout, which takes JSON only."""
    if value is None or (value == "-" and option.name == "json_out"):
        return value
    if value == "-" or os.path.isdir(value) or not os.path.isdir(os.path.dirname(value) or "."):
        raise UsageError(f"{option.opts[0]} {value}: not a file name in a folder that is there; correct the path")
    return value


def _backend(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value:
        os.environ["MEDITOK_BACKEND"] = value  # read once, when the compiled core is first wanted


reading = _together(
    click.option(
        "--modality",
        metavar="CODE",
        help="For files that do not state it: ct, mr, us, xr, mg, nm, "
        "pt, fundus, endoscopy, dermoscopy, histology, microscopy, oct, other.",
    ),
    click.option(
        "--window",
        default="auto",
        metavar="WINDOW",
        show_default=True,
        help="auto, file, full, percentile[:P:Q], LOW:HIGH, or for CT default, soft-tissue, lung, bone.",
    ),
    click.option("--window-index", type=int, default=0, help="Which of several windows in a DICOM header."),
    click.option("--ct-bias", type=float, help="What was added to HU in a 16-bit picture, e.g. 1024."),
    _choice("--nonfinite", "error zero min", "What to do with NaN and infinite values.", "error"),
    click.option("--bits", type=int, help="Significant bits of a PNG or TIFF."),
    _choice("--plane", "axial coronal sagittal native", "How volumes are sliced.", "axial"),
    click.option("--series", help="Only this SeriesInstanceUID or SeriesNumber."),
    click.option("--frame", type=int, help="Only this frame or slice, counted from 0."),
    click.option("--time-index", type=int, help="Which time point of a 4-D volume."),
    _flag("--include-secondary", "Also take secondary captures and localisers."),
    click.option("--assume-syntax", metavar="UID", help="Transfer syntax of DICOM files that do not state it."),
    _flag("--assume-affine", "Accept NIfTI files without orientation."),
)

fitting = _together(
    _choice("--fit", "pad stretch crop tile", "How pictures become squares.  [default: pad]"),
    click.option("--size", type=int, help="Pixels a side, a multiple of 16.  [default: the model's]"),
    _choice("--preset", "published", "Fit as the published batch script does."),
)

computing = _together(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    _choice("--precision", "fp32 tf32 bf16 fp16 int8 fp8", "", "fp32"),
    _choice(
        "--backend",
        "auto native triton reference",
        "Which kernels run.  [default: auto]",
        callback=_backend,
        is_eager=True,
        expose_value=False,
    ),
)

modelling = _together(
    click.option(
        "--model",
        default="tiny",
        show_default=True,
        metavar="NAME|DIR|FILE",
        help="Bundled model, directory or .safetensors file.",
    ),
    computing,
)

batching = _together(
    click.option("--batch-size", type=int, help="Pictures a pass.  [default: 16]"),
    _flag("--no-stable", "Let ids depend on the batch, for speed."),
)

exporting = _together(
    click.option(
        "--as",
        "fmt",
        type=click.Choice(["png", "png16", "nifti", "npy"]),
        help="Format.  [default: NIfTI for volumes, PNG for other pictures]",
    ),
    _choice(
        "--values",
        "display native",
        "8-bit display values, or the source's unit.  [default: native in NIfTI and npy, else display]",
    ),
)

naming = _together(
    click.option("--columns", default="", metavar="A,B", help="Manifest columns to copy (they may hold PHI)."),
    _flag("--keep-names", "Write names and paths instead of keyed hashes."),
)

failing = _choice("--on-error", "fail skip", "Stop at the first failing input, or list it and go on.", "fail")
overwriting = _flag("--overwrite", "Replace an output that is there.")
planning = _flag("--dry-run", "Read everything, write nothing, say what would fail.")

bulk = _together(
    click.option(
        "--workers",
        type=click.IntRange(0),
        help="Processes that read files and, on a CPU, run a small model; 0: none.  [default: by the machine]",
    ),
    click.option("--shard-size", type=int, default=8192, show_default=True, help="Rows a part of a folder, about."),
    _choice(
        "--engine",
        "local torchrun ray",
        "Who makes the parts: this process, the processes of torchrun, or actors of Ray.",
        "local",
    ),
)

speaking = _together(
    click.option(
        "--json",
        "json_out",
        metavar="FILE",
        callback=report_file,
        help="Write a report as JSON (- for stdout).",
    ),
    _manner("--log-json", "Log lines on stderr as JSON, without names."),
    _manner("--quiet", "Only warnings and errors."),
    _manner("--debug", "Show where an error came from."),
)


def sort(options: dict) -> tuple:
    """(ReadOptions, Settings, all other options) of a command's keywords."""
    from ..data.options import ReadOptions, read_options
    from ..pipeline import Settings

    reading = {f.name for f in fields(ReadOptions)}
    making = {f.name for f in fields(Settings)} | {"preset"}
    settings = {k: v for k, v in options.items() if k in making}
    settings["columns"] = tuple(c.strip() for c in options.get("columns", "").split(",") if c.strip())
    settings["stable"] = not options.get("no_stable")
    rest = {k: v for k, v in options.items() if k not in reading | making}
    return read_options(**{k: v for k, v in options.items() if k in reading}), Settings.of(**settings), rest
