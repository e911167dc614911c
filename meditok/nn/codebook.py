"""What a codebook remembers while it is trained: statistics since the last update, EMA, usage, candidates for revival.

Everything is a buffer, so that a reload changes nothing. G codebooks, K codes, width C, R = min(K, 4,096) candidates.

Candidates are the R rows of smallest key, key = (updates since the row was seen, hash of its bits): newest first, and
among rows of one step a choice that looks random but depends on the rows alone (a bottom-k sketch: Cohen and Kaplan
2007). Such sketches merge, so neither the number of processes nor the split into micro-batches changes the choice.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

MODES = ("ema", "gradient", "frozen")
MAX_CANDIDATES = 4096
AGE = 1 << 32  # keys are 32-bit hashes; every update adds this
EMPTY = 1 << 62  # key of a slot without a row


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Processes that train together; 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def row_hash(rows: torch.Tensor) -> torch.Tensor:
    """rows (N, ...) float32 -> (N,) int64 in 0..2^32 - 1, from the bits of each row.

    Sum of bits times odd constants modulo 2^32 (multiply-shift hashing, Dietzfelbinger et al. 1997), then two rounds of
    xor-shift and multiplication, small enough not to overflow.
    """
    bits = rows.detach().flatten(1).contiguous().view(torch.int32)
    index = torch.arange(1, bits.shape[1] + 1, device=rows.device)
    factors = ((index * 0x9E3779B1 & 0xFFFFFFFF) - (1 << 31) | 1).to(torch.int32)
    value = (bits * factors).sum(1) & 0xFFFFFFFF
    for _ in range(2):
        value = ((value >> 16) ^ value) * 0x45D9F3B & 0xFFFFFFFF
    return (value >> 16) ^ value


class CodebookState(nn.Module):
    """Buffers of G codebooks under one of MODES; `saved` says whether they are part of the state dict."""

    def __init__(self, groups: int, codes: int, width: int, mode: str, saved: bool):
        super().__init__()
        self.saved = saved
        for name in ("passes", "steps", "window_steps", "last_steps", "revived"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        for name in ("counts", "window", "last"):  # since the update; since the window began; in the last window
            self.register_buffer(name, torch.zeros(groups, codes, dtype=torch.int64))
        ema, candidates = mode == "ema", min(codes, MAX_CANDIDATES) if mode != "frozen" else 0
        self.register_buffer("sums", torch.zeros(groups, codes, width) if ema else None)
        self.register_buffer("ema_counts", torch.zeros(groups, codes) if ema else None)
        self.register_buffer("ema_sums", torch.zeros(groups, codes, width) if ema else None)
        self.register_buffer("keys", torch.zeros(candidates, dtype=torch.int64))
        self.register_buffer("rows", torch.zeros(candidates, groups, width))

    @torch.no_grad()
    def restart(self, codebook: torch.Tensor, metric: str) -> None:
        """Forget everything; every code of `codebook` (G, K, C) counts as seen once."""
        for buffer in self.buffers():
            buffer.zero_()
        self.keys.fill_(EMPTY)
        if self.ema_sums is not None:
            self.ema_counts.fill_(1)
            self.ema_sums.copy_(F.normalize(codebook, dim=-1) if metric == "cosine" else codebook)

    @torch.no_grad()
    def add(self, rows: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, metric: str) -> None:
        """Statistics of one pass: rows (N, G, C) as given, ids (N, G), counts (G, K)."""
        self.counts.add_(counts)
        if self.sums is not None:
            averaged = F.normalize(rows, dim=-1) if metric == "cosine" else rows
            # Straight to the op: these ids come from a kernel, and checking them would wait for the device.
            self.sums.add_(torch.ops.meditok.vq_stats(averaged, ids, counts.shape[1])[1])

    @torch.no_grad()
    def add_candidates(self, rows: torch.Tensor, usable: torch.Tensor) -> None:
        """Offer rows (N, G, C), those with usable (N,) True, for the R places."""
        places = len(self.keys)
        if rows.shape[0] == 0 or places == 0:
            return
        keys = torch.cat([self.keys, torch.where(usable, row_hash(rows), EMPTY)])
        keys, order = keys.sort()
        keys[1:] = torch.where(keys[1:] == keys[:-1], EMPTY, keys[1:])  # the same row again
        keys, chosen = keys.topk(places, largest=False)
        chosen = order[chosen]
        new = rows[(chosen - places).clamp_min(0)]
        old = self.rows[chosen.clamp_max(places - 1)]
        self.rows.copy_(torch.where((chosen >= places)[:, None, None], new, old))
        self.keys.copy_(keys)

    @torch.no_grad()
    def reduce(self, group: dist.ProcessGroup | None) -> None:
        """Sum counts and sums over the processes: always the same collectives, whatever a process has seen."""
        if world_size(group) > 1:
            dist.all_reduce(self.counts, group=group)
            if self.sums is not None:
                dist.all_reduce(self.sums, group=group)

    @torch.no_grad()
    def advance(self) -> None:
        """Close the step: counts go into the window, accumulators to zero, candidates age."""
        self.window.add_(self.counts)
        self.counts.zero_()
        if self.sums is not None:
            self.sums.zero_()
        self.steps.add_(1)
        self.window_steps.add_(1)
        self.age()

    @torch.no_grad()
    def age(self) -> None:
        """What is offered from now on goes before the candidates held."""
        self.keys.add_(AGE).clamp_max_(EMPTY)

    @torch.no_grad()
    def close_window(self) -> None:
        self.last.copy_(self.window)
        self.last_steps.copy_(self.window_steps)
        self.window.zero_()
        self.window_steps.zero_()

    @torch.no_grad()
    def candidates(self, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Distinct rows (n, G, C), n <= R, newest first: the same on every process."""
        keys, rows, places, world = self.keys, self.rows, len(self.keys), world_size(group)
        if world > 1:
            gathered = [torch.empty_like(keys) for _ in range(world)]
            dist.all_gather(gathered, keys, group=group)
            keys, source = torch.cat(gathered).sort(stable=True)
            keys, source = keys[:places], source[:places]
            mine = (source // places == dist.get_rank(group))[:, None, None]
            rows = torch.where(mine, rows[source % places], 0)  # one process owns each row, the others add zero
            dist.all_reduce(rows, group=group)
        value, order = (keys % AGE).sort(stable=True)
        distinct = torch.ones_like(value, dtype=torch.bool)
        distinct[order[1:]] = value[1:] != value[:-1]
        return rows[distinct & (keys < EMPTY)]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.saved:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if self.saved or any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *rest)
