"""Quantiser with several independent codebooks (multi-codebook quantisation: UniTok, arXiv 2502.20321, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .. import ops


class Quantized(NamedTuple):
    """Result of one training pass through the quantiser."""

    z: torch.Tensor  # (B, N, G*C), straight-through: values of the chosen unit rows, gradient of the normalised input
    ids: torch.Tensor  # (B, G, N) int64
    loss: torch.Tensor  # () float32, commitment and codebook terms, mean over codebooks
    usage: torch.Tensor  # () float32, per cent of codes whose share of this batch exceeds 0.01 / K, mean over codebooks


class MultiCodebookQuantizer(nn.Module):
    """Cuts G*C channels into G pieces and replaces each by the row of its own codebook of largest cosine similarity.

    State-dict keys are those of the published checkpoints, `codebooks.{i}.codebook.weight` (K, C) and
    `codebooks.{i}.vocab_usage` (K,), while in memory all codebooks are one (G, K, C) tensor, as the kernels take it.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, code_dim: int, commitment_weight: float = 0.25):
        super().__init__()
        shape = num_codebooks, codebook_size, code_dim
        self.commitment_weight = commitment_weight
        # Row length does not reach the output (rows are normalised at use) but sets the size of a training step.
        self.codebook = nn.Parameter(torch.empty(shape).uniform_(-1, 1) / (36 * code_dim**0.5))
        self.register_buffer("usage", torch.zeros(num_codebooks, codebook_size))
        # Training passes the running usage has seen: a tensor, since a number would make torch.compile start over
        # at every step.
        self.register_buffer("_calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self._packed = None, None  # (what it was packed from, PackedCodebook)

    def packed(self):
        """The codebook packed for the kernels; packed again once the values, dtype or device have changed."""
        key = self.codebook.data_ptr(), self.codebook._version, self.codebook.dtype
        if self._packed[0] != key:
            self._packed = key, ops.pack_codebook(self.codebook.detach(), metric="cosine")
        return self._packed[1]

    def _pieces(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, G*C) -> (B*N, G, C)"""
        return x.unflatten(-1, (self.codebook.shape[0], -1)).flatten(0, 1)

    def assign(self, x: torch.Tensor) -> torch.Tensor:
        """Ids (B, G, N) int64 of the nearest codes of x (B, N, G*C)."""
        codebook = self.codebook.detach() if torch.compiler.is_compiling() else self.packed()
        ids = ops.vq_assign(self._pieces(x).float(), codebook)  # (B*N, G)
        return ids.unflatten(0, x.shape[:2]).transpose(1, 2).contiguous()

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Unit rows (B, N, G*C) float32 of ids (B, G, N); TokenRangeError for ids outside 0..K-1."""
        rows = ops.vq_lookup(ids.transpose(1, 2).flatten(0, 1), self.codebook.detach())  # (B*N, G, C)
        return rows.flatten(1).unflatten(0, (ids.shape[0], ids.shape[2]))

    def forward(self, x: torch.Tensor) -> Quantized:
        """Training pass over x (B, N, G*C); updates the running usage in training mode only."""
        z, ids, loss, counts = ops.vq_quantize(
            self._pieces(x).float(), self.codebook, commitment_weight=self.commitment_weight
        )
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)  # (G, K)
        if self.training:
            self._update_usage(share)
        usage = (share > 0.01 / share.shape[1]).float().mean() * 100
        ids = ids.unflatten(0, x.shape[:2]).transpose(1, 2)
        return Quantized(z.flatten(1).unflatten(0, x.shape[:2]), ids, loss, usage)

    @torch.no_grad()
    def _update_usage(self, share: torch.Tensor) -> None:
        """Running share per code: copied at first, then averaged at 0.9 for 99 passes and at 0.99 from there on."""
        first, early = self._calls == 0, self._calls < 100
        kept = torch.where(first, 0.0, torch.where(early, 0.9, 0.99))
        added = torch.where(first, 1.0, torch.where(early, 0.1, 0.01))
        self.usage.mul_(kept).add_(share * added)
        self._calls.add_(1)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        codebook = self.codebook if keep_vars else self.codebook.detach()
        for i in range(codebook.shape[0]):
            destination[f"{prefix}codebooks.{i}.vocab_usage"] = self.usage[i]
            destination[f"{prefix}codebooks.{i}.codebook.weight"] = codebook[i]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        for i in range(self.codebook.shape[0]):
            for leaf, target in (("vocab_usage", self.usage[i]), ("codebook.weight", self.codebook[i])):
                key = f"{prefix}codebooks.{i}.{leaf}"
                if key not in state_dict:
                    missing.append(key)
                elif state_dict[key].shape != target.shape:
                    errors.append(
                        f"{key}: {tuple(state_dict[key].shape)} in the file, {tuple(target.shape)} in the model"
                    )
                else:
                    with torch.no_grad():
                        target.copy_(state_dict[key])
        known = {
            f"{prefix}codebooks.{i}.{leaf}"
            for i in range(self.codebook.shape[0])
            for leaf in ("vocab_usage", "codebook.weight")
        }
        unexpected += [key for key in state_dict if key.startswith(prefix) and key not in known]
        # The published format does not store the pass count: a file with usage statistics continues as a long run.
        self._calls.fill_(100 if self.usage.any() else 0)
