"""How fast a run is: images a second, and the share of what this machine's matrix products reach.

The work of a step is counted once, by torch's FlopCounterMode while the step runs: products, convolutions, attention,
and the code search at 2 C a pair. Element-wise work, and what is recomputed, counts as it runs there.
"""

from __future__ import annotations

import contextlib
import math
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import ops  # noqa: F401 - the ops counted below exist once it is imported
from ..models.precision import precision_scope

SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that the peak is measured with


def _search(x_shape, codebook_shape, *_, **__) -> int:
    """x (N, G, C) against codebook (G, K, C)."""
    return 2 * math.prod(x_shape) * codebook_shape[1]


def _attention(q_shape, k_shape, *_, **__) -> int:
    """q (B, H, N, D) against k (B, H, M, D): two products."""
    return 4 * math.prod(q_shape) * k_shape[2]


def _attention_qkv(qkv_shape, *_, **__) -> int:
    """qkv (B, N, 3, H, D)"""
    return 4 * math.prod(qkv_shape) // 3 * qkv_shape[1]


def _attention_backward(grad_shape, q_shape, k_shape, *_, **__) -> int:
    """Five products: the scores again, and one for each of their two factors, twice."""
    return 10 * math.prod(q_shape) * k_shape[2]


def _attention_qkv_backward(grad_shape, qkv_shape, *_, **__) -> int:
    return 10 * math.prod(qkv_shape) // 3 * qkv_shape[1]


FORMULAS = {  # beside those that torch counts
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.meditok.vq_assign: _search,
    torch.ops.meditok.vq_quantize: _search,
    torch.ops.meditok.attention: _attention,
    torch.ops.meditok.attention_qkv: _attention_qkv,
    torch.ops.meditok.attention_backward: _attention_backward,
    torch.ops.meditok.attention_qkv_backward: _attention_qkv_backward,
}


def matmul_rate(device: torch.device, precision: str, rounds: int = 3) -> float:
    """FLOP/s of torch's product of two square matrices at a run's precision: the best of a few."""
    side = SIDE[device.type]
    a = torch.rand(side, side, device=device)
    best = math.inf
    with torch.no_grad(), precision_scope(device, precision):
        for _ in range(rounds + 1):  # the first one warms up
            _settle(device)
            start = time.perf_counter()
            a @ a
            _settle(device)
            best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Speed:
    """Images a second and share of peak over the steps since they were last asked for."""

    def __init__(self, device: torch.device, precision: str, images: int):
        self.images, self.device, self.precision = images, device, precision
        self.peak = matmul_rate(device, precision)
        self.flops, self._present, self._due = 0.0, frozenset(), True
        self.steps, self.clock = 0, time.perf_counter()

    @contextlib.contextmanager
    def step(self):
        """Around one step; the work is counted in the first one, and again once other losses take part."""
        if not self._due:
            yield
        else:
            counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
            with counter:
                yield
            self.flops, self._due = float(counter.get_total_flops()), False
        self.steps += 1

    def saw(self, terms: frozenset[str]) -> None:
        """Which losses the step had."""
        new = bool(self._present) and terms != self._present
        self._due, self._present = self._due or new, terms

    def rates(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.clock
        rate = self.steps / elapsed
        self.peak = max(self.peak, matmul_rate(self.device, self.precision, 1))  # the machine may have been busy
        self.steps, self.clock = 0, time.perf_counter()
        return {"images_per_s": rate * self.images, "share_of_peak": rate * self.flops / self.peak}
