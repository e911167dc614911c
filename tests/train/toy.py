"""A task small enough to be checked by hand, run by the real loop.

Two phases on a line: the model fits y = 3 x with noise drawn from torch's global generator, the critic learns the mean
of what the model gives. Samples come from their number alone, as in a real run.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from meditok.train import distributed, loop
from meditok.train.config import TrainConfig
from meditok.train.data import Batch


class Toy:
    terms = ("fit", "shrink", "critic")
    averaged = "model"

    def __init__(
        self, noise: float = 0.0, poison: int = -1, poisoned_rank: int = 0, kill: int = -1, interrupt: int = -1,
        signal: int = 0, signal_at: int = -1,
    ):  # fmt: skip
        torch.manual_seed(0)
        self.modules = {"model": nn.Linear(4, 1), "critic": nn.Linear(1, 1)}
        self.noise, self.poison, self.poisoned_rank = noise, poison, poisoned_rank
        self.kill, self.interrupt, self.signal, self.signal_at = kill, interrupt, signal, signal_at
        self.last = None

    def blocks(self):
        return [self.modules["model"]]

    def optimizer(self, phase):
        return torch.optim.AdamW(self.modules[phase].parameters(), lr=0.1)

    def learning_rate(self, phase, step):
        return 0.1 / (1 + step)

    def active(self, phase, step):
        return phase == "model" or step >= 2

    def prepare(self, batch):
        pass

    def losses(self, phase, call, batch, step):
        x = batch.images.mean((2, 3))
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        if phase == "critic":
            return {"critic": (call["critic"](self.last) - 1).square().mean()}
        y = call["model"](x)
        self.last = y.detach()
        if step == self.poison and int(os.environ.get("RANK", "0")) == self.poisoned_rank:
            y = y * float("nan")
        noise = self.noise * torch.randn_like(y)
        return {"fit": (y + noise - 3 * x[:, :1]).square().mean(), "shrink": 0.01 * y.abs().mean()}

    def finish_step(self, step):
        if step == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.signal_at and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), self.signal)
        if step == self.interrupt:
            raise KeyboardInterrupt

    def health(self):
        return {"usage": 1.0}

    def export(self, path, weights):
        save_file(weights, path)


def batches(config: TrainConfig, world):
    share = config.batch // config.accumulate // world.size

    def start(step: int):
        for number in range(step * config.batch + world.rank * share, config.steps * config.batch, share * world.size):
            samples = list(range(number, number + share))
            images = [torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(i)) for i in samples]
            yield Batch(torch.stack(images), [""] * share, [""] * share, samples, samples)

    return start


def run(out: Path, **options) -> None:
    """One run of the loop; options are TrainConfig's, and those of Toy."""
    mine = ("poison", "poisoned_rank", "kill", "interrupt", "noise", "signal", "signal_at")
    toy = {key: options.pop(key) for key in mine if key in options}
    config = TrainConfig(**{"batch": 8, "save_every": 3, "log_every": 1, "precision": "fp32", "ema": 0.9} | options)
    with distributed.world("cpu") as world:
        loop.train(
            Toy(**toy), batches(config, world), config, out, world, made_of={"the images it is trained on": "numbers"}
        )
