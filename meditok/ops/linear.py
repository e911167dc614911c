"""A linear layer with what stands around it: norms before, activation and residual after. CPU kernel for inference.

linear(x, w, b, norms=[(g, c, e)]) == F.linear(F.layer_norm(x, (K,), g, c, e), w, b)
    activation "gelu"   F.gelu(of it)
    gate=(v, d)         F.gelu(of it, approximate="tanh") * F.linear(the same normalised x, v, d)      (GeGLU)
    residual            + residual
with x (..., K), w and v (N, K), residual (..., N). Every row's result depends on that row alone, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meditok import native
from meditok.errors import DtypeError, ShapeError
from meditok.ops import _native, reference
from meditok.ops._library import library, refuse_second_derivative

Norm = tuple[Tensor, Tensor, float]  # gain (K,), bias (K,), eps
VECTOR_LEVELS = ("avx2", "avx512", "avx512vnni")

# ---- checks ------------------------------------------------------------------------------------------------


def _check(x: Tensor, weight: Tensor, gate: tuple | None, norms: Sequence[Norm], activation: str) -> None:
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; (..., K) and (N, K) are needed"
        )
    if activation not in ("none", "gelu") or (gate is not None and activation != "none"):
        raise ValueError(
            f"activation={activation!r} with gate={gate is not None}; none or gelu without a gate is needed"
        )
    if gate is not None and gate[0].shape != weight.shape:
        raise ShapeError(
            f"gate has shape {tuple(gate[0].shape)} and weight {tuple(weight.shape)}; equal ones are needed"
        )
    if len(norms) > 2:
        raise ValueError(f"{len(norms)} norms were given; two at most are covered")


# ---- schema and kernels ------------------------------------------------------------------------------------

library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? gate, Tensor? gate_bias, Tensor[] norms, "
    "float[] eps, str activation) -> Tensor"
)


def _linear_native(x, weight, bias, residual, gate, gate_bias, norms, eps, activation) -> Tensor:
    """norms: gain and bias of each norm in turn. Float32 alone has a kernel."""
    tensors = [t for t in (x, weight, bias, residual, gate, gate_bias, *norms) if t is not None]
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        raise DtypeError(f"x, weights and residual are {', '.join(sorted(map(str, dtypes)))}; one dtype is needed")
    if dtypes != {torch.float32}:
        return reference.linear(x, weight, bias, residual, gate, gate_bias, norms, eps, activation)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if residual is not None:
        residual = residual.expand(*x.shape[:-1], len(weight)).reshape(len(rows), len(weight))
        residual = residual if residual.stride(-1) == 1 else residual.contiguous()
    out = x.new_empty((*x.shape[:-1], len(weight)))
    kept = [t if t is None else t.contiguous() for t in (weight, bias, gate, gate_bias, *norms)]
    _native.linear(rows, *kept[:4], kept[4:], eps, activation, residual, out)
    return out


library.impl("linear", reference.linear, "CompositeExplicitAutograd")
if native.backend == "native":
    library.impl("linear", _linear_native, "CPU")

# ---- fake --------------------------------------------------------------------------------------------------


@torch.library.register_fake("meditok::linear", lib=library)
def _linear_fake(x, weight, *rest) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# ---- autograd: where a gradient is wanted the reference runs, so the op itself never sees one ----------------------

refuse_second_derivative("linear")


def fused(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the CPU kernels of inference serve: float32 on the CPU, no gradient wanted, no autocast.

    Scalar loops are for checking; where there is no vector kernel PyTorch's own functions are faster.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or native.isa not in VECTOR_LEVELS:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))
    return not wanted


# ---- public ------------------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norms: Sequence[Norm] = (),
    activation: str = "none",
    gate: tuple[Tensor, Tensor | None] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N); see the module for what it equals.

    activation: "none" | "gelu"; gate: weight (N, K) and bias (N,) of GeGLU's second half; at most two norms. Wherever a
    gradient is wanted, or the device, dtype or autocast is another than plain float32 on a CPU, PyTorch's own functions
    run. Raises ShapeError, DtypeError, ValueError.
    """
    _check(x, weight, gate, norms, activation)
    gate_weight, gate_bias = gate or (None, None)
    flat = [t for gain, shift, _ in norms for t in (gain, shift)]
    eps = [float(e) for *_, e in norms]
    kernel = fused(x, weight, bias, residual, gate_weight, gate_bias, *flat)
    run = torch.ops.meditok.linear if kernel else reference.linear
    return run(x, weight, bias, residual, gate_weight, gate_bias, flat, eps, activation)
