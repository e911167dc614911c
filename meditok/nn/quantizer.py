"""Vector quantisers as modules: `VectorQuantizer` (one codebook) and `MultiCodebookQuantizer` (several, side by side).

    quantizer = VectorQuantizer(512, 64)               # 512 codes of width 64, cosine, EMA
    z, ids, loss, _ = quantizer(x)                     # x (B, N, 64) -> z (B, N, 64), ids (B, N), loss ()
    (task_loss(z) + loss).backward()
    optimizer.step()
    quantizer.update()                                 # once an optimiser step, in every mode, on every process

What moves the codes is exactly one of
    "ema"       exponential averages of the rows assigned to a code (van den Oord et al. 2017, appendix A.1)
    "gradient"  the optimiser, through the codebook term of the loss; only here is the codebook a Parameter
    "frozen"    nothing: no averages, no revival, no gradient
Forward passes in training mode only add to buffers; `update()` sums them over the processes, moves the codes, and at
the end of a window revives dead ones. So gradient accumulation counts once and no backward meets a changed codebook.
`eval()` changes no buffer. Under DistributedDataParallel pass forward_sync_buffers=False (broadcast_buffers=False to
a PyTorch without it): what a process has seen since the last update is its own. Keep the module in float32, and out of
activation checkpointing, which would count twice.
"""

from __future__ import annotations

import logging
from numbers import Integral
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..errors import DtypeError, ShapeError, TokenShapeError, UsageError
from .codebook import MODES, CodebookState, world_size
from .health import EXPECTED_HITS, CodebookHealth, alarm, dead_below, measure

_log = logging.getLogger(__name__)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element


class Quantized(NamedTuple):
    """Result of one pass through a quantiser."""

    z: torch.Tensor  # (B, N, G*C), straight-through: values of the chosen rows, gradient of the (normalised) input
    ids: torch.Tensor  # int64, (B, N), or (B, G, N) of a MultiCodebookQuantizer; -1 where masked or not finite
    loss: torch.Tensor  # () float32: commitment, codebook and entropy terms, mean over codebooks
    usage: torch.Tensor  # () float32, per cent of codes whose share of this batch exceeds 0.01 / K, mean over codebooks


class _Quantizer(nn.Module):
    """G codebooks of K codes of width C; see VectorQuantizer for the settings."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        metric: str,
        codebook_update: str,
        *,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        rotation: bool = False,
        decay: float = 0.99,
        eps: float = 1e-5,
        revive: bool = True,
        window: int = 50,
        dead_share: float = 0.01,
        save_state: bool = True,
    ):
        super().__init__()
        if metric not in ("cosine", "l2"):
            raise UsageError(f"metric={metric!r} is unknown; choose cosine or l2")
        if not all(isinstance(size, Integral) and size > 0 for size in shape):
            raise UsageError(f"{shape} codebooks, codes and width were given; whole numbers above 0 are needed")
        if not 0 <= decay <= 1:
            raise UsageError(f"decay={decay!r} is outside 0..1; 0.99 is usual")
        if not isinstance(window, Integral) or window < 1:
            raise UsageError(f"window={window!r} is not a number of steps; 1 or more is needed, 50 is usual")
        for name, value in (("eps", eps), ("dead_share", dead_share)):
            if not value >= 0:
                raise UsageError(f"{name}={value!r} is not 0 or more")
        self.metric, self.rotation = metric, rotation
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.decay, self.eps = decay, eps
        self.revive, self.window, self.dead_share = revive, window, dead_share
        self.save_state = save_state
        # Row length does not reach a cosine output (rows are normalised at use) but sets the size of a training step.
        self.codebook = torch.empty(shape).uniform_(-1, 1) / (36 * shape[2] ** 0.5)  # registered just below
        self.register_buffer("usage", torch.zeros(shape[:2]))
        self._packed = None, None  # (bits of the codebook that was packed, PackedCodebook)
        self._window_steps = None  # state.window_steps as a number, so that most updates need not ask the device
        self.codebook_update = codebook_update

    # -- the codebook --------------------------------------------------------------------------------------------
    @property
    def codebook_update(self) -> str:
        """ "ema", "gradient" or "frozen". Setting it starts the training state anew from the codebook as it is: set it
        after writing codes by hand, too, and make the optimiser after it."""
        return self._codebook_update

    @codebook_update.setter
    def codebook_update(self, mode: str) -> None:
        if mode not in MODES:
            raise UsageError(f"codebook_update={mode!r} is unknown; choose one of {', '.join(MODES)}")
        codebook = self.codebook.detach()
        del self.codebook
        if mode == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self._codebook_update = mode
        self.state = CodebookState(*codebook.shape, mode, self.save_state or mode == "ema").to(codebook.device)
        self._restart()

    def extra_repr(self) -> str:
        groups, codes, width = self.codebook.shape
        return f"{groups} x {codes} codes of width {width}, {self.metric}, codebook_update={self.codebook_update}"

    def _restart(self) -> None:
        self.state.restart(self.codebook, self.metric)
        self._window_steps = None

    def packed(self) -> ops.PackedCodebook:
        """The codebook packed for the kernels, never stale: on a CPU its bits are compared with those that were packed
        last, for about 1 % of an assignment's time; where they change with every step, or comparing would wait for the
        device, it is packed anew."""
        codebook = self.codebook.detach()
        if codebook.device.type != "cpu" or (self.training and self.codebook_update == "gradient"):
            self._packed = None, None
            return ops.pack_codebook(self.codebook, metric=self.metric)
        bits = codebook.view(BITS[codebook.element_size()])  # as integers, so that NaN equals itself
        old, packed = self._packed
        if packed is None or packed.codebook.dtype != codebook.dtype or not torch.equal(old, bits):
            packed = ops.pack_codebook(codebook, metric=self.metric)
            self._packed = bits.clone(), packed
        return ops.PackedCodebook(self.codebook, self.metric, packed.packed)

    def _operand(self):
        return self.codebook if torch.compiler.is_compiling() else self.packed()

    def _pieces(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, G*C) -> (B*N, G, C)"""
        groups, _, width = self.codebook.shape
        if x.ndim != 3 or x.shape[-1] != groups * width:
            raise ShapeError(f"x has shape {tuple(x.shape)}; (B, N, {groups * width}) is needed")
        if not x.is_floating_point():
            raise DtypeError(f"x has dtype {x.dtype}; float32, float16 or bfloat16 is needed")
        return x.unflatten(-1, (groups, width)).flatten(0, 1)

    # -- passes --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def assign(self, x: torch.Tensor) -> torch.Tensor:
        """Ids of the nearest codes of x (B, N, G*C), shaped as in Quantized."""
        return self._ids(ops.vq_assign(self._pieces(x), self._operand(), metric=self.metric), x.shape)

    @torch.no_grad()
    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows (B, N, G*C) of ids, unit length for cosine; TokenRangeError for ids outside 0..K-1, TokenShapeError."""
        rows = ops.vq_lookup(self._ids_of_rows(ids), self.codebook, metric=self.metric)  # (B*N, G, C)
        return rows.flatten(1).unflatten(0, (ids.shape[0], ids.shape[-1]))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Quantized:
        """Quantise x (B, N, G*C); mask (B, N) bool, True = used. Adds to the statistics in training mode only.

        Masked positions: id -1, z 0, no part in loss, statistics or gradient. x must convert exactly to the codebook's
        dtype. Raises ShapeError, DtypeError.
        """
        pieces = self._pieces(x)
        if torch.promote_types(x.dtype, self.codebook.dtype) != self.codebook.dtype:
            raise DtypeError(f"x is {x.dtype} and the codebook {self.codebook.dtype}; convert one of them")
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
                raise ShapeError(
                    f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; "
                    f"bool of shape {tuple(x.shape[:2])} is needed, True = used"
                )
            mask = mask.flatten()
        with torch.autocast(x.device.type, enabled=False):
            pieces = pieces.to(self.codebook.dtype)
            z, ids, loss, counts = ops.vq_quantize(
                pieces,
                self._operand(),
                metric=self.metric,
                commitment_weight=self.commitment_weight,
                codebook_weight=self.codebook_weight if self.codebook_update == "gradient" else 0.0,
                mask=mask,
                rotation=self.rotation,
            )
            if self.entropy_weight:
                loss = loss + self.entropy_weight * ops.vq_entropy(
                    pieces, self.codebook, temperature=self.entropy_temperature, metric=self.metric, mask=mask
                )
            share = counts / counts.sum(1, keepdim=True).clamp(min=1)  # (G, K)
            if self.training:
                self.state.add(pieces.detach(), ids, counts, self.metric)
                if self.revive:
                    self.state.add_candidates(pieces, (ids >= 0).all(1))
                self._update_usage(share)
        usage = (share > 0.01 / share.shape[1]).float().mean() * 100
        return Quantized(z.flatten(1).unflatten(0, x.shape[:2]), self._ids(ids, x.shape), loss, usage)

    @torch.no_grad()
    def _update_usage(self, share: torch.Tensor) -> None:
        """The published running share per code: copied at first, then averaged at 0.9 for 99 passes, then at 0.99."""
        passes = self.state.passes
        first, early, some = passes == 0, passes < 100, share.any()
        kept = torch.where(some, torch.where(first, 0.0, torch.where(early, 0.9, 0.99)), 1.0)
        added = torch.where(first, 1.0, torch.where(early, 0.1, 0.01))
        self.usage.mul_(kept).add_(share * added)
        passes.add_(some)

    # -- once an optimiser step ------------------------------------------------------------------------------------
    @torch.no_grad()
    def update(self, group: dist.ProcessGroup | None = None) -> None:
        """After optimizer.step(): sum statistics over the processes, move the codes (EMA), judge and revive them.

        Every process of `group` (default: all) must call it, also one without data. Steps without any token move
        nothing.
        """
        state = self.state
        state.reduce(group)
        if world_size(group) > 1:  # exact for batches of equal size: averaging over time and processes commute
            dist.all_reduce(self.usage, group=group)
            self.usage.div_(world_size(group))
        if self.codebook_update == "ema":
            ops.vq_update_(
                self.codebook,
                state.ema_counts,
                state.ema_sums,
                state.counts,
                state.sums,
                decay=self.decay,
                eps=self.eps,
                metric=self.metric,
            )
        if self._window_steps is None:
            self._window_steps = int(state.window_steps)
        state.advance()
        self._window_steps += 1
        if self._window_steps % self.window == 0:
            self._judge(group)

    def _judge(self, group: dist.ProcessGroup | None) -> None:
        """End the window if it holds enough tokens: alarm on collapse, revive dead codes."""
        state, codes = self.state, self.codebook.shape[1]
        tokens = state.window.sum(1, keepdim=True)  # (G, 1)
        if int(tokens.min()) < EXPECTED_HITS * codes:
            return
        dead = state.window < dead_below(tokens, codes, self.dead_share)
        state.close_window()
        self._window_steps = 0
        health = self.health()
        if health.collapsed and (world_size(group) == 1 or dist.get_rank(group) == 0):
            names = ("codebook_update", "revive", "commitment_weight", "decay", "entropy_weight")
            _log.warning("%s", alarm(health, {name: getattr(self, name) for name in names}))
        if self.revive and self.codebook_update != "frozen" and bool(dead.any()):
            state.revived.add_(self._place(dead, self._candidates(group)))

    def _candidates(self, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Rows (n, G, C) that codes may be put on; unit rows for cosine."""
        rows = self.state.candidates(group)
        if self.metric == "cosine":
            rows = rows[(rows.norm(dim=-1) > 0).all(1)]
            rows = F.normalize(rows.double(), dim=-1).to(rows.dtype)
        return rows

    def _place(self, where: torch.Tensor, rows: torch.Tensor) -> int:
        """Put the codes in where (G, K) on rows (n, G, C) in order, as if seen once; returns how many found a row."""
        placed = 0
        for g, chosen in enumerate(where):
            codes = chosen.nonzero().flatten()[: len(rows)]
            self.codebook[g, codes] = rows[: len(codes), g]
            if self.codebook_update == "ema":
                self.state.ema_counts[g, codes] = 1
                self.state.ema_sums[g, codes] = rows[: len(codes), g]
            placed += len(codes)
        return placed

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        """Offer rows of x (B, N, G*C) for `start` without quantising them."""
        pieces = self._pieces(x).to(self.codebook.dtype)
        self.state.add_candidates(pieces, torch.isfinite(pieces).flatten(1).all(1))
        self.state.age()

    @torch.no_grad()
    def start(self, group: dist.ProcessGroup | None = None) -> None:
        """Put every code on a row seen lately (up to 4,096 rows, then the same again); without any, nothing happens."""
        if self.codebook_update == "frozen":
            raise UsageError("start: codebook_update='frozen' keeps the codes; choose ema or gradient")
        rows = self._candidates(group)
        if len(rows):
            order = torch.arange(self.codebook.shape[1], device=rows.device) % len(rows)
            self._place(torch.ones_like(self.state.counts, dtype=torch.bool), rows[order])

    def health(self) -> CodebookHealth:
        """Use of the codes in the last finished window, or in the one that runs if none has ended yet."""
        state = self.state
        ended = bool(state.last_steps)
        counts, steps = (state.last, state.last_steps) if ended else (state.window, state.window_steps)
        return measure(counts, int(steps), self.dead_share, int(state.revived))

    def _loaded(self, state_dict: dict, prefix: str) -> None:
        """After the codebook was loaded, before the state is: a state that the file does not hold starts anew."""
        self._window_steps = None
        if not all(f"{prefix}state.{name}" in state_dict for name, _ in self.state.named_buffers()):
            self._restart()
            # The published format does not store the number of passes: a file with statistics continues a long run.
            self.state.passes.fill_(100 if self.usage.any() else 0)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._loaded(state_dict, prefix)


class VectorQuantizer(_Quantizer):
    """One codebook: replaces each row of x (B, N, width) by its nearest code; ids (B, N).

    metric              "cosine" (rows and codes as unit vectors) or "l2"
    commitment_weight   weight of mse(x, sg[code]), which pulls the encoder
    codebook_weight     weight of mse(code, sg[x]), which pulls the code; used with "gradient" only. MedUnifier's
                        published quantiser: VectorQuantizer(512, 768, metric="l2", codebook_update="gradient",
                        commitment_weight=1.0, codebook_weight=0.5)
    entropy_weight      weight of `ops.vq_entropy` at entropy_temperature; 0 leaves it out
    rotation            rotation trick in place of the straight-through gradient (Fifty et al. 2024)
    decay, eps          of the EMA
    revive, window, dead_share   dead codes move onto recent rows when a window ends (see meditok.nn.health); in
                        "gradient" mode the optimiser keeps its moments of a revived row
    save_state          whether the training state is part of the state dict (with "ema" it always is)
    """

    def __init__(
        self, codebook_size: int, width: int, *, metric: str = "cosine", codebook_update: str = "ema", **settings
    ):
        super().__init__((1, codebook_size, width), metric, codebook_update, **settings)

    def _ids(self, ids: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return ids.view(shape[:2])

    def _ids_of_rows(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.ndim != 2:
            raise TokenShapeError(f"ids have shape {tuple(ids.shape)}; (B, N) is needed")
        return ids.reshape(-1, 1)


class MultiCodebookQuantizer(_Quantizer):
    """Cuts G*C channels into G pieces and quantises each with its own codebook by cosine (UniTok, arXiv 2502.20321,
    section 3.2); ids (B, G, N). The defaults are the published ones; `settings` are VectorQuantizer's.

    State-dict keys are those of the published checkpoints, `codebooks.{i}.codebook.weight` (K, C) and
    `codebooks.{i}.vocab_usage` (K,), while in memory all codebooks are one (G, K, C) tensor, as the kernels take it.
    The training state joins them, as `state.*`, with save_state=True or codebook_update="ema".
    """

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        code_dim: int,
        commitment_weight: float = 0.25,
        *,
        codebook_update: str = "gradient",
        revive: bool = False,
        save_state: bool = False,
        **settings,
    ):
        settings |= dict(commitment_weight=commitment_weight, revive=revive, save_state=save_state)
        super().__init__((num_codebooks, codebook_size, code_dim), "cosine", codebook_update, **settings)

    def _ids(self, ids: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return ids.unflatten(0, shape[:2]).transpose(1, 2).contiguous()

    def _ids_of_rows(self, ids: torch.Tensor) -> torch.Tensor:
        groups = self.codebook.shape[0]
        if ids.ndim != 3 or ids.shape[1] != groups:
            raise TokenShapeError(f"ids have shape {tuple(ids.shape)}; (B, {groups}, N) is needed")
        return ids.transpose(1, 2).flatten(0, 1)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        codebook = self.codebook if keep_vars else self.codebook.detach()
        for i in range(codebook.shape[0]):
            destination[f"{prefix}codebooks.{i}.vocab_usage"] = self.usage[i]
            destination[f"{prefix}codebooks.{i}.codebook.weight"] = codebook[i]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        targets = {}
        for i in range(self.codebook.shape[0]):
            targets[f"{prefix}codebooks.{i}.vocab_usage"] = self.usage[i]
            targets[f"{prefix}codebooks.{i}.codebook.weight"] = self.codebook[i]
        for key, target in targets.items():
            if key not in state_dict:
                missing.append(key)
            elif state_dict[key].shape != target.shape:
                errors.append(f"{key}: {tuple(state_dict[key].shape)} in the file, {tuple(target.shape)} in the model")
            else:
                with torch.no_grad():
                    target.copy_(state_dict[key])
        known = (*targets, f"{prefix}state.")
        unexpected += [key for key in state_dict if key.startswith(prefix) and not key.startswith(known)]
        self._loaded(state_dict, prefix)
