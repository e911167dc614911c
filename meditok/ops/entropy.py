"""Entropy regulariser of a codebook: every row sure of its code, all codes used alike (Yu et al. 2023, MAGVIT-v2,
arXiv 2310.05737, section 3.1; temperature and floor as published with MedITok and UniTok).

vq_entropy: p = softmax(-|x_hat - c_hat|^2 / temperature) over the codes;
            loss = mean over rows of H(p) - H(mean over rows of p), averaged over codebooks,
            with x_hat, c_hat = F.normalize(...) for cosine and as they are for l2; the second H has log(mean + 1e-7).

Rows are taken in blocks, forward and again in backward, so that memory is blocks of BLOCK_SCORES probabilities and
never N x K: besides inputs and gradients, 4 x BLOCK_SCORES elements and one (G, K) array in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from meditok.errors import DtypeError, ShapeError
from meditok.ops._library import check_same_device, dtype_name, library, refuse_second_derivative
from meditok.ops.reference import ENTROPY_FLOOR, normalise_backward, unit_rows
from meditok.ops.vq import check_assign

BLOCK_SCORES = 1 << 18  # probabilities held at once: 1 MiB, on CUDA 64 times as many

# ---- checks ------------------------------------------------------------------------------------------------


def _check(x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None, temperature: float) -> None:
    check_assign(x, codebook, metric)
    if x.dtype != codebook.dtype:
        raise DtypeError(f"x is {x.dtype} and codebook {codebook.dtype}; one dtype is needed, convert one of them")
    if mask is not None and (dtype_name(mask) != "bool" or tuple(mask.shape) != (x.shape[0],)):
        raise ShapeError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; "
            f"bool of shape ({x.shape[0]},) is needed, True = used"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not above 0; the published value is 0.01")


# ---- schema and kernels ------------------------------------------------------------------------------------

library.define(
    "vq_entropy(Tensor x, Tensor codebook, Tensor? mask=None, *, float temperature=0.01, str metric='cosine') "
    "-> (Tensor, Tensor)"
)
library.define(
    "vq_entropy_backward(Tensor grad, Tensor x, Tensor codebook, Tensor share, Tensor? mask, *, float temperature, "
    "str metric) -> (Tensor, Tensor)"
)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products in float32, also under the caller's autocast or TF32: an error of 1e-3 is a tenth of a temperature."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32 = before


def _blocks(x: Tensor, codebook: Tensor, mask: Tensor | None, temperature: float, metric: str) -> Iterator[tuple]:
    """(group, rows as a slice, unit rows (n, C), unit codes (K, C), logits (n, K), weight (n, 1)), block by block."""
    scores = 64 * BLOCK_SCORES if x.is_cuda else BLOCK_SCORES
    size = max(1, scores // max(1, codebook.shape[1]))
    for g in range(codebook.shape[0]):
        code = unit_rows(codebook[g], metric)  # (K, C)
        offset = code.square().sum(-1)  # |x|^2 is the same for every code and drops out of the softmax
        for start in range(0, x.shape[0], size):
            rows = slice(start, start + size)
            hat = unit_rows(x[rows, g], metric)  # (n, C)
            weight = hat.new_ones(len(hat), 1) if mask is None else mask[rows, None].to(hat.dtype)
            if mask is not None:
                hat = torch.where(mask[rows, None], hat, 0)  # what is masked may be NaN
            yield g, rows, hat, code, torch.addmm(offset / -temperature, hat * (2 / temperature), code.T), weight


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """Number of rows that count, at least 1: () float64."""
    kept = x.new_tensor(x.shape[0], dtype=torch.float64) if mask is None else mask.sum().double()
    return kept.clamp_min(1)


def _entropy(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, *, temperature: float = 0.01, metric: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """The loss, and the mean probabilities (G, K) that the backward needs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    each = torch.zeros(codebook.shape[0], dtype=torch.float64, device=x.device)
    share = torch.zeros(codebook.shape[:2], dtype=torch.float64, device=x.device)
    with _full_precision(x.device):
        for g, _, _, _, logits, weight in _blocks(x, codebook, mask, temperature, metric):
            log_p = logits.log_softmax(-1)
            p = log_p.exp()
            share[g] += torch.mv(p.T, weight[:, 0])
            each[g] -= (p.mul_(log_p).sum(-1) * weight[:, 0]).sum(dtype=torch.float64)
    kept = _kept(x, mask)
    share /= kept
    loss = each / kept + (share * (share + ENTROPY_FLOOR).log()).sum(-1)
    return loss.mean().to(wide), share


def _entropy_backward(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    share: Tensor,
    mask: Tensor | None,
    *,
    temperature: float,
    metric: str,
) -> tuple[Tensor, Tensor]:
    """Gradients to x (N, G, C) and the codebook (G, K, C).

    With w_k = log(m_k + 1e-7) + m_k / (m_k + 1e-7), m = share, the gradient to the logits of one row is
    p_k (w_k - sum_j p_j w_j - log p_k - H(p)) / N.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    floored = share + ENTROPY_FLOOR
    slope = (floored.log() + share / floored).to(wide)  # (G, K)
    scale = (grad.double() / (codebook.shape[0] * _kept(x, mask))).to(wide) * (2 / temperature)
    grad_x = torch.zeros(x.shape, dtype=wide, device=x.device)
    grad_codebook = torch.zeros(codebook.shape, dtype=wide, device=x.device)
    with _full_precision(x.device):
        for g, rows, hat, code, logits, weight in _blocks(x, codebook, mask, temperature, metric):
            p = logits.softmax(-1)
            logits -= logits.amax(-1, keepdim=True)  # log p and these differ by a constant, which drops out
            inner = torch.sub(slope[g], logits).mul_(p)
            inner.addcmul_(p, inner.sum(-1, keepdim=True), value=-1)  # (n, K), rows sum to 0
            weight = weight * scale
            grad_x[rows, g] = inner @ code * weight
            grad_codebook[g] += inner.T @ (hat * weight) - inner.T @ weight * code
    if metric == "cosine":
        grad_x = normalise_backward(grad_x, x.to(wide))
        grad_codebook = normalise_backward(grad_codebook, codebook.to(wide))
    if mask is not None:
        grad_x = torch.where(mask[:, None, None], grad_x, 0)
    return grad_x.to(x.dtype), grad_codebook.to(codebook.dtype)


library.impl("vq_entropy", _entropy, "CompositeExplicitAutograd")
library.impl("vq_entropy_backward", _entropy_backward, "CompositeExplicitAutograd")

# ---- fake --------------------------------------------------------------------------------------------------


@torch.library.register_fake("meditok::vq_entropy", lib=library)
def _entropy_fake(x, codebook, mask=None, **settings):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((), dtype=wide), x.new_empty(codebook.shape[:2], dtype=torch.float64)


@torch.library.register_fake("meditok::vq_entropy_backward", lib=library)
def _entropy_backward_fake(grad, x, codebook, share, mask, **settings):
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape)


# ---- autograd ----------------------------------------------------------------------------------------------


def _entropy_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    x, codebook, mask = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, codebook, output[1], mask)
    ctx.settings = dict(keyword_only_inputs)


def _entropy_gradient(ctx, grad, grad_share):
    x, codebook, share, mask = ctx.saved_tensors
    return *torch.ops.meditok.vq_entropy_backward(grad, x, codebook, share, mask, **ctx.settings), None


torch.library.register_autograd("meditok::vq_entropy", _entropy_gradient, setup_context=_entropy_setup, lib=library)
refuse_second_derivative("vq_entropy_backward")

# ---- public ------------------------------------------------------------------------------------------------


def vq_entropy(
    x: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 0.01,
    metric: str = "cosine",
    mask: Tensor | None = None,
) -> Tensor:
    """Entropy term of x (N, G, C) against codebook (G, K, C), mask (N,) bool, True = used: a scalar, float32 (float64
    for float64 inputs), 0 if no row is used; torch tensors only.

    Mean entropy of softmax(-squared distance / temperature) less the entropy of its mean over rows, averaged over
    codebooks; between about -log K and 0, the lower the better. Differentiable to x and codebook. Needs no N x K
    array: a second pass recomputes the probabilities. Raises ShapeError, DtypeError, or ValueError for another metric
    or a temperature that is not positive.
    """
    _check(x, codebook, metric, mask, temperature)
    check_same_device(x=x, codebook=codebook, mask=mask)
    return torch.ops.meditok.vq_entropy(x, codebook, mask, temperature=float(temperature), metric=metric)[0]
