"""`meditok evaluate`: how good tokenizers are, on images they have not seen."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from . import options as opt
from .console import console, write_json

if TYPE_CHECKING:
    from ..data import Discovery
    from ..evaluate.codecs import TokenizerCodec
    from ..evaluate.held_out import HeldOut
    from ..evaluate.run import Evaluation, Plan
    from ..evaluate.text import TextCollector
    from .jobs import Tally


@click.command(
    "evaluate",
    help="Measure how good tokenizers are on held-out images. PATH: files, folders, globs, a manifest or tars, as for "
    "tokenize. Where a manifest or sidecar states splits, those of --split are taken; training images are refused.",
)
@click.argument("inputs", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--model",
    "models",
    multiple=True,
    default=("tiny",),
    show_default=True,
    metavar="NAME|DIR|FILE",
    help="Bundled model, directory or .safetensors file; several for a comparison.",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=click.Choice(["jpeg", "jpeg2000", "pca"]),
    help="Compare with JPEG or JPEG 2000 in as many bytes as the first model's ids, or with a PCA of patches fitted on "
    "the inputs' training rows. Several times for several.",
)
@click.option("--split", metavar="A,B", help="Which rows.  [default: val, or everything where no split is stated]")
@click.option("--group", default="group", show_default=True, metavar="COLUMN", help="What belongs together.")
@click.option("--draws", type=click.IntRange(100), default=1000, show_default=True, help="Bootstrap resamples.")
@click.option(
    "--perceptual",
    default="auto",
    show_default=True,
    metavar="NET",
    help="stlpips-alexnet, stlpips-vgg16, lpips-vgg16 (with its VGG16 file) or none; auto: the first, if it is here.",
)
@click.option("--perceptual-weights", default="", metavar="FILE", help="VGG16 of lpips-vgg16.")
@click.option(
    "--extractor",
    default="auto",
    show_default=True,
    metavar="NET",
    help="Of FID, given from 2,000 images on: efficientnet-lite0, stlpips-vgg16, biomedclip, timm:NAME or none; auto: "
    "the first, if it is here.",
)
@click.option("--extractor-weights", default="", metavar="FILE", help="Of biomedclip or timm:NAME.")
@click.option(
    "--probe", "probes", multiple=True, metavar="COLUMN", help="Classify features: modality, body_part, any column."
)
@click.option("--zero-shot", multiple=True, metavar="COLUMN", help="Classify by prompts; needs a text-aligned model.")
@click.option("--template", default="A {} image", show_default=True, help="Prompt of --zero-shot; {} is the class.")
@click.option("--retrieval", is_flag=True, help="Match images and captions; needs a text-aligned model.")
@click.option("--caption", default="caption", show_default=True, metavar="COLUMN", help="Of --retrieval.")
@click.option("--text-weights", default="", metavar="FILE", help="Of a text tower that no package ships.")
@click.option(
    "--html", metavar="FILE", callback=opt.report_file, help="Write a page with tables, charts and the worst pictures."
)
@click.option("--gallery", type=click.IntRange(0), default=3, show_default=True, help="Pictures a modality on it.")
@opt.computing
@opt.reading
@opt.fitting
@opt.failing
@opt.speaking
def command(inputs: tuple[str, ...], json_out: str | None, html: str | None, **options) -> int:
    from ..atomic import write_text
    from ..bulk.run import failure_record
    from ..evaluate.gallery import Gallery
    from ..evaluate.held_out import choose
    from ..evaluate.page import render
    from ..evaluate.run import Evaluation
    from ..evaluate.table import table
    from ..tokens.keys import Namer
    from . import jobs

    reading, settings, options = opt.sort(options)
    namer = Namer()
    console.use_names(namer.digest)
    found = jobs.find_inputs(inputs, reading, jobs.outputs_of(html, json_out))
    held = choose(found, options["split"])
    for warning in held.warnings:
        console.warning(warning)
    tally = jobs.Tally(len(found.ignored) + held.left_out, record=partial(failure_record, namer=namer))
    tally.on_error = options["on_error"]
    with jobs.stoppable():
        _tell_failed(found, tally)
        plan = _plan(reading, settings, options, held)
        models, seen = _models(options, settings.size)
        codecs = [*models, *_baselines(options, models[0], held, plan)]
        probes, texts = _collectors(options, models, plan)
        gallery = Gallery(options["gallery"], namer)
        watchers = [each for each in (probes, texts, gallery if html else None) if each is not None]
        evaluation = Evaluation(held, codecs, plan, seen, watchers)
        _walk(evaluation, tally)
        result = tally.counts() | evaluation.record()
        if probes:
            result["probes"] = probes.results(plan.bootstrap)
        if texts:
            result["texts"] = texts.results(plan.bootstrap)
        result["failures"] = tally.told
    if html:
        write_text(html, render(result, {codec.name: codec.counts for codec in models}, gallery.worst_first()))
    if json_out != "-":
        click.echo(table(result))
    console.info(f"{tally.sentence()}; research use, not a medical device", **tally.counts())
    write_json(json_out, result)
    return jobs.exit_code(tally)


def _tell_failed(found: Discovery, tally: Tally) -> None:
    for name, error in found.failed:
        tally.fail(str(name), error)


def _plan(reading, settings, options: dict, held: HeldOut) -> Plan:
    """What to measure; metrics whose parts are not here are withheld, with the reason, unless they were asked for."""
    from .._lazy import require
    from ..errors import MissingPartError
    from ..evaluate.extractors import MIN_IMAGES, Perceptual, load_extractor
    from ..evaluate.run import Plan
    from ..evaluate.summary import Bootstrap

    withheld: dict[str, str] = {}

    def part(metric: str, asked: str, default: str, load):
        if asked == "none":
            return None
        try:
            return load(default if asked == "auto" else asked)
        except MissingPartError as error:
            if asked != "auto":
                raise
            withheld[metric] = str(error)
            return None

    torchmetrics = part("ms_ssim", "auto", "torchmetrics", lambda name: require(name, "MS-SSIM"))
    perceptual = part(
        "st_lpips",
        options["perceptual"],
        "stlpips-alexnet",
        lambda name: Perceptual(name, options["perceptual_weights"]),
    )
    extractor, images = None, sum(source.count() for source in held.sources)
    if options["extractor"] != "none" and images < MIN_IMAGES:
        withheld["fid"] = f"{images} images; it is given from {MIN_IMAGES} on"
    elif torchmetrics:
        extractor = part(
            "fid",
            options["extractor"],
            "efficientnet-lite0",
            lambda name: load_extractor(name, options["extractor_weights"]),
        )
    for metric, why in withheld.items():
        console.warning(f"{metric} is withheld: {why}")
    return Plan(
        reading,
        settings,
        Bootstrap(options["draws"]),
        options["group"],
        bool(torchmetrics),
        perceptual,
        extractor,
        withheld,
    )


def _models(options: dict, size: int | None) -> tuple[list[TokenizerCodec], dict[str, frozenset[str]]]:
    """The models, and the fingerprints of what each was trained on as far as it says."""
    from ..evaluate.codecs import TokenizerCodec, name_apart
    from ..models.files import data_record
    from .jobs import load_model

    names = list(dict.fromkeys(options["models"]))
    loaded = [load_model(name, options["device"], options["precision"]) for name in names]
    codecs = name_apart([TokenizerCodec(model, size) for model in loaded])
    records = [data_record(name) for name in names]
    for codec, record in zip(codecs, records, strict=True):
        if rows := record.get("unlisted"):
            console.warning(
                f"{codec.name} was trained on {rows} rows of token files, too, which do not tell their images: only "
                "you can say whether they are among these"
            )
    return codecs, {c.name: frozenset(r.get("files", ())) for c, r in zip(codecs, records, strict=True)}


def _baselines(options: dict, first: TokenizerCodec, held: HeldOut, plan: Plan) -> list:
    """Codecs at the bytes of the first model's ids."""
    from ..data import fit
    from ..evaluate.baselines import PatchPca, PillowCodec
    from ..evaluate.held_out import shared_groups

    shared, groups = shared_groups(held, plan.group)
    if groups:
        console.warning(f"{groups} groups are in the evaluated split and in train: they tell too much of each other")
    found: list = []
    for name in dict.fromkeys(options["baselines"]):
        if name != "pca":
            found.append(PillowCodec(name, first.side, first.bytes_of))
            continue
        kept = [source for source in held.training if source not in shared]
        with console.progress("fitting the PCA", len(kept)) as advance:
            found.append(
                PatchPca(first.side, first.bytes_of).fit(
                    fit(image, first.side, plan.settings.fit)[0] for image in _pictures(kept, advance)
                )
            )
    return found


def _pictures(sources, advance):
    """Every picture of the sources; the first that cannot be read raises its error."""
    for source in sources:
        for row in source.rows():
            if row.error is not None:
                raise row.error
            yield row.image
        advance(1)


def _collectors(options: dict, models: list[TokenizerCodec], plan: Plan) -> tuple:
    """(probes, texts), None for what was not asked for. MissingPartError: a model without a text side."""
    from ..evaluate.probes import Collector

    mode = plan.settings.fit
    probes = Collector(models, options["probes"], mode, plan.group) if options["probes"] else None
    texts: TextCollector | None = None
    if options["zero_shot"] or options["retrieval"]:
        from ..evaluate.text import TextCollector

        for codec in models:
            codec.model.text_weights = options["text_weights"]
        caption = options["caption"] if options["retrieval"] else None
        texts = TextCollector(models, options["zero_shot"], caption, options["template"], mode, plan.group)
    return probes, texts


def _walk(evaluation: Evaluation, tally: Tally) -> None:
    """Score everything. BadInputError: nothing was good; with --on-error fail, the first failure."""
    total = sum(source.count() for source in evaluation.held.sources)
    with console.progress("evaluating", total) as tally.advance:
        for outcome in evaluation:
            if outcome.error is not None:
                tally.fail(outcome.name, outcome.error)
                continue
            tally.ok += 1
            tally.rows += outcome.rows
            tally.advance(outcome.rows)
    tally.conclude()
