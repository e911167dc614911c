"""The training loop. It knows no model: a task gives phases, a dict of losses for each, and what to keep.

One step: for every active phase in turn, for every micro-batch, losses -> sum -> backward; then clip, schedule and one
optimiser step; then the task's own end of step (codebook update, clamps) and the average of the weights. Everything
drawn at random is drawn from (seed, step, rank), so a run that is killed goes on bit for bit from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..atomic import write_text
from ..errors import MeditokError, UsageError
from . import checkpoint
from .config import TrainConfig
from .data import Batch
from .distributed import World
from .optim import average_
from .sharding import average_whole_gradients, clip_gradients, hold_gradients
from .signals import Stop
from .speed import Speed
from .state import Run

LOG = "log.csv"
WEIGHTS = "model.safetensors"


class NonFiniteLossError(MeditokError, FloatingPointError):
    """A loss that is NaN or infinite; every process stops with the same message. `samples` are those of its batch."""

    def __init__(self, message: str, samples: range):
        super().__init__(message)
        self.samples = samples


class Task(Protocol):
    """What the loop asks of a task. `modules` maps each phase, in order, to the module its optimiser trains."""

    modules: dict[str, nn.Module]
    terms: tuple[str, ...]  # every loss there can be, in the order of the log
    averaged: str  # the phase whose module's weights are averaged and exported, and which `blocks` belong to

    def blocks(self) -> list[nn.Module]:
        """Parts that may be sharded over the processes, each on its own."""

    def optimizer(self, phase: str) -> torch.optim.Optimizer: ...

    def learning_rate(self, phase: str, step: int) -> float: ...

    def active(self, phase: str, step: int) -> bool: ...

    def prepare(self, batch: Batch) -> None:
        """Before a step: what is computed once for all steps to come, and is not of the work of this one."""

    def losses(self, phase: str, call: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted terms, float32 scalars; their sum is differentiated. `call` holds the modules as wrapped."""

    def finish_step(self, step: int) -> None: ...

    def health(self) -> dict[str, float]:
        """Extra columns of the log."""

    def export(self, path: Path, weights: dict[str, Tensor]) -> None:
        """Write the final weights."""


def start_over(out: Path) -> None:
    """Remove what an earlier run left in `out`, and nothing else."""
    for folder in (checkpoint.FOLDER, "tensorboard", "wandb"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for path in (out / LOG, out / WEIGHTS, out / "report.html", *out.glob("sheet-*.png")):
        path.unlink(missing_ok=True)


def train(
    task: Task,
    batches: Callable[[int], Generator[Batch]],
    config: TrainConfig,
    out: Path,
    world: World,
    *,
    made_of: dict[str, str] | None = None,
    report: Callable[[dict], None] = lambda row: None,
    sheet: Callable[[int], None] = lambda step: None,
) -> Path:
    """Run to `config.steps` and write model.safetensors; returns its path.

    `batches(step)` gives this rank's micro-batches from that step on; `made_of` tells hashes of what the run is made
    of, such as its list of images, and it goes on only with the same. NonFiniteLossError on every rank when any
    rank's loss is not finite; the last checkpoint stays. SIGINT or SIGTERM at any rank: a checkpoint after the
    running step, then KeyboardInterrupt.
    """
    run = Run(task, config, out, world, made_of or {})
    if run.resume():
        report({"resumed": run.step})
    with Stop() as stop, contextlib.closing(batches(run.step)) as source:
        return _train(run, source, report, sheet, stop)


def _train(run: Run, source: Iterator[Batch], report, sheet, stop: Stop) -> Path:
    task, config, out, world = run.task, run.config, run.out, run.world
    log = Log(out / LOG, run.step, write=world.first)
    call = run.wrapped()
    speed = Speed(world.device, config.precision, config.batch)
    while run.step < config.steps:
        torch.manual_seed(_mixed(config.seed, run.step, world.rank))
        micro = _read(run, source)
        with speed.step():
            row = _step(run, call, micro)
        speed.saw(frozenset(name for name in task.terms if row[name]))
        run.step += 1
        if run.step % config.log_every == 0 or run.step == config.steps:
            row = {"step": run.step} | _averaged(row | speed.rates(), world) | task.health()
            log.write(row)
            report(row)
        # Every process computes a sheet where the weights are spread over them.
        if (world.first or run.sharded) and (run.step % config.sheet_every == 0 or run.step == config.steps):
            sheet(run.step)
        stopping = run.step < config.steps and bool(world.largest(int(stop.asked)))
        if run.step < config.steps and (stopping or run.step % config.save_every == 0):
            run.save()
        if stopping:
            raise KeyboardInterrupt(f"stopped after step {run.step}, a checkpoint is kept; the same command goes on")
    run.save()
    weights = run.average or task.modules[task.averaged].state_dict()
    weights = run.gathered(weights) if run.sharded else weights
    if world.first:
        task.export(out / WEIGHTS, weights)
    world.wait()
    return out / WEIGHTS


def _read(run: Run, source: Iterator[Batch]) -> list[Batch]:
    """The micro-batches of a step. What one process fails to read ends all of them, with the same words."""
    failed, micro = [], []
    try:
        for _ in range(run.config.accumulate):
            micro.append(next(source))
            run.task.prepare(micro[-1])
    except MeditokError as error:
        failed = [error]
    if run.world.largest(len(failed)):
        raise run.world.gather(failed)[0]
    return micro


def _step(run: Run, call: dict[str, nn.Module], micro: list[Batch]) -> dict[str, float]:
    """One optimiser step of every active phase; the losses, averaged over the micro-batches."""
    config, task = run.config, run.task
    row: dict[str, float] = dict.fromkeys(("loss_total", *task.terms), 0.0)
    for index, (phase, module) in enumerate(task.modules.items()):
        if not task.active(phase, run.step):
            continue
        optimizer, scaler = run.optimizers[phase], run.scalers[phase]
        optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(micro):
            last = number == len(micro) - 1
            if run.sharded:
                hold_gradients(module, reduce=last)
            with _synchronised(call[phase], last=last):
                terms = task.losses(phase, call, batch.to(run.world.device), run.step)
                _check(terms, batch, run)
                total = torch.stack(list(terms.values())).sum()
                scaler.scale(total / len(micro)).backward()
            for name, value in terms.items():
                row[name] += value.item() / len(micro)
            row["loss_total"] += total.item() / len(micro) if index == 0 else 0.0
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate(phase, run.step) * group.get("share", 1.0)
        scaler.unscale_(optimizer)
        if run.spread(phase):
            average_whole_gradients(module, run.world)
            norm = clip_gradients(module, config.clip, run.world)
        else:
            norm = nn.utils.clip_grad_norm_(module.parameters(), config.clip)
        if index == 0:
            row |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": float(norm)}
        scaler.step(optimizer)
        scaler.update()
    task.finish_step(run.step)
    if run.average:
        average_(run.average, task.modules[task.averaged], config.ema, run.step)
    return row


def _synchronised(module: nn.Module, *, last: bool):
    """Gradients meet once a step: only the last micro-batch's backward pass reduces them."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return torch.enable_grad()


def _check(terms: dict[str, Tensor], batch: Batch, run: Run) -> None:
    """Every rank stops, with the same words, if a term of any rank is not finite."""
    values = torch.stack([value.detach() for value in terms.values()]).tolist()
    bad = next((place for place, value in enumerate(values) if not math.isfinite(value)), -1)
    worst = run.world.largest((bad + 1) * run.world.size + run.world.rank if bad >= 0 else -1)
    if worst < 0:
        return
    place, rank = divmod(worst, run.world.size)
    share = len(batch.samples)
    first = batch.samples[0] + (rank - run.world.rank) * share
    raise NonFiniteLossError(
        f"step {run.step + 1}: loss {list(terms)[place - 1]} is not finite on rank {rank}; checkpoints stay; lower the "
        f"learning rate, or look at its batch, samples {first} to {first + share - 1}",
        range(first, first + share),
    )


def _averaged(row: dict[str, float], world: World) -> dict[str, float]:
    values = torch.tensor(list(row.values()), dtype=torch.float64, device=world.device)
    return dict(zip(row, world.average_(values).tolist(), strict=True))


def _mixed(seed: int, step: int, rank: int) -> int:
    """A 64-bit seed of three counters (splitmix64's finaliser)."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB + 1) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


class Log:
    """log.csv: a header, then a row every `log_every` steps; rows past the step resumed from are dropped."""

    def __init__(self, path: Path, step: int, *, write: bool):
        self.path, self.active, self.columns = path, write, None
        if not write:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() and step else []
        kept = lines[:1] + [line for line in lines[1:] if line.endswith("\n") and _step_of(line) <= step]
        write_text(path, "".join(kept))

    def write(self, row: dict[str, float]) -> None:
        if not self.active:
            return
        if self.columns is None:
            self.columns = self._begin(list(row))
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writerow({key: value if isinstance(value, int) else f"{value:.6g}" for key, value in row.items()})

    def _begin(self, columns: list[str]) -> list[str]:
        """The header of the file; rows of a run that had other columns keep them, and are blank in those of today."""
        with open(self.path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            before, rows = reader.fieldnames or [], list(reader)
        columns += [name for name in before if name not in columns]
        if columns != before:
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(self.path, text.getvalue())
        return columns


def _step_of(line: str) -> int:
    try:
        return int(line.partition(",")[0])
    except ValueError:
        raise UsageError(f"{LOG}: its line {line.strip()[:40]!r} is not a step; move the file away") from None
