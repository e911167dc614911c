"""Train a tokenizer for reconstruction alone: the simplest honest loop, on one device.

    python -m meditok.train.reconstruction --data DIR --out DIR --steps 6000

DIR holds manifest.csv and the tars it names; only rows with weights_ok = yes and split = train are used.
Loss: L2 + 0.2 L1 + vq, as MedITok's, without perceptual, adversarial and alignment terms.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..models.checks import square_grid
from ..models.files import build, write_model
from ..models.tokenizer import Tokenizer
from .pictures import Sampler, describe, fingerprints, manifest_rows, read_pictures


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def unit_pieces(model: Tokenizer, code: torch.Tensor) -> torch.Tensor:
    """(B, N, G*C) -> unit vectors (B*N, G, C)"""
    return F.normalize(code.flatten(0, 1).unflatten(-1, model.codebook.shape[::2]), dim=-1)


def continuous_pass(model: Tokenizer, images: torch.Tensor, noise: float = 0.1) -> torch.Tensor:
    """Reconstruction without quantising: unit pieces plus noise of about the length of a quantisation step.

    Starting this way spreads the pieces over the sphere before codes are put there.
    """
    code = model.quant_proj(model.encoder(images))
    model.quantizer.collect(code)
    pieces = unit_pieces(model, code)
    noisy = F.normalize(pieces + noise * torch.randn_like(pieces), dim=-1)
    return model.decoder(model.post_quant_proj(noisy.flatten(1).view_as(code)), square_grid(code.shape[1], None))


def parameter_groups(model: Tokenizer) -> list[dict]:
    """Weight decay for matrices and convolutions; none for norms, biases and the codebook."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and name != "quantizer.codebook"]
    others = [p for name, p in trained if p.ndim <= 1 or name == "quantizer.codebook"]
    return [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]


def train(model: Tokenizer, sampler: Sampler, options: argparse.Namespace, log) -> None:
    """Run options.steps steps; leaves the exponential average of the weights in `model`."""
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.95), eps=1e-6)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    quantizer = model.quantizer
    quantizer.window = options.window
    quantise_from, revive_until = int(options.continuous * options.steps), int(0.8 * options.steps)
    full_from = int((1 - options.full_share) * options.steps)
    model.train()
    began = time.perf_counter()
    for step in range(options.steps):
        sampler.crop = options.full_size if step >= full_from else options.crop
        x = sampler.draw(max(1, options.batch * options.crop**2 // sampler.crop**2))
        vq_loss = torch.zeros(())
        if step < quantise_from:
            y = continuous_pass(model, x)
        else:
            if step == quantise_from:
                quantizer.start()
            quantizer.revive = step < revive_until
            y, _, vq_loss, *_ = model(x)
        l1, l2 = (y - x).abs().mean(), (y - x).square().mean()
        loss = l2 + 0.2 * l1 + vq_loss
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"step {step}: loss {loss.item()} (l1 {l1.item()}, l2 {l2.item()}, vq {vq_loss.item()})"
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        if step >= quantise_from:
            quantizer.update()
        if step % 50 == 0 or step == options.steps - 1:
            log.writerow(
                [
                    step,
                    *(f"{v.item():.6g}" for v in (loss, l1, l2, vq_loss)),
                    quantizer.state.revived.item(),
                    f"{time.perf_counter() - began:.1f}",
                ]
            )
            options.log_file.flush()
        if step % 500 == 499:
            write_model(average.module, options.out / "latest.safetensors")
    model.load_state_dict(average.module.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8, help="crops a step")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--full-size", type=int, default=256, help="side of the crops towards the end")
    parser.add_argument("--full-share", type=float, default=0.2, help="share of the steps at full size")
    parser.add_argument("--continuous", type=float, default=0.15, help="share of the steps before quantisation starts")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--window", type=int, default=50, help="steps after which unused codes are revived, or more (nn/health.py)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rows = manifest_rows(options.data / "manifest.csv", "train", publishable=True)
    sampler = Sampler(read_pictures(options.data, rows), options.crop, options.seed)
    model = build(options.preset)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "data.json").write_text(describe(rows, fingerprints(options.data, rows)) + "\n")
    with open(options.out / "log.csv", "w", newline="") as options.log_file:
        log = csv.writer(options.log_file)
        log.writerow(["step", "loss_total", "l1", "l2", "vq", "revived", "seconds"])
        train(model, sampler, options, log)
    write_model(model.eval(), options.out / "model.safetensors", torch.float16)


if __name__ == "__main__":
    main()
