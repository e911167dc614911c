"""Time and memory of a training step: python bench/bench_train_step.py [--preset tiny] [--batch 8] [--size 256]

Against the plain PyTorch way: the same weights in the published arithmetic (baseline_model.py), its losses combined as
published, with the adaptive weight taken by differentiating both losses down to the last layer before the backward pass
goes through everything again. Three steps, each forward, backward, gradient clipping and AdamW:

    model           l1 + l2 + vq
    perceptual      with shift-tolerant LPIPS
    adversarial     with the adversary and its own step

Prints p20/p50/p80, images/s, the share of the machine's matrix products, the memory a step holds beyond weights and
moments, and the ratios; rows go to bench/results/train_step.csv. Both run in turn in every round.
"""

from __future__ import annotations

import argparse

import torch
from baseline_model import Baseline
from timing import append_rows, commit, interleave, peak_memory, processor
from torch import nn

from meditok import native
from meditok.models.files import build
from meditok.objectives import adversarial, diffaug, reconstruction
from meditok.train.config import TrainConfig
from meditok.train.data import Batch
from meditok.train.distributed import World
from meditok.train.optim import parameter_groups
from meditok.train.speed import Speed
from meditok.train.tasks.alignment import Alignment

CASES = {"model": {"perceptual": 0.0, "adversarial": 0.0}, "perceptual": {"adversarial": 0.0}, "adversarial": {}}
STEP = 5000  # past every ramp


class Ours:
    """The step as the loop makes it."""

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.task = config, Alignment(config, world)
        for module in self.task.modules.values():
            module.to(world.device)
        self.optimizers = {phase: self.task.optimizer(phase) for phase in self.task.modules}

    def step(self, batch: Batch) -> float:
        for phase, module in self.task.modules.items():
            self.optimizers[phase].zero_grad(set_to_none=True)
            terms = self.task.losses(phase, self.task.modules, batch, STEP)
            total = torch.stack(list(terms.values())).sum()
            total.backward()
            nn.utils.clip_grad_norm_(module.parameters(), self.config.clip)
            self.optimizers[phase].step()
            if phase == "generator":
                first = total.item()
        self.task.finish_step(STEP)
        return first


class Plain:
    """The published way, from the same weights and with the same frozen networks and draws."""

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.task = config, Alignment(config, world)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        self.model = Baseline(build(config.preset, seed=config.seed).train(), half).to(world.device)
        modules = {"generator": self.model}
        if config.adversarial:
            modules["discriminator"] = self.task.modules["discriminator"].to(world.device)
        self.modules = modules
        self.optimizers = {
            phase: torch.optim.AdamW(parameter_groups(module, config.weight_decay), lr=config.lr, betas=config.betas)
            for phase, module in modules.items()
        }

    def step(self, batch: Batch) -> float:
        config, task, images = self.config, self.task, batch.images
        r, vq = self.model(images)
        likelihood = config.l1 * reconstruction.l1(r, images) + config.l2 * reconstruction.l2(r, images)
        if config.perceptual:
            likelihood = likelihood + config.perceptual * task.perceptual(r, images)
        total = likelihood + config.vq * vq
        if config.adversarial:
            judge = self.modules["discriminator"].requires_grad_(False)
            fooled = adversarial.hinge_generator(judge(diffaug.augment(r, task._drawn(batch, 0), 0.0)))
            judge.requires_grad_(True)
            last = self.model.decoder.last_layer.weight
            norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (likelihood, fooled)]
            weight = (norms[0] / (norms[1] + 1e-6)).clamp(adversarial.MIN_WEIGHT, adversarial.MAX_WEIGHT).detach()
            total = total + config.adversarial * weight * fooled
        self._update("generator", total)
        if config.adversarial:
            views = []
            for turn in (1, 2):
                drawn = task._drawn(batch, turn)
                views += [diffaug.augment(x, drawn, 0.0) for x in (images, r.detach())]
            real, fake, real_again, fake_again = (self.modules["discriminator"](view) for view in views)
            consistency = adversarial.balanced_consistency(real, real_again, fake, fake_again)
            hinge = adversarial.hinge_discriminator(real, fake)
            self._update("discriminator", hinge + config.consistency * consistency)
        return total.item()

    def _update(self, phase: str, loss: torch.Tensor) -> None:
        self.optimizers[phase].zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules[phase].parameters(), self.config.clip)
        self.optimizers[phase].step()


def counted(step, world: World, config: TrainConfig, batch: Batch) -> tuple[float, float]:
    """(FLOPs of the plain step, FLOP/s of this machine's products)."""
    speed = Speed(world.device, config.precision, config.batch)
    with speed.step():
        step(batch)
    return speed.flops, speed.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="fp32", help="of encoder and decoder")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all three")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world, rows = World(0, 1, device), []
    images = torch.rand(options.batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    batch = Batch(
        (images * 2 - 1).to(device), [""] * options.batch, [""] * options.batch, *[list(range(options.batch))] * 2
    )
    for case in options.case or CASES:
        config = TrainConfig(
            **dict(
                preset=options.preset,
                contrastive=0.0,
                perceptual_net="stlpips-alexnet",
                discriminator="efficientnet-lite0",
                adversarial_fade=1,
                precision=options.precision,
                batch=options.batch,
                size=options.size,
            )
            | CASES[case]
        )
        steps = {"ours": Ours(config, world).step, "plain": Plain(config, world).step}
        losses = {name: step(batch) for name, step in steps.items()}
        if abs(losses["ours"] - losses["plain"]) > 2e-3 * abs(losses["plain"]):
            raise SystemExit(f"{case}: the first losses differ, {losses}; these are not the same step")
        flops, peak = counted(steps["plain"], world, config, batch)
        memory = {name: peak_memory(lambda step=step: step(batch), device.type) for name, step in steps.items()}
        times = interleave(
            {name: (lambda step=step: step(batch)) for name, step in steps.items()}, options.rounds, device.type
        )
        ratio = times["plain"][1] / times["ours"][1]
        for name, (p20, p50, p80) in times.items():
            rows.append(
                {
                    "case": case,
                    "way": name,
                    "preset": options.preset,
                    "size": options.size,
                    "batch": options.batch,
                    "precision": options.precision,
                    "p20_ms": round(p20 * 1e3, 1),
                    "p50_ms": round(p50 * 1e3, 1),
                    "p80_ms": round(p80 * 1e3, 1),
                    "images_per_s": round(options.batch / p50, 2),
                    "share_of_peak": round(flops / p50 / peak, 3),
                    "memory_mib": round(memory[name], 1),
                    "plain_over_ours": round(ratio, 3),
                    "threads": options.threads,
                    "backend": native.backend,
                    "isa": native.isa,
                    "device": processor(device.type),
                    "torch": torch.__version__,
                    "commit": commit(),
                }
            )
            print(
                f"{case:<12}{name:<6} p20 {p20 * 1e3:7.0f}  p50 {p50 * 1e3:7.0f}  p80 {p80 * 1e3:7.0f} ms  "
                f"{options.batch / p50:6.2f} images/s  {flops / p50 / peak:5.1%} of peak  {memory[name]:7.0f} MiB"
            )
        held = memory["plain"] / max(memory["ours"], 0.1)
        print(f"{case:<12}plain / ours: {ratio:.2f} in time, {held:.2f} in memory")
    print(f"rows appended to {append_rows('train_step', rows)}")


if __name__ == "__main__":
    main()
