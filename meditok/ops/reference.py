"""Every op in plain PyTorch: the oracle of the tests, the fallback of the kernels, and their documentation.

Nothing here is tuned. Scores are float64, computed in a fixed index order with separate multiplications and
additions (never fused), so that a kernel can repeat them bit for bit; memory stays bounded because no N x K
array outlives a block of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meditok.ops.reference_layers import (  # noqa: F401  one module holds the reference of every op
    attention,
    attention_backward,
    attention_qkv,
    attention_qkv_backward,
    depthwise_gelu,
    linear,
    upsample_differences,
    upsample_gather,
)

FLOOR = 1e-12  # no code or row is divided by less than this
BLOCK_SCORES = 1 << 18  # scores held at once by `vq_assign`: 2 MiB of float64
ENTROPY_FLOOR = 1e-7  # added to a mean probability before its logarithm
STATS_ROWS = 4096  # rows summed into one partial of `vq_stats`; part of the contract, not a tuning knob


def sum_of_squares(rows: Tensor) -> Tensor:
    """sum_i rows[..., i]^2 in float64 and index order: (..., C) -> (...)."""
    rows = rows.double()
    total = torch.zeros(rows.shape[:-1], dtype=torch.float64, device=rows.device)
    for i in range(rows.shape[-1]):
        total = total + rows[..., i] * rows[..., i]
    return total


def square_root(values: Tensor) -> Tensor:
    """Square root rounded to nearest, as IEEE 754 and the kernels have it; some builds of PyTorch miss it by
    an ulp.

    One Newton step whose residual values - root^2 is exact: the product is split in two (Dekker 1971).
    """
    root = values.sqrt()
    shifted = root * 134217729.0  # 2^27 + 1 splits 53 bits in halves
    high = shifted - (shifted - root)
    low = root - high
    product = root * root
    missed = ((high * high - product) + 2 * high * low) + low * low
    step = ((values - product) - missed) / (2 * root)
    return torch.where(torch.isfinite(step), root + step, root)


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norm of the last axis, floored at 1e-12: (..., C) -> (...) float64."""
    return square_root(sum_of_squares(rows)).clamp_min(FLOOR)


def normalise(rows: Tensor) -> Tensor:
    """rows / max(|rows|, 1e-12): quotient in float64, rounded to float32, then to the dtype of `rows`."""
    quotient = rows.double() / row_norms(rows).unsqueeze(-1)
    return quotient if rows.dtype == torch.float64 else quotient.float().to(rows.dtype)


def vq_assign(x: Tensor, codebook: Tensor, *, metric: str = "cosine") -> Tensor:
    """x (N, G, C), codebook (G, K, C) -> ids (N, G) int64: the best code by the canonical float64 score.

    cosine: largest (sum_i x_i c_i) / max(|c|, 1e-12); l2: smallest sum_i (x_i - c_i)^2; first best wins.
    A row of x with a NaN or infinity gets -1; a code with one is never chosen; no choosable code gives -1.
    """
    rows, groups, _ = x.shape
    codes = codebook.shape[1]
    ids = torch.full((rows, groups), -1, dtype=torch.int64, device=x.device)
    if ids.numel() == 0 or codes == 0:
        return ids
    block = max(1, BLOCK_SCORES // codes)
    for g in range(groups):
        code = codebook[g].double()  # (K, C)
        usable = torch.isfinite(code).all(-1)  # (K,)
        norm = row_norms(code)  # (K,)
        columns = code.t().contiguous()  # (C, K)
        for start in range(0, rows, block):
            row = x[start : start + block, g].double()  # (n, C)
            score = _scores(row, columns, norm, metric)
            choosable = usable & ~score.isnan()
            score = score.masked_fill(~choosable, -torch.inf)
            best = score.argmax(-1)
            # All choosable scores may be -inf (overflow): argmax then points at any code, so take the first
            # one.
            overflow = score.gather(-1, best[:, None]).squeeze(-1) == -torch.inf
            best = torch.where(overflow, choosable.to(torch.uint8).argmax(-1), best)
            found = choosable.any(-1) & torch.isfinite(row).all(-1)
            ids[start : start + block, g] = torch.where(found, best, -1)
    return ids


def _scores(row: Tensor, columns: Tensor, norm: Tensor, metric: str) -> Tensor:
    """row (n, C), columns (C, K), norm (K,) -> (n, K) float64, larger is better."""
    score = row.new_zeros(row.shape[0], columns.shape[1])
    for i in range(row.shape[1]):
        if metric == "cosine":
            score += row[:, i, None] * columns[i]
        else:
            difference = row[:, i, None] - columns[i]
            score += difference.mul_(difference)
    return score.div_(norm) if metric == "cosine" else score.neg_()


def vq_lookup(ids: Tensor, codebook: Tensor, *, metric: str = "cosine") -> Tensor:
    """ids (N, G), codebook (G, K, C) -> (N, G, C): the rows, normalised for cosine; an id outside 0..K-1
    gives NaN."""
    groups, codes, width = codebook.shape
    ids = ids.long()  # a narrow type would wrap K before it is compared
    inside = (ids >= 0) & (ids < codes)
    if codes == 0:
        return codebook.new_full((*ids.shape, width), torch.nan)
    group = torch.arange(groups, device=codebook.device)
    rows = codebook[group, torch.where(inside, ids, 0)]
    if metric == "cosine":
        rows = normalise(rows)
    return torch.where(inside.unsqueeze(-1), rows, torch.nan)


def vq_lookup_backward(grad: Tensor, ids: Tensor, codebook: Tensor, *, metric: str = "cosine") -> Tensor:
    """Gradient of `vq_lookup` to the codebook: grad (N, G, C) -> (G, K, C)."""
    groups, codes, width = codebook.shape
    wide = torch.promote_types(codebook.dtype, torch.float32)
    total = torch.zeros(groups * codes, width, dtype=wide, device=codebook.device)
    ids = ids.long()
    inside = (ids >= 0) & (ids < codes)
    offset = torch.arange(groups, device=ids.device) * codes
    grad = torch.where(inside.unsqueeze(-1), grad.to(wide), 0)
    total.index_add_(0, (torch.where(inside, ids, 0) + offset).flatten(), grad.reshape(-1, width))
    total = total.view(groups, codes, width)
    if metric == "cosine":  # the rows share one norm, so the sum goes through the normalisation once
        total = normalise_backward(total, codebook.to(wide))
    return total.to(codebook.dtype)


def normalise_backward(grad: Tensor, rows: Tensor) -> Tensor:
    """Gradient of rows / max(|rows|, 1e-12): (g - u (u . g)) / |rows|; below the floor the norm is a
    constant."""
    norm = rows.norm(dim=-1, keepdim=True)
    unit = rows / norm.clamp_min(FLOOR)
    along = torch.where(norm >= FLOOR, (unit * grad).sum(-1, keepdim=True), 0)
    return (grad - unit * along) / norm.clamp_min(FLOOR)


def unit_rows(x: Tensor, metric: str) -> Tensor:
    """What the loss sees of x: normalised rows for cosine, x itself for l2; float32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / x.norm(dim=-1, keepdim=True).clamp_min(FLOOR) if metric == "cosine" else x


def count_ids(ids: Tensor, codes: int) -> Tensor:
    """ids (N, G) -> counts (G, K) int64; ids outside 0..K-1 are not counted."""
    groups = ids.shape[1]
    counts = torch.zeros(groups * codes + 1, dtype=torch.int64, device=ids.device)  # the last one takes what is outside
    offset = torch.arange(groups, device=ids.device) * codes
    flat = torch.where((ids >= 0) & (ids < codes), ids + offset, groups * codes).flatten()
    counts.index_add_(0, flat, torch.ones_like(flat))
    return counts[:-1].view(groups, codes)


def vq_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "cosine",
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    mask: Tensor | None = None,
    rotation: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z, ids, loss, counts) as `meditok.ops.vq_quantize`, differentiable by autograd alone: the oracle of
    its gradients.

    The loss is left in the dtype of the computation (float64 for float64 input), so that gradcheck can judge
    it.
    """
    with torch.no_grad():
        ids = vq_assign(x, codebook, metric=metric)
        ids = ids if mask is None else torch.where(mask[:, None], ids, -1)
        z = vq_lookup(ids, codebook, metric=metric)
    keep = x.new_ones(x.shape[0], dtype=torch.bool) if mask is None else mask
    hat = unit_rows(x, metric)
    code = vq_lookup_differentiable(ids, codebook, metric).to(hat.dtype)
    hat_kept, code_kept = hat[keep], code[keep]
    count = max(1, hat_kept.numel())
    loss = commitment_weight * (hat_kept - code_kept.detach()).square().sum() / count
    loss = loss + codebook_weight * (code_kept - hat_kept.detach()).square().sum() / count
    passed = rotate(hat, torch.where(keep[:, None, None], code, hat).detach()) if rotation else hat
    through = z.to(hat.dtype) + (passed - passed.detach())
    through = torch.where(keep[:, None, None], through, 0).to(x.dtype)
    return through, ids, loss, count_ids(ids, codebook.shape[1])


def vq_lookup_differentiable(ids: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """`vq_lookup` through autograd, for the oracle of `vq_quantize`."""
    group = torch.arange(codebook.shape[0], device=codebook.device)
    rows = codebook[group, ids.clamp_min(0)]
    if metric == "cosine":
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(FLOOR)
    return torch.where((ids >= 0).unsqueeze(-1), rows, torch.nan)


def rotate(hat: Tensor, code: Tensor) -> Tensor:
    """The rotation trick (Fifty et al. 2024, section 4): scale and rotation taking x to its code, both held
    constant."""
    with torch.no_grad():
        hat_norm = hat.norm(dim=-1, keepdim=True).clamp_min(FLOOR)
        code_norm = code.norm(dim=-1, keepdim=True).clamp_min(FLOOR)
        p, q = hat / hat_norm, code / code_norm
        r = p + q
        r = r / r.norm(dim=-1, keepdim=True).clamp_min(FLOOR)
        scale = code_norm / hat_norm
    turned = hat - 2 * r * (r * hat).sum(-1, keepdim=True) + 2 * q * (p * hat).sum(-1, keepdim=True)
    return scale * turned


def vq_quantize_backward(
    grad_z: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    *,
    metric: str,
    commitment_weight: float,
    codebook_weight: float,
    rotation: bool,
    codebook_needed: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of `vq_quantize` to x (N, G, C) and to the codebook (G, K, C), or none of it, written out."""
    hat = unit_rows(x, metric)
    code = vq_lookup(ids, codebook, metric=metric).to(hat.dtype)
    keep = torch.ones_like(ids[:, :1], dtype=torch.bool) if mask is None else mask[:, None]
    keep = keep.unsqueeze(-1)  # (N, 1, 1)
    kept = keep.sum().clamp_min(1) * (x.shape[1] * x.shape[2])
    difference = torch.where(keep, hat - code, 0)
    step = difference * (2 * grad_loss.to(hat.dtype) / kept)  # gradient of the mean square to hat, before its weight
    grad = grad_z.to(hat.dtype)
    if rotation:
        hat_norm = hat.norm(dim=-1, keepdim=True).clamp_min(FLOOR)
        code_norm = code.norm(dim=-1, keepdim=True).clamp_min(FLOOR)
        p, q = hat / hat_norm, code / code_norm
        r = p + q
        r = r / r.norm(dim=-1, keepdim=True).clamp_min(FLOOR)
        turned = grad - 2 * r * (r * grad).sum(-1, keepdim=True) + 2 * p * (q * grad).sum(-1, keepdim=True)
        grad = (code_norm / hat_norm) * turned
    grad_x = torch.where(keep, grad, 0) + commitment_weight * step
    if metric == "cosine":
        grad_x = torch.where(keep, normalise_backward(grad_x, x.to(hat.dtype)), 0)
    if not codebook_needed:
        return grad_x.to(x.dtype), codebook.new_empty(0)
    grad_codebook = vq_lookup_backward(-codebook_weight * step, ids, codebook, metric=metric)
    return grad_x.to(x.dtype), grad_codebook


def vq_stats(x: Tensor, ids: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """x (N, G, C), ids (N, G) -> counts (G, K) int64, sums (G, K, C) float32.

    Rows are summed in order inside blocks of 4,096 and the blocks in order, so that no thread count changes a
    bit.
    """
    rows, groups, width = x.shape
    ids = ids.long()
    sums = torch.zeros(groups * codes, width, dtype=torch.float32, device=x.device)
    offset = torch.arange(groups, device=x.device) * codes
    for start in range(0, rows, STATS_ROWS):
        part = ids[start : start + STATS_ROWS]
        inside = ((part >= 0) & (part < codes)).flatten()
        index = (part + offset).flatten()[inside]
        values = x[start : start + STATS_ROWS].float().reshape(-1, width)[inside]
        sums += torch.zeros_like(sums).index_add_(0, index, values)
    return count_ids(ids, codes), sums.view(groups, codes, width)


def vq_update_(
    codebook: Tensor,
    ema_counts: Tensor,
    ema_sums: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
    metric: str = "cosine",
) -> None:
    """EMA update in place (van den Oord et al. 2017, appendix A.1): codebook, ema_sums (G, K, C), ema_counts
    (G, K).

    l2: row = ema_sum / smoothed count, the counts smoothed by (n_k + eps) / (n + K eps) * n; cosine: row =
    the normalised ema_sum. A row whose sum is zero stays as it is. Counts that are all zero change nothing.
    """
    any_counts = counts.sum() > 0
    new_counts = ema_counts * decay + counts.to(ema_counts.dtype) * (1 - decay)
    new_sums = ema_sums * decay + sums.to(ema_sums.dtype) * (1 - decay)
    if metric == "cosine":
        length = new_sums.norm(dim=-1, keepdim=True)
        rows = torch.where(length > FLOOR, new_sums / length.clamp_min(FLOOR), codebook)
    else:
        total = new_counts.sum(-1, keepdim=True)
        smoothed = (new_counts + eps) / (total + new_counts.shape[-1] * eps) * total
        smoothed = smoothed.unsqueeze(-1)
        rows = torch.where(smoothed > 0, new_sums / smoothed, codebook)
    ema_counts.copy_(torch.where(any_counts, new_counts, ema_counts))
    ema_sums.copy_(torch.where(any_counts, new_sums, ema_sums))
    codebook.copy_(torch.where(any_counts, rows.to(codebook.dtype), codebook))


def vq_entropy(
    x: Tensor,
    codebook: Tensor,
    *,
    temperature: float = 0.01,
    metric: str = "cosine",
    mask: Tensor | None = None,
) -> Tensor:
    """x (N, G, C), codebook (G, K, C), mask (N,) -> scalar; dense, differentiable by autograd alone."""
    hat = unit_rows(x if mask is None else x[mask], metric).transpose(0, 1)  # (G, N, C)
    if not hat.shape[1]:
        return hat.sum() + 0 * codebook.sum()
    code = unit_rows(codebook, metric)
    distance = (hat.unsqueeze(2) - code.unsqueeze(1)).square().sum(-1)  # (G, N, K)
    log_p = (-distance / temperature).log_softmax(-1)
    mean = log_p.exp().mean(1)  # (G, K)
    rows = -(log_p.exp() * log_p).sum(-1).mean(1)
    return (rows + (mean * (mean + ENTROPY_FLOOR).log()).sum(-1)).mean()
