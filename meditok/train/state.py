"""The state of a run: modules, optimisers, averages; what a checkpoint holds of them, and how it comes back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import native
from ..errors import BadInputError
from . import checkpoint
from .config import TrainConfig
from .distributed import World
from .sharding import full, like, shard

if TYPE_CHECKING:
    from .loop import Task

# Every process keeps its own sums for the codebook until they meet once a step. torch 2.13 renamed the option.
_KNOWN = inspect.signature(DistributedDataParallel).parameters
BUFFERS_STAY = {"forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers": False}


class Run:
    """The state of one run: what a checkpoint holds, and how it comes back."""

    def __init__(self, task: Task, config: TrainConfig, out: Path, world: World, made_of: dict[str, str]):
        self.task, self.config, self.out, self.world, self.made_of = task, config, out, world, made_of
        self.step = 0
        self.sharded = config.sharded and world.size > 1
        for module in task.modules.values():
            module.to(world.device)
        if self.sharded:
            shard(task.blocks(), world)
        self.optimizers = {phase: task.optimizer(phase) for phase in task.modules}
        half = config.precision == "fp16"
        self.scalers = {phase: torch.amp.GradScaler(world.device.type, enabled=half) for phase in task.modules}
        self.average: dict[str, Tensor] = {}
        if config.ema:
            state = task.modules[task.averaged].state_dict()
            self.average = {name: value.detach().clone() for name, value in state.items()}

    def wrapped(self) -> dict[str, nn.Module]:
        """The modules as the task calls them: with gradients averaged over the ranks."""
        if self.world.size == 1:
            return dict(self.task.modules)
        device = [self.world.device] if self.world.device.type == "cuda" else None
        return {
            phase: module if self.spread(phase) else DistributedDataParallel(module, device, **BUFFERS_STAY)
            for phase, module in self.task.modules.items()
        }

    def spread(self, phase: str) -> bool:
        """Whether this phase's module has sharded parts."""
        return self.sharded and phase == self.task.averaged

    def save(self) -> None:
        tensors = {f"average.{name}": value for name, value in self.average.items()}
        for phase, module in self.task.modules.items():
            tensors |= {f"module.{phase}.{name}": value for name, value in module.state_dict().items()}
            tensors |= checkpoint.flatten_optimizer(f"optimizer.{phase}", self.optimizers[phase])
        if self.sharded:
            tensors = self.gathered(tensors)
        if self.world.first:
            values = {
                "config": self.config.record(),
                "made_of": self.made_of,
                "setting": setting(self.world),
                "scalers": {phase: scaler.state_dict() for phase, scaler in self.scalers.items()},
            }
            checkpoint.save(self.out, self.step, tensors, values, keep=self.config.keep)
        self.world.wait()

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors, in the first process's memory; every process must call it."""
        whole = {}
        for name, value in tensors.items():
            value = full(value)
            if self.world.first:
                whole[name] = value.cpu()
        return whole

    def resume(self) -> bool:
        """Go on from the newest checkpoint, if there is one. Errors and warnings as `checkpoint.newest`."""
        found = checkpoint.newest(self.out, self.config, self.made_of)
        self.step = found[1]["step"] if found else 0
        if self.world.largest(self.step) != -self.world.largest(-self.step):
            raise BadInputError(f"{self.out}: the processes read checkpoints of other steps; is the folder shared?")
        if found is None:
            return False
        tensors, values = found
        changed = [f"{key} {was}, now {now}" for key, was, now in _differing(values, setting(self.world))]
        if changed and self.world.first:
            warnings.warn(f"going on with {'; '.join(changed)}: the result agrees within rounding only", stacklevel=2)
        for phase, module in self.task.modules.items():
            was, state = module.state_dict(), _part(tensors, f"module.{phase}.")
            module.load_state_dict({name: like(value, was.get(name, value)) for name, value in state.items()})
            checkpoint.restore_optimizer(self.optimizers[phase], _part(tensors, f"optimizer.{phase}."))
            self.scalers[phase].load_state_dict(values["scalers"][phase])
        average = _part(tensors, "average.")
        self.average = {name: like(average[name].to(self.world.device), was) for name, was in self.average.items()}
        return True


def _differing(values: dict, setting: dict[str, object]) -> Iterable[tuple[str, object, object]]:
    before = values.get("setting", {})
    return ((key, before[key], now) for key, now in setting.items() if before.get(key, now) != now)


def setting(world: World) -> dict[str, object]:
    """What decides the last bits of a result beside the config: with another one they differ."""
    return {
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "backend": native.backend,
        "isa": native.isa,
    }


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
