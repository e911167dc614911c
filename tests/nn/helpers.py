"""Small quantisers of every kind, their training, and comparisons of everything they hold."""

from __future__ import annotations

import torch

from meditok.nn.quantizer import MultiCodebookQuantizer, VectorQuantizer

from ..ops.helpers import randn

MODES = ("ema", "gradient", "frozen")


def single(mode: str = "ema", metric: str = "cosine", **settings) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(16, 6, metric=metric, codebook_update=mode, **settings)


def several(mode: str = "ema", **settings) -> MultiCodebookQuantizer:
    torch.manual_seed(0)
    return MultiCodebookQuantizer(2, 16, 3, codebook_update=mode, save_state=True, **settings)


KINDS = {"one cosine": single, "one l2": lambda mode, **s: single(mode, "l2", **s), "several": several}


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*module.named_buffers(), *module.named_parameters())}


def unchanged(module: torch.nn.Module, before: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> bool:
    after = snapshot(module)
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before if k not in but)


def train(quantizer, steps: int, first: int = 0, run=None) -> torch.Tensor:
    """Steps of 2 micro-batches over seeded rows; every loss, to compare runs by."""
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1) if quantizer.codebook_update == "gradient" else None
    losses, run = [], quantizer if run is None else run
    for step in range(first, first + steps):
        for part in range(2):
            out = run(randn(2, 9, 6, seed=2 * step + part))
            losses.append(out.loss.detach())
            if optimizer:
                out.loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        quantizer.update()
    return torch.stack(losses)
