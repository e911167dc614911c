"""Checkpoints: a folder `step-00000006` with every tensor in one safetensors file and the rest in JSON.

A checkpoint appears whole under its name or not at all; nothing is pickled. What is drawn at random depends on (seed,
sample or step, rank) alone, so the step is all a run must know of its random state and of its place in the data.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..atomic import sync, write_text
from ..errors import BadInputError, UsageError
from .config import FREE, TrainConfig
from .sharding import like

FORMAT = 2
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")


def save(out: Path, step: int, tensors: dict[str, torch.Tensor], values: dict, *, keep: int) -> Path:
    """Write the state after `step` steps; the oldest beyond `keep` are removed once this one stands."""
    folder = out / FOLDER / f"step-{step:08d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, work / "state.safetensors"
    )
    sync(work / "state.safetensors")
    write_text(work / "state.json", json.dumps({"format": FORMAT, "step": step} | values, indent=1) + "\n")
    if folder.exists():  # of a run that went back to an earlier step
        shutil.rmtree(folder)
    os.replace(work, folder)
    sync(folder.parent)
    for old in existing(out)[:-keep]:
        shutil.rmtree(old)
    return folder


def existing(out: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in (out / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)


def newest(out: Path, config: TrainConfig, made_of: dict[str, str]) -> tuple[dict[str, torch.Tensor], dict] | None:
    """`load` of the newest checkpoint that can be read, or None where there is none at all.

    Damaged ones are passed over with a warning each: a run goes on bit for bit from any checkpoint, so going further
    back costs time and changes nothing. BadInputError where none can be read; other errors as `load`.
    """
    found = existing(out)
    for place, folder in enumerate(reversed(found), 1):
        try:
            return load(folder, config, made_of)
        except DamagedCheckpointError as error:
            if place == len(found):
                raise BadInputError(f"{error}, and no older one is left; pass --fresh to start anew") from None
            warnings.warn(f"{error}; going back to the one before", stacklevel=2)
    return None


class DamagedCheckpointError(BadInputError):
    """A checkpoint that is cut, altered or not all there."""


def load(folder: Path, config: TrainConfig, made_of: dict[str, str]) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, values) of a checkpoint. DamagedCheckpointError; UsageError: made with other settings or data."""
    try:
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedCheckpointError(
            f"{folder}: the checkpoint cannot be read ({str(error).splitlines()[0]})"
        ) from None
    if values.get("format") != FORMAT:
        raise BadInputError(f"{folder}: format {values.get('format')}, this version reads {FORMAT}; pass --fresh")
    changed = differences(values["config"], config)
    before = values["made_of"]
    changed += [f"{name} are others" for name in before | made_of if before.get(name) != made_of.get(name)]
    if changed:
        raise UsageError(f"{folder}: made with other settings ({'; '.join(changed)}); give the same, or --fresh")
    return tensors, values


def differences(before: dict, config: TrainConfig) -> list[str]:
    """Settings that decide the weights and are not what they were: "lr 0.001, now 0.002"."""
    now = json.loads(json.dumps(config.record()))  # tuples as lists, as the file has them
    return [
        f"{key} {before.get(key)!r}, now {now[key]!r}" for key in now if key not in FREE and before.get(key) != now[key]
    ]


def flatten_optimizer(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The per-parameter state of an optimiser as tensors PREFIX.INDEX.KEY."""
    return {
        f"{prefix}.{index}.{key}": torch.as_tensor(value)
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Inverse of `flatten_optimizer`, the prefix taken off; moments are spread as their parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        pattern = parameters[int(index)]
        state.setdefault(int(index), {})[key] = like(value, pattern) if value.shape == pattern.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
