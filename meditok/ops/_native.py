"""Calls into `meditok._core`: pointers, element strides and dtype codes of torch tensors and NumPy arrays.

Nothing is converted and nothing checked here; results are allocated contiguous by the caller's kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meditok import native
from meditok.ops._library import FLOAT_NAMES, FLOATS, METRICS, dtype_name

Scratch = Callable[[int], Any]


def _view(array: Any) -> tuple[int, tuple[int, ...]]:
    """(address, strides in elements) of any array."""
    if isinstance(array, Tensor):
        return array.data_ptr(), array.stride()
    size = array.dtype.itemsize
    return array.__array_interface__["data"][0], tuple(stride // size for stride in array.strides)


def _dtype(array: Any) -> int:
    return FLOATS[array.dtype] if isinstance(array, Tensor) else FLOAT_NAMES[array.dtype.name]


def _place(array: Any) -> tuple[int, int] | None:
    """(device, stream) of a CUDA array, None for one in main memory."""
    if not isinstance(array, Tensor) or not array.is_cuda:
        return None
    return array.device.index, torch.cuda.current_stream(array.device).cuda_stream


def packed_bytes(groups: int, codes: int, width: int) -> int:
    """Size of a packed codebook; the same formula as `packed_layout` in csrc/vq/vq.h, asserted by a test."""
    align = 64
    tiles = -(-codes // 32)

    def padded(count: int) -> int:
        return -(-count // align) * align

    per_group = (
        align + padded(tiles * width * 32 * 4) + 2 * padded(tiles * 32 * 4) + padded(tiles * 4) + padded(codes * 8)
    )
    if 3 <= width <= 2048:  # the int16 part and its slots
        per_group += padded(tiles * 32 * ((width + 2) // 2) * 4) + padded(tiles * 32 * 4)
    if 3 <= width <= 32 and codes <= 16384:  # the int8 part
        per_group += padded(-(-tiles // 8) * 256 * -(-width // 4) * 4)
    if width <= 32:  # the centre
        per_group += padded(width * 8)
    return align + groups * per_group


def pack(codebook: Any, metric: str, out: Any) -> None:
    """codebook (G, K, C) -> out, uint8 of `packed_bytes`."""
    address, strides = _view(codebook)
    arguments = (address, _dtype(codebook), *codebook.shape, *strides, METRICS[metric], _view(out)[0])
    place = _place(codebook)
    if place is None:
        native.core.vq_pack(*arguments, native.threads())
    else:
        native.core.vq_pack_cuda(*arguments, *place)


def assign(x: Any, codebook: Any, packed: Any, metric: str, ids: Any) -> None:
    """x (N, G, C), codebook (G, K, C), packed bytes of it -> ids (N, G) int64 contiguous."""
    x_address, x_strides = _view(x)
    address, strides = _view(codebook)
    arguments = (
        *(x_address, _dtype(x), *x.shape, *x_strides),
        *(address, _dtype(codebook), codebook.shape[1], *strides),
        *(_view(packed)[0], METRICS[metric], _view(ids)[0]),
    )
    place = _place(x)
    if place is None:
        native.core.vq_assign(*arguments, native.threads())
    else:
        native.core.vq_assign_cuda(*arguments, *place)


def lookup(ids: Any, codebook: Any, metric: str, out: Any) -> None:
    """ids (N, G) int64, codebook (G, K, C) -> out (N, G, C) contiguous, of the codebook's dtype."""
    ids_address, ids_strides = _view(ids)
    address, strides = _view(codebook)
    arguments = (
        *(ids_address, ids.shape[0], *ids_strides),
        *(address, _dtype(codebook), *codebook.shape, *strides),
        *(METRICS[metric], _view(out)[0]),
    )
    place = _place(codebook)
    if place is None:
        native.core.vq_lookup(*arguments, native.threads())
    else:
        native.core.vq_lookup_cuda(*arguments, *place)


# ---- training ----------------------------------------------------------------------------------------------
# x, codebook and gradients share one dtype; the other arrays have the dtypes of csrc/vq/vq_train.h. `scratch`
# makes a buffer of that many bytes on the device of the arrays and is called for CUDA only.


def quantize(
    x: Any,
    codebook: Any,
    packed: Any,
    mask: Any,
    settings: dict[str, Any],
    outputs: tuple[Any, Any, Any, Any],
    scratch: Scratch,
) -> None:
    """x (N, G, C), codebook (G, K, C), packed bytes of it, mask (N,) bool or None -> outputs z (N, G, C), ids
    (N, G), loss (), counts (G, K), all contiguous."""
    z, ids, loss, counts = outputs
    x_address, x_strides = _view(x)
    address, strides = _view(codebook)
    arguments = (
        *(x_address, _dtype(x), *x.shape, *x_strides),
        *(address, codebook.shape[1], *strides, _view(packed)[0], METRICS[settings["metric"]], _view(ids)[0]),
        *_mask(mask),
        *(settings["commitment_weight"], settings["codebook_weight"]),
        *(_view(z)[0], _view(loss)[0], _view(counts)[0]),
    )
    _run("vq_quantize", x, arguments, scratch, (*x.shape[:2], codebook.shape[1], x.shape[2]))


def quantize_backward(
    grad_z: Any,
    grad_loss: Any,
    x: Any,
    codebook: Any,
    ids: Any,
    mask: Any,
    settings: dict[str, Any],
    grads: tuple[Any, Any],
    scratch: Scratch,
) -> None:
    """Gradients of `quantize` -> grads to x (N, G, C) and to the codebook (G, K, C) or None, contiguous."""
    grad_address, grad_strides = _view(grad_z)
    x_address, x_strides = _view(x)
    address, strides = _view(codebook)
    ids_address, ids_strides = _view(ids)
    arguments = (
        *(grad_address, *grad_strides, _view(grad_loss)[0]),
        *(x_address, _dtype(x), *x.shape, *x_strides),
        *(address, codebook.shape[1], *strides, ids_address, *ids_strides),
        *_mask(mask),
        *(METRICS[settings["metric"]], settings["commitment_weight"], settings["codebook_weight"]),
        *(settings["rotation"], _view(grads[0])[0], 0 if grads[1] is None else _view(grads[1])[0]),
    )
    _run("vq_quantize_backward", x, arguments, scratch, (*x.shape[:2], codebook.shape[1], x.shape[2]))


def stats(x: Any, ids: Any, counts: Any, sums: Any, scratch: Scratch) -> None:
    """x (N, G, C), ids (N, G) int64 -> counts (G, K) int64, sums (G, K, C) float32, contiguous."""
    x_address, x_strides = _view(x)
    ids_address, ids_strides = _view(ids)
    codes = counts.shape[1]
    arguments = (
        *(x_address, _dtype(x), *x.shape, *x_strides, ids_address, *ids_strides),
        *(codes, _view(counts)[0], _view(sums)[0]),
    )
    _run("vq_stats", x, arguments, scratch, (*x.shape[:2], codes, x.shape[2]))


def update(
    codebook: Any, ema_counts: Any, ema_sums: Any, counts: Any, sums: Any, settings: dict[str, Any], scratch: Scratch
) -> None:
    """In place on codebook (G, K, C), ema_counts (G, K) and ema_sums (G, K, C) float32; counts int64, sums
    float32."""
    address, strides = _view(codebook)
    arguments = [address, _dtype(codebook), *codebook.shape, *strides]
    for array in (ema_counts, ema_sums, counts, sums):
        address, strides = _view(array)
        arguments += (address, *strides)
    arguments += (settings["decay"], settings["eps"], METRICS[settings["metric"]])
    _run("vq_update", codebook, arguments, scratch, codebook.shape)


# ---- attention ---------------------------------------------------------------------------------------------
# q, k, v and out are seen as (B, H, tokens, D), whatever lies behind; lse (B, H, N) float32 contiguous. On CUDA
# products of float32 are tf32's where torch.backends.cuda.matmul.allow_tf32 says so.


def attention(q: Any, k: Any, v: Any, mask: Any, settings: dict[str, Any], out: Any, lse: Any) -> None:
    """-> out, shaped as q or, for the mean over heads, (B, N, D); lse may be None."""
    params = _attention_params(q, k, v, mask, settings, out, lse)
    place = _place(q)
    if place is None:
        native.core.attention(params, native.threads())
    else:
        native.core.attention_cuda(params, torch.backends.cuda.matmul.allow_tf32, *place)


def attention_backward(
    grad: Any,
    inputs: tuple[Any, Any, Any, Any],
    settings: dict[str, Any],
    out: Any,
    lse: Any,
    grads: tuple[Any, Any, Any],
    scratch: Scratch,
) -> None:
    """Gradients of `attention` of inputs (q, k, v, mask) -> grads to q, k and v."""
    params = _attention_params(*inputs, settings, out, lse)
    addresses, strides = zip(*(_view(array) for array in grads), strict=True)
    address, grad_strides = _view(grad)
    arguments = (params, address, _of_out(grad_strides), *addresses, *strides)
    place = _place(grad)
    if place is None:
        native.core.attention_backward(*arguments, native.threads())
        return
    buffer = scratch(native.core.attention_backward_scratch_bytes(params))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    native.core.attention_backward_cuda(*arguments, _view(buffer)[0], tf32, *place)


def _attention_params(q: Any, k: Any, v: Any, mask: Any, settings: dict[str, Any], out: Any, lse: Any) -> Any:
    addresses, strides = zip(*(_view(array) for array in (q, k, v)), strict=True)
    kind = 1 if settings["is_causal"] else 0  # MaskKind of csrc/attention/attention.h
    mask_address, mask_strides = 0, (0, 0, 0, 0)
    if mask is not None:
        kind = 3 if dtype_name(mask) in FLOAT_NAMES else 2
        mask_address, mask_strides = _view(mask)
    out_address, out_strides = _view(out)
    return native.core.AttentionParams(
        *addresses,
        _dtype(q),
        *(*q.shape[:3], k.shape[2], q.shape[3]),
        *strides,
        *(kind, mask_address, mask_strides, settings["scale"]),
        *(settings["mean"], out_address, _of_out(out_strides), 0 if lse is None else _view(lse)[0]),
    )


def _of_out(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of (B, H, N, D); a mean over heads has no second axis."""
    return strides if len(strides) == 4 else (strides[0], 0, *strides[1:])


# ---- around attention --------------------------------------------------------------------------------------

ACTIVATIONS = {"none": 0, "gelu": 1, "geglu": 2}  # csrc/linear/linear.h


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    norms: list[Tensor],
    eps: list[float],
    activation: str,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """x (M, K) and residual (M, N) with unit last strides, the rest contiguous, all float32 -> out (M, N)."""
    arguments = [_address(x), *x.shape, x.stride(0)]
    for i in (0, 1):
        given = i < len(eps)
        arguments += [_address(norms[2 * i]), _address(norms[2 * i + 1]), eps[i]] if given else [0, 0, 0.0]
    arguments += [len(eps), *(_address(t) for t in (weight, bias, gate, gate_bias)), len(weight)]
    arguments += [ACTIVATIONS["geglu" if gate is not None else activation], _address(residual)]
    arguments += [0 if residual is None else residual.stride(0), _address(out), native.threads()]
    native.core.linear(*arguments)


def depthwise(x: Tensor, stride: int, taps: Tensor, bias: Tensor, out: Tensor) -> None:
    """x (B, h, w, C), taps (9, C), bias (C,), all contiguous float32 -> out (B, h', w', C)."""
    native.core.depthwise(_address(x), *x.shape, stride, *map(_address, (taps, bias, out)), native.threads())


def upsample_differences(x: Tensor, tall: Tensor, wide: Tensor, both: Tensor) -> None:
    """x (B, h, w, C) -> the others, all contiguous float32."""
    native.core.upsample_differences(_address(x), *x.shape, *map(_address, (tall, wide, both)), native.threads())


def upsample_gather(
    level: Tensor,
    tall: Tensor,
    wide: Tensor,
    both: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    """The parts of a map level (B, h, w, O) -> out (B, 2h, 2w, O), all contiguous float32."""
    parts = map(_address, (level, tall, wide, both))
    norm = _address(gain), _address(bias), eps
    native.core.upsample_gather(*parts, *level.shape, *norm, _address(out), native.threads())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _mask(mask: Any) -> tuple[int, int]:
    if mask is None:
        return 0, 0
    address, strides = _view(mask)
    return address, strides[0]


def _run(name: str, array: Any, arguments: Any, scratch: Scratch, sizes: tuple[int, ...]) -> None:
    """The entry `name` for the place of `array`, with the scratch memory it asks for by `sizes` on CUDA."""
    place = _place(array)
    if place is None:
        getattr(native.core, name)(*arguments, 0, native.threads())
        return
    buffer = scratch(getattr(native.core, f"{name}_scratch_bytes")(*sizes))
    getattr(native.core, f"{name}_cuda")(*arguments, _view(buffer)[0], *place)
