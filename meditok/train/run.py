"""One training run from a config: data found and checked, task built, loop run, sheets drawn."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from ..atomic import atomic_path, write_text
from ..models.config import PATCH
from ..models.files import DATA_FILE
from . import checkpoint, distributed, loop
from .config import TrainConfig
from .data import Batch, Samples, batches, held_out
from .items import Item, TokenRows, check_items, data_record, find_items, list_hash, read
from .report import write_report
from .start import principal_components
from .state import setting
from .tasks.alignment import Alignment
from .trackers import trackers

SHEET_IMAGES = 8
CONFIG_FILE = "config.json"


def start(
    config: TrainConfig,
    out: Path,
    *,
    device: str = "auto",
    fresh: bool = False,
    report: Callable[[dict], None],
    say: Callable[[str], None] = lambda doing: None,
) -> Path:
    """Train to the end, or go on where an interrupted run of the same settings stopped; returns the weights' path.

    Every image is looked at before the first step. report: told each row of the log, and {"resumed": step} first where
    the run goes on; say: told what is done before that. Errors as find_items, check_items, checkpoint.newest and
    loop.train.
    """
    with distributed.world(device) as world:
        # First what is not here, which need not wait for the data.
        kinds = trackers(config)
        task = Alignment(config, world)
        say("looking for images")
        items = find_items(config, world)
        task.whole = lambda place: read(items[place], None)
        stored = items.info if isinstance(items, TokenRows) else None
        if stored:
            stored.check_model(task.modules["generator"].core, config.data)
        if fresh and world.first:
            loop.start_over(out)
        world.wait()
        begun = bool(world.largest(int(bool(checkpoint.existing(out)))))
        known = bool(world.largest(int((out / DATA_FILE).exists())))
        if not (begun and known):
            say(f"looking at {len(items):,} images")
        if config.check == "read" and not begun:
            check_items(items, config, world)
        record = None if begun and known else data_record(items, config, world)
        made_of = {"the images it is trained on": list_hash(items)}
        if config.init:
            made_of["the weights of --init"] = task.modules["generator"].core.hash
        if config.start and not begun:
            say("fitting the start")
            fit_start(task, items, config)
        if world.first:
            out.mkdir(parents=True, exist_ok=True)
            if not begun:  # what a run was begun with holds; other settings are refused
                write_text(out / CONFIG_FILE, _as_json(config, items))
            if record:
                write_text(out / DATA_FILE, json.dumps(record, indent=1) + "\n")
        told = [kind(out, config) for kind in kinds] if world.first else []
        shown = held_out(items, config, SHEET_IMAGES)

        def tell(row: dict) -> None:
            for each in (report, *(tracker.row for tracker in told)):
                each(row)

        def sheet(step: int) -> None:
            pictures = pictures_of(task, shown, stored and stored.grid)
            if world.first:
                path = out / f"sheet-{step:08d}.png"
                write_sheet(pictures, path)
                for tracker in told:
                    tracker.sheet(path, step)

        with contextlib.ExitStack() as closing, _naming(items, config):
            for tracker in told:
                closing.callback(tracker.close)
            path = loop.train(
                task,
                lambda step: batches(items, config, start=step, rank=world.rank, world=world.size),
                config,
                out,
                world,
                made_of=made_of,
                report=tell if world.first else lambda row: None,
                sheet=sheet,
            )
        if world.first:
            modalities = Counter(item.modality for item in items)
            write_report(out, config, modalities=modalities, cards=task.cards(), setting=setting(world))
        return path


@contextlib.contextmanager
def _naming(items: list[Item], config: TrainConfig) -> Iterator[None]:
    """A loss that is not finite told with the names of the pictures of its batch."""
    try:
        yield
    except loop.NonFiniteLossError as error:
        samples = Samples(items, config)
        names = list(dict.fromkeys(items[samples.pick(sample)].name for sample in error.samples))
        more = f" and {len(names) - SHEET_IMAGES} more" if len(names) > SHEET_IMAGES else ""
        message = f"{error}: {', '.join(names[:SHEET_IMAGES])}{more}"
        raise loop.NonFiniteLossError(message, error.samples) from None


def fit_start(task: Alignment, items: list[Item], config: TrainConfig) -> None:
    """Weights fitted to the run's first samples: the same on every rank."""
    samples = Samples(items, config)
    images = [samples[i][0] for i in range(-(-config.start_patches * PATCH**2 // config.size**2))]
    torch.manual_seed(config.seed)
    principal_components(task.modules["generator"].core, images)


def _as_json(config: TrainConfig, items: list[Item]) -> str:
    record = {"config": config.record(), "images": len(items), "list_sha256": list_hash(items)}
    return json.dumps(record, indent=1) + "\n"


def pictures_of(task: Alignment, batch: Batch, grid: tuple[int, int] | None) -> list[torch.Tensor]:
    """Images (B, 3, S, S) and their reconstructions; of tokens, on `grid`, what they decode to alone."""
    core = task.modules["generator"].core
    training = core.training
    core.eval()
    if batch.tokens is None:
        pictures = [batch.images, core.reconstruct(batch.images.to(core.device)).cpu()]
    else:
        pictures = [core.detokenize(batch.tokens, grid).cpu()]
    core.train(training)
    return pictures


def write_sheet(pictures: list[torch.Tensor], path: Path) -> None:
    """Batches (B, 3, S, S), each a row, as one PNG."""
    from PIL import Image

    from ..data.windows import to_display8

    rows = [torch.cat(list(to_display8(images)), dim=2) for images in pictures]
    sheet = torch.cat(rows, dim=1).permute(1, 2, 0).contiguous().numpy().astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
