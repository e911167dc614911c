"""Every op in plain PyTorch: the oracle of the tests, the fallback of the kernels, and their documentation.

Nothing here is tuned. Scores are float64, computed in a fixed index order with separate multiplications and
additions (never fused), so that a kernel can repeat them bit for bit; memory stays bounded because no N x K
array outlives a block of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """q (B, H, N, D), k, v (B, H, M, D) -> (B, H, N, D), strided as (B, N, H, D); a fully masked row is 0."""
    attended = None
    if attn_mask is not None:
        open_ = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        attended = open_.any(-1, keepdim=True)
        # A row without a key attends to all of them for a moment, so that no NaN arises; its result is
        # dropped below.
        attn_mask = attn_mask | ~attended if attn_mask.dtype == torch.bool else attn_mask.where(attended, 0)
    if k.shape[-2] == 0:
        out = torch.zeros_like(q) + 0 * (k.sum() + v.sum())
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    if attended is not None:
        out = out.where(attended, 0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def attention_qkv(
    qkv: Tensor, *, is_causal: bool = False, scale: float | None = None, reduce: str | None = None
) -> Tensor:
    """qkv (B, N, 3, H, D) -> (B, N, H * D), or (B, N, D) with reduce="mean" over the heads."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    out = attention(q, k, v, is_causal=is_causal, scale=scale).transpose(1, 2)  # (B, N, H, D)
    return out.mean(2) if reduce == "mean" else out.flatten(2)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask_needed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention` to q, k, v and an additive mask (empty unless needed), written out."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, keys, values, g = (x.to(wide) for x in (q, k, v, grad))
    scores = rows @ keys.transpose(-1, -2) * scale  # (B, H, N, M)
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        added = scores + attn_mask if attn_mask.is_floating_point() else scores
        open_ = attn_mask > -torch.inf if attn_mask.is_floating_point() else attn_mask
        scores = torch.where(open_, added, -torch.inf)
    attended = (scores != -torch.inf).any(-1, keepdim=True)
    p = torch.where(attended, scores.where(attended, 0).softmax(-1), 0)
    dp = g @ values.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    grads = (ds @ keys * scale, ds.transpose(-1, -2) @ rows * scale, p.transpose(-1, -2) @ g)
    grad_mask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype) if mask_needed else q.new_empty(0)
    return *(x.to(q.dtype) for x in grads), grad_mask


def attention_qkv_backward(
    grad: Tensor, qkv: Tensor, *, is_causal: bool = False, scale: float | None = None, reduce: str | None = None
) -> Tensor:
    """Gradient of `attention_qkv` to qkv (B, N, 3, H, D)."""
    heads = qkv.shape[3]
    if reduce == "mean":
        grad = (
            (grad.to(torch.promote_types(grad.dtype, torch.float32)) / heads)
            .unsqueeze(2)
            .expand(*qkv.shape[:2], *qkv.shape[3:])
        )
    else:
        grad = grad.unflatten(-1, (heads, -1))
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    *grads, _ = attention_backward(grad.transpose(1, 2), q, k, v, is_causal=is_causal, scale=scale)
    return torch.stack([x.transpose(1, 2) for x in grads], 2)


# ---- linear layers -----------------------------------------------------------------------------------------


def linear(x, weight, bias=None, residual=None, gate=None, gate_bias=None, norms=(), eps=(), activation="none"):
    """See meditok/ops/linear.py; norms: gain and bias of each norm in turn, eps: one a norm."""
    for gain, shift, e in zip(norms[::2], norms[1::2], eps, strict=True):
        x = F.layer_norm(x, gain.shape, gain, shift, e)
    y = F.linear(x, weight, bias)
    if gate is not None:
        y = F.gelu(y, approximate="tanh") * F.linear(x, gate, gate_bias)
    elif activation == "gelu":
        y = F.gelu(y)
    return y if residual is None else y + residual


# ---- convolutions, channels last ---------------------------------------------------------------------------


def depthwise_gelu(x, weight, bias, stride=1):
    """See meditok/ops/convolution.py."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, 1, groups=len(weight))
    return F.gelu(y).permute(0, 2, 3, 1).contiguous()


def upsample_differences(x):
    """See meditok/ops/convolution.py."""
    tall = F.pad(x, (0, 0, 0, 0, 1, 1))
    tall = tall[:, 1:] - tall[:, :-1]  # (B, h+1, w, C)
    wide, both = (F.pad(a, (0, 0, 1, 1)) for a in (x, tall))
    return tall, wide[:, :, 1:] - wide[:, :, :-1], both[:, :, 1:] - both[:, :, :-1]


def upsample_gather(level, tall, wide, both, gain=None, bias=None, eps=0.0):
    """See meditok/ops/convolution.py."""
    batch, h, w, width = level.shape
    tall, wide, both = tall.unflatten(-1, (2, width)), wide.unflatten(-1, (2, width)), both.unflatten(-1, (4, width))
    rows = []
    for p in (0, 1):  # output row 2i + p, column 2j + q
        row = level + tall[:, p : p + h, :, p]
        rows.append([row + wide[:, :, q : q + w, q] + both[:, p : p + h, q : q + w, 2 * p + q] for q in (0, 1)])
    y = torch.stack([torch.stack(row, 3) for row in rows], 2).view(batch, 2 * h, 2 * w, width)
    return y if gain is None else F.gelu(F.layer_norm(y, (width,), gain, bias, eps))
