"""Vector quantization, training: quantise with straight-through gradient and loss, statistics, EMA update.

vq_quantize: e = vq_lookup(vq_assign(x)); z = x_hat + (e - x_hat).detach();
             loss = commitment_weight * mse(x_hat, e.detach()) + codebook_weight * mse(e, x_hat.detach())
             with x_hat = F.normalize(x, dim=-1) for cosine, x for l2; x (N, G, C), codebook (G, K, C).
vq_stats:    counts[g, k] = (ids[:, g] == k).sum(); sums[g, k] = x[ids[:, g] == k, g].sum(0)
vq_update_:  ema = ema * decay + new * (1 - decay); codebook = normalised (cosine) or smoothed mean (l2) of
it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from meditok import native
from meditok.errors import DtypeError, ShapeError
from meditok.ops import _native, numpy_train, reference
from meditok.ops._cupy import forward_strides, on_torch
from meditok.ops._library import (
    check_float,
    check_integer,
    check_metric,
    check_rank,
    check_same_device,
    check_writable,
    checked_ids,
    dtype_name,
    kind_of,
    library,
    refuse_second_derivative,
    to_torch,
)
from meditok.ops.packed import split
from meditok.ops.vq import check_assign

# ---- checks ------------------------------------------------------------------------------------------------


def _check_quantize(x: Any, codebook: Any, metric: str, mask: Any) -> None:
    check_assign(x, codebook, metric)
    if dtype_name(x) != dtype_name(codebook):
        raise DtypeError(f"x is {x.dtype} and codebook {codebook.dtype}; one dtype is needed, convert one of them")
    if mask is not None and (dtype_name(mask) != "bool" or tuple(mask.shape) != (x.shape[0],)):
        raise ShapeError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; "
            f"bool of shape ({x.shape[0]},) is needed, True = used"
        )


# ---- schema and kernels ------------------------------------------------------------------------------------

library.define(
    "vq_quantize(Tensor x, Tensor codebook, Tensor? mask=None, Tensor? packed=None, *, str metric='cosine', "
    "float commitment_weight=0.25, float codebook_weight=1.0, bool rotation=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "vq_quantize_backward(Tensor grad_z, Tensor grad_loss, Tensor x, Tensor codebook, Tensor ids, "
    "Tensor? mask, *, str metric, float commitment_weight, float codebook_weight, bool rotation, "
    "bool codebook_needed=True) -> (Tensor, Tensor)"
)
library.define("vq_stats(Tensor x, Tensor ids, SymInt codes) -> (Tensor, Tensor)")
library.define(
    "vq_update_(Tensor(a!) codebook, Tensor(b!) ema_counts, Tensor(c!) ema_sums, Tensor counts, "
    "Tensor sums, *, float decay, float eps, str metric='cosine') -> ()"
)


def _quantize_composed(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None = None,
    packed: Tensor | None = None,
    *,
    metric: str = "cosine",
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    rotation: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assign and lookup through the kernels of the device, the loss in PyTorch."""
    ids = torch.ops.meditok.vq_assign(x, codebook, packed, metric=metric)
    z = torch.ops.meditok.vq_lookup(ids, codebook, metric=metric)
    hat = reference.unit_rows(x, metric)
    square = (hat - z.to(hat.dtype)).square()
    if mask is None:
        mean = square.sum() / max(1, square.numel())
    else:
        ids = torch.where(mask[:, None], ids, -1)
        z = torch.where(mask[:, None, None], z, 0)
        kept = mask.sum().clamp_min(1) * (x.shape[1] * x.shape[2])
        mean = torch.where(mask[:, None, None], square, 0).sum() / kept.clamp_min(1)
    loss = (mean * (commitment_weight + codebook_weight)).float()
    return z, ids, loss, reference.count_ids(ids, codebook.shape[1])


def _quantize_native(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, packed: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _kernel_takes(x, codebook):
        return _quantize_composed(x, codebook, mask, packed, **settings)
    if packed is None or packed.numel() == 0:
        packed = torch.ops.meditok.vq_pack(codebook, metric=settings.get("metric", "cosine"))
    outputs = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(x.shape[:2], dtype=torch.int64, device=x.device),
        torch.empty((), dtype=torch.float32, device=x.device),
        torch.empty(codebook.shape[:2], dtype=torch.int64, device=x.device),
    )
    _native.quantize(x, codebook, packed, mask, _with_defaults(settings), outputs, _scratch(x))
    return outputs


def _quantize_backward_native(
    grad_z: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    *,
    codebook_needed: bool = True,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    if not _kernel_takes(x, codebook, grad_z):
        return reference.vq_quantize_backward(
            grad_z, grad_loss, x, codebook, ids, mask, codebook_needed=codebook_needed, **settings
        )
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_codebook = torch.empty(
        codebook.shape if codebook_needed else (0,), dtype=codebook.dtype, device=codebook.device
    )
    grads = (grad_x, grad_codebook if codebook_needed else None)
    _native.quantize_backward(grad_z, grad_loss, x, codebook, ids, mask, settings, grads, _scratch(x))
    return grad_x, grad_codebook


def _stats_native(x: Tensor, ids: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    counts = torch.empty((x.shape[1], codes), dtype=torch.int64, device=x.device)
    sums = torch.empty((x.shape[1], codes, x.shape[2]), dtype=torch.float32, device=x.device)
    _native.stats(x, ids.to(torch.int64), counts, sums, _scratch(x))
    return counts, sums


def _update_native(
    codebook: Tensor, ema_counts: Tensor, ema_sums: Tensor, counts: Tensor, sums: Tensor, **settings: Any
) -> None:
    if not ema_counts.dtype == ema_sums.dtype == sums.dtype == torch.float32 or counts.dtype != torch.int64:
        reference.vq_update_(codebook, ema_counts, ema_sums, counts, sums, **settings)
        return
    settings.setdefault("metric", "cosine")
    _native.update(codebook, ema_counts, ema_sums, counts, sums, settings, _scratch(codebook))
    torch.autograd.graph.increment_version((codebook, ema_counts, ema_sums))  # autograd does not see the pointers


def _kernel_takes(*tensors: Tensor) -> bool:
    """The kernels read and write one dtype."""
    return all(tensor.dtype == tensors[0].dtype for tensor in tensors)


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The schema's defaults; the dispatcher leaves out what equals them."""
    return {"metric": "cosine", "commitment_weight": 0.25, "codebook_weight": 1.0, **settings}


def _scratch(tensor: Tensor) -> Any:
    return lambda size: torch.empty(size, dtype=torch.uint8, device=tensor.device)


KERNELS = {
    "vq_quantize": (_quantize_composed, _quantize_native),
    "vq_quantize_backward": (reference.vq_quantize_backward, _quantize_backward_native),
    "vq_stats": (reference.vq_stats, _stats_native),
    "vq_update_": (reference.vq_update_, _update_native),
}


def _on_cuda(plain: Any, kernel: Any) -> Any:
    """The kernel where the compiled ones serve the device of the first tensor; Triton helps the others through
    vq_assign and vq_lookup."""

    def run(first: Tensor, *arguments: Any, **settings: Any) -> Any:
        chosen = kernel if native.cuda_backend(first.device.index) == "native" else plain
        return chosen(first, *arguments, **settings)

    return run


for _name, (_plain, _kernel) in KERNELS.items():
    library.impl(_name, _plain, "CompositeExplicitAutograd")
    library.impl(_name, _on_cuda(_plain, _kernel), "CUDA")
    if native.backend == "native":
        library.impl(_name, _kernel, "CPU")

# ---- fake --------------------------------------------------------------------------------------------------


@torch.library.register_fake("meditok::vq_quantize", lib=library)
def _quantize_fake(x, codebook, mask=None, packed=None, **settings):
    ids = x.new_empty(x.shape[:2], dtype=torch.int64)
    loss = x.new_empty((), dtype=torch.float32)
    return x.new_empty(x.shape), ids, loss, ids.new_empty(codebook.shape[:2])


@torch.library.register_fake("meditok::vq_quantize_backward", lib=library)
def _quantize_backward_fake(grad_z, grad_loss, x, codebook, ids, mask, codebook_needed=True, **settings):
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape if codebook_needed else (0,))


@torch.library.register_fake("meditok::vq_stats", lib=library)
def _stats_fake(x, ids, codes):
    return ids.new_empty((x.shape[1], codes)), x.new_empty((x.shape[1], codes, x.shape[2]), dtype=torch.float32)


@torch.library.register_fake("meditok::vq_update_", lib=library)
def _update_fake(codebook, ema_counts, ema_sums, counts, sums, **settings):
    return None


# ---- autograd and vmap -------------------------------------------------------------------------------------


def _quantize_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    x, codebook, mask, _ = inputs
    _, ids, _, counts = output
    ctx.mark_non_differentiable(ids, counts)
    ctx.set_materialize_grads(False)  # ids and counts would get zeros that nobody reads
    ctx.save_for_backward(x, codebook, ids, mask)
    ctx.settings = dict(keyword_only_inputs)


def _quantize_gradient(ctx, grad_z, grad_ids, grad_loss, grad_counts):
    x, codebook, ids, mask = ctx.saved_tensors
    grad_z = torch.zeros_like(x) if grad_z is None else grad_z
    grad_loss = x.new_zeros((), dtype=torch.float32) if grad_loss is None else grad_loss
    needed = ctx.needs_input_grad[1]
    grad_x, grad_codebook = torch.ops.meditok.vq_quantize_backward(
        grad_z, grad_loss, x, codebook, ids, mask, codebook_needed=needed, **ctx.settings
    )
    return grad_x, grad_codebook if needed else None, None, None


torch.library.register_autograd("meditok::vq_quantize", _quantize_gradient, setup_context=_quantize_setup, lib=library)
refuse_second_derivative("vq_quantize_backward")


def one_by_one(op):
    """A vmap rule that runs a batch element by element: the loss and the counts belong to each element
    alone."""

    def rule(info, in_dims, *inputs, **settings):
        def pick(value, dim, index):
            return value.select(dim, index) if dim is not None else value

        outputs = [
            op(*(pick(value, dim, index) for value, dim in zip(inputs, in_dims, strict=True)), **settings)
            for index in range(info.batch_size)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


for _name in ("vq_quantize", "vq_quantize_backward", "vq_stats"):
    torch.library.register_vmap(f"meditok::{_name}", one_by_one(getattr(torch.ops.meditok, _name)), lib=library)

# ---- public ------------------------------------------------------------------------------------------------


def vq_quantize(
    x: Any,
    codebook: Any,
    *,
    metric: str = "cosine",
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    mask: Any = None,
    rotation: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """Quantise for training: x (N, G, C), codebook (G, K, C) or PackedCodebook, mask (N,) bool, True = used.

    Returns z (N, G, C), bit-equal to `vq_lookup(ids)`, whose gradient passes straight to the normalised x
    (turned and scaled with `rotation`, Fifty et al. 2024); ids (N, G) int64; loss, a float32 scalar, the mean
    over used rows (0 if none); counts (G, K) int64. Masked rows: id -1, z 0, no gradient. A NaN row of x gets
    id -1, a NaN z and loss. Raises ShapeError, DtypeError, and TypeError for arrays of different kinds.
    """
    codebook, packed = split(codebook, metric)
    kind = kind_of(x, codebook, mask)
    _check_quantize(x, codebook, metric, mask)
    settings = dict(
        metric=metric,
        commitment_weight=float(commitment_weight),
        codebook_weight=float(codebook_weight),
        rotation=bool(rotation),
    )
    if kind == "cupy":
        return on_torch(torch.ops.meditok.vq_quantize, x, codebook, mask, packed, **settings)
    if kind == "numpy" and native.backend == "native":
        return numpy_train.quantize(x, codebook, packed, mask, settings)
    if kind == "numpy":
        mask = None if mask is None else to_torch(mask)
        return _arrays(_quantize_composed(to_torch(x), to_torch(codebook), mask, **settings))
    check_same_device(x=x, codebook=codebook, mask=mask)
    return torch.ops.meditok.vq_quantize(x, codebook, mask, packed, **settings)


def vq_stats(x: Any, ids: Any, K: int) -> tuple[Any, Any]:
    """Statistics of an assignment: x (N, G, C), ids (N, G) in -1..K-1 -> counts (G, K) int64, sums (G, K, C)
    float32.

    x is what the codebook averages (the normalised rows for cosine). Rows with id -1 are left out. Summed in
    blocks of 4,096 rows in order, so the thread count never matters. Raises ShapeError, DtypeError,
    TokenRangeError, and TypeError for arrays of different kinds.
    """
    kind = kind_of(x, ids)
    check_rank("x", x, "(N, G, C)")
    check_float("x", x)
    check_integer("ids", ids)
    if tuple(ids.shape) != tuple(x.shape[:2]):
        raise ShapeError(f"ids have shape {tuple(ids.shape)} and x {tuple(x.shape)}; (N, G) and (N, G, C) are needed")
    if kind == "torch":
        check_same_device(x=x, ids=ids)
    ids = checked_ids(ids, K, lowest=-1)
    if kind == "cupy":
        return on_torch(torch.ops.meditok.vq_stats, x, ids, K)
    if kind == "numpy" and native.backend == "native":
        return numpy_train.stats(x, ids, K)
    if kind == "numpy":
        return _arrays(reference.vq_stats(to_torch(x), to_torch(ids), K))
    return torch.ops.meditok.vq_stats(x, ids, K)


def vq_update_(
    codebook: Any,
    ema_counts: Any,
    ema_sums: Any,
    counts: Any,
    sums: Any,
    *,
    decay: float,
    eps: float,
    metric: str = "cosine",
) -> None:
    """EMA update in place (van den Oord et al. 2017, appendix A.1) of codebook and ema_sums (G, K, C),
    ema_counts (G, K).

    counts (G, K) and sums (G, K, C) are those of `vq_stats`. Laplace smoothing by `eps` for l2; for cosine a
    row is the normalised sum. Counts that are all zero change nothing. Raises ShapeError, DtypeError, TypeError for
    arrays of different kinds, and ValueError for another metric or state that cannot be written in place.
    """
    kind = kind_of(codebook, ema_counts, ema_sums, counts, sums)
    check_metric(metric)
    check_rank("codebook", codebook, "(G, K, C)")
    shape = tuple(codebook.shape)
    for name, array, needed in (
        ("ema_counts", ema_counts, shape[:2]),
        ("ema_sums", ema_sums, shape),
        ("counts", counts, shape[:2]),
        ("sums", sums, shape),
    ):
        if tuple(array.shape) != needed:
            raise ShapeError(
                f"{name} has shape {tuple(array.shape)}; {needed} is needed for a codebook of shape {shape}"
            )
    for name, array in (("codebook", codebook), ("ema_counts", ema_counts), ("ema_sums", ema_sums), ("sums", sums)):
        check_float(name, array)
    check_writable(codebook=codebook, ema_counts=ema_counts, ema_sums=ema_sums)
    settings = dict(decay=float(decay), eps=float(eps), metric=metric)
    if kind == "torch":
        check_same_device(codebook=codebook, ema_counts=ema_counts, ema_sums=ema_sums, counts=counts, sums=sums)
        torch.ops.meditok.vq_update_(codebook, ema_counts, ema_sums, counts, sums, **settings)
        return
    if kind == "numpy" and numpy_train.update(codebook, (ema_counts, ema_sums, counts, sums), settings):
        return
    if kind == "cupy":
        state = [forward_strides(array) for array in (codebook, ema_counts, ema_sums)]
        on_torch(torch.ops.meditok.vq_update_, *state, counts, sums, **settings)
    else:
        tensors = [to_torch(array) for array in (codebook, ema_counts, ema_sums)]
        reference.vq_update_(*tensors, to_torch(counts), to_torch(sums), **settings)
        state = _arrays(tensors)
    for array, updated in zip((codebook, ema_counts, ema_sums), state, strict=True):
        if updated is not array:
            array[...] = updated


def _arrays(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    return tuple(tensor.numpy() if tensor.ndim else tensor.numpy()[()] for tensor in tensors)
