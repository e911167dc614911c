"""Vector quantization, inference: which code is nearest, and what it looks like.

vq_assign(x, codebook) == (F.normalize(codebook, dim=-1) * x[:, :, None]).sum(-1).argmax(-1)      cosine
                       == (x[:, :, None] - codebook).square().sum(-1).argmin(-1)                   l2
vq_lookup(ids, codebook) == F.normalize(codebook, dim=-1)[arange(G), ids]                          (not
normalised for l2) with x (N, G, C), codebook (G, K, C), ids (N, G), evaluated in float64 in index order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from meditok import native
from meditok.errors import ShapeError
from meditok.ops import _native, reference
from meditok.ops._cupy import on_torch
from meditok.ops._library import (
    check_float,
    check_integer,
    check_metric,
    check_rank,
    check_same_device,
    checked_ids,
    kind_of,
    library,
    plain,
    refuse_second_derivative,
    to_torch,
)
from meditok.ops.packed import pack_numpy, split

# ---- checks ------------------------------------------------------------------------------------------------


def check_assign(x: Any, codebook: Any, metric: str) -> None:
    check_metric(metric)
    check_rank("x", x, "(N, G, C)")
    check_rank("codebook", codebook, "(G, K, C)")
    check_float("x", x)
    check_float("codebook", codebook)
    if x.shape[1] != codebook.shape[0] or x.shape[2] != codebook.shape[2]:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} and codebook {tuple(codebook.shape)}; "
            "(N, G, C) and (G, K, C) must share G and C"
        )


def _check_lookup(ids: Any, codebook: Any, metric: str) -> None:
    check_metric(metric)
    check_rank("ids", ids, "(N, G)")
    check_rank("codebook", codebook, "(G, K, C)")
    check_float("codebook", codebook)
    if ids.shape[1] != codebook.shape[0]:
        raise ShapeError(
            f"ids have shape {tuple(ids.shape)} and codebook {tuple(codebook.shape)}; (N, G) and (G, K, C) must share G"
        )
    check_integer("ids", ids)


# ---- schema and kernels ------------------------------------------------------------------------------------

library.define("vq_assign(Tensor x, Tensor codebook, Tensor? packed=None, *, str metric='cosine') -> Tensor")
library.define("vq_lookup(Tensor ids, Tensor codebook, *, str metric='cosine') -> Tensor")
library.define("vq_lookup_backward(Tensor grad, Tensor ids, Tensor codebook, *, str metric='cosine') -> Tensor")


def _assign_reference(x: Tensor, codebook: Tensor, packed: Tensor | None = None, *, metric: str = "cosine") -> Tensor:
    return reference.vq_assign(x, codebook, metric=metric)


def _assign_native(x: Tensor, codebook: Tensor, packed: Tensor | None = None, *, metric: str = "cosine") -> Tensor:
    ids = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    if packed is None or packed.numel() == 0:
        packed = torch.ops.meditok.vq_pack(codebook, metric=metric)
    _native.assign(x, codebook, packed, metric, ids)
    return ids


def _lookup_reference(ids: Tensor, codebook: Tensor, *, metric: str = "cosine") -> Tensor:
    return reference.vq_lookup(ids, codebook, metric=metric)


def _lookup_native(ids: Tensor, codebook: Tensor, *, metric: str = "cosine") -> Tensor:
    out = torch.empty((*ids.shape, codebook.shape[2]), dtype=codebook.dtype, device=codebook.device)
    _native.lookup(ids.to(torch.int64), codebook, metric, out)
    return out


def _assign_triton(x: Tensor, codebook: Tensor, packed: Tensor | None = None, *, metric: str = "cosine") -> Tensor:
    from meditok.ops import triton_vq  # imported where it runs, because that costs half a second

    return triton_vq.assign(x, codebook, metric)


def _lookup_triton(ids: Tensor, codebook: Tensor, *, metric: str = "cosine") -> Tensor:
    from meditok.ops import triton_vq

    return triton_vq.lookup(ids.to(torch.int64), codebook, metric)


ASSIGN = {"native": _assign_native, "triton": _assign_triton, "reference": _assign_reference}
LOOKUP = {"native": _lookup_native, "triton": _lookup_triton, "reference": _lookup_reference}


def _assign_cuda(x: Tensor, codebook: Tensor, packed: Tensor | None = None, *, metric: str = "cosine") -> Tensor:
    return ASSIGN[native.cuda_backend(x.device.index)](x, codebook, packed, metric=metric)


def _lookup_cuda(ids: Tensor, codebook: Tensor, *, metric: str = "cosine") -> Tensor:
    return LOOKUP[native.cuda_backend(codebook.device.index)](ids, codebook, metric=metric)


library.impl("vq_assign", _assign_reference, "CompositeExplicitAutograd")
library.impl("vq_lookup", _lookup_reference, "CompositeExplicitAutograd")
library.impl("vq_lookup_backward", reference.vq_lookup_backward, "CompositeExplicitAutograd")
library.impl("vq_assign", ASSIGN[native.cpu_backend()], "CPU")
library.impl("vq_lookup", LOOKUP[native.cpu_backend()], "CPU")
library.impl("vq_assign", _assign_cuda, "CUDA")
library.impl("vq_lookup", _lookup_cuda, "CUDA")

# ---- fake --------------------------------------------------------------------------------------------------


@torch.library.register_fake("meditok::vq_assign", lib=library)
def _assign_fake(x: Tensor, codebook: Tensor, packed: Tensor | None = None, *, metric: str = "cosine") -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


@torch.library.register_fake("meditok::vq_lookup", lib=library)
def _lookup_fake(ids: Tensor, codebook: Tensor, *, metric: str = "cosine") -> Tensor:
    return codebook.new_empty((*ids.shape, codebook.shape[2]))


@torch.library.register_fake("meditok::vq_lookup_backward", lib=library)
def _lookup_backward_fake(grad: Tensor, ids: Tensor, codebook: Tensor, *, metric: str = "cosine") -> Tensor:
    return codebook.new_empty(codebook.shape)


# ---- autograd and vmap -------------------------------------------------------------------------------------


def _lookup_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.metric = keyword_only_inputs["metric"]


def _lookup_gradient(ctx, grad):
    ids, codebook = ctx.saved_tensors
    return None, torch.ops.meditok.vq_lookup_backward(grad, ids, codebook, metric=ctx.metric)


torch.library.register_autograd("meditok::vq_lookup", _lookup_gradient, setup_context=_lookup_setup, lib=library)
refuse_second_derivative("vq_lookup_backward")


def _batched(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _assign_vmap(info, in_dims, x, codebook, packed=None, *, metric="cosine"):
    """A batch of x folds into N; a batch of codebooks folds into G."""
    size = info.batch_size
    x = _batched(x, in_dims[0], size)  # (B, N, G, C)
    if in_dims[1] is None:
        ids = torch.ops.meditok.vq_assign(x.flatten(0, 1), codebook, packed, metric=metric)
        return ids.unflatten(0, x.shape[:2]), 0
    codebook = codebook.movedim(in_dims[1], 0).flatten(0, 1)  # (B * G, K, C)
    ids = torch.ops.meditok.vq_assign(x.transpose(0, 1).flatten(1, 2), codebook, metric=metric)  # (N, B * G)
    return ids.unflatten(1, (size, x.shape[2])), 1


def _lookup_vmap(info, in_dims, ids, codebook, *, metric="cosine"):
    size = info.batch_size
    ids = _batched(ids, in_dims[0], size)  # (B, N, G)
    if in_dims[1] is None:
        rows = torch.ops.meditok.vq_lookup(ids.flatten(0, 1), codebook, metric=metric)
        return rows.unflatten(0, ids.shape[:2]), 0
    codebook = codebook.movedim(in_dims[1], 0).flatten(0, 1)
    rows = torch.ops.meditok.vq_lookup(ids.transpose(0, 1).flatten(1, 2), codebook, metric=metric)
    return rows.unflatten(1, (size, ids.shape[2])), 1


torch.library.register_vmap("meditok::vq_assign", _assign_vmap, lib=library)
torch.library.register_vmap("meditok::vq_lookup", _lookup_vmap, lib=library)

# ---- public ------------------------------------------------------------------------------------------------


def vq_assign(x: Any, codebook: Any, *, metric: str = "cosine") -> Any:
    """Ids of the best codes: x (N, G, C), codebook (G, K, C) or PackedCodebook -> (N, G) int64.

    cosine: largest (sum_i x_i c_i) / max(|c|, 1e-12); l2: smallest sum_i (x_i - c_i)^2; in float64 from
    exactly upcast inputs (float32, float16, bfloat16, float64; x and codebook may differ), the lowest id
    among equals. The same ids on every backend, instruction set, thread count and batch shape. A row of x
    with a NaN or infinity gets -1, a code with one is never chosen. Raises ShapeError, DtypeError, and
    TypeError for arrays of different kinds.
    """
    codebook, packed = split(codebook, metric)
    kind = kind_of(x, codebook)
    check_assign(x, codebook, metric)
    if kind == "torch":
        check_same_device(x=x, codebook=codebook)
        return torch.ops.meditok.vq_assign(x, codebook, packed, metric=metric)
    if kind == "cupy":
        return on_torch(torch.ops.meditok.vq_assign, x, codebook, packed, metric=metric)
    if native.backend != "native":
        return reference.vq_assign(to_torch(x), to_torch(codebook), metric=metric).numpy()
    x, codebook = plain(x), plain(codebook)
    ids = np.empty(x.shape[:2], dtype=np.int64)
    _native.assign(x, codebook, pack_numpy(codebook, metric) if packed is None else packed, metric, ids)
    return ids


def vq_lookup(ids: Any, codebook: Any, *, metric: str = "cosine") -> Any:
    """Rows of the codebook: ids (N, G) integers, codebook (G, K, C) or PackedCodebook -> (N, G, C) of its
    dtype.

    Rows are normalised for cosine: c / max(|c|, 1e-12) in float64, rounded to float32 and then to the dtype.
    Differentiable to the codebook. Raises TokenRangeError for ids outside 0..K-1 where values are checked
    (see `meditok.ops.checks`; unchecked, such a row is NaN), ShapeError, DtypeError, and TypeError for mixed
    kinds.
    """
    codebook, _ = split(codebook, metric)
    kind = kind_of(ids, codebook)
    _check_lookup(ids, codebook, metric)
    if kind == "torch":
        check_same_device(ids=ids, codebook=codebook)
    ids = checked_ids(ids, codebook.shape[1])
    if kind == "torch":
        return torch.ops.meditok.vq_lookup(ids, codebook, metric=metric)
    if kind == "cupy":
        return on_torch(torch.ops.meditok.vq_lookup, ids, codebook, metric=metric)
    if native.backend != "native":
        return reference.vq_lookup(to_torch(ids), to_torch(codebook), metric=metric).numpy()
    ids, codebook = plain(ids), plain(codebook)
    out = np.empty((*ids.shape, codebook.shape[2]), dtype=codebook.dtype)
    _native.lookup(ids, codebook, metric, out)
    return out
