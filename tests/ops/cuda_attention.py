"""Calls of the emulated CUDA attention kernels, and what they are held against; shared by the test files of both."""

from __future__ import annotations

import ctypes

import torch

from meditok.ops import reference
from meditok.ops._library import FLOATS as CODES

from .helpers import randn

KIND = {None: 0, "causal": 1, "bool": 2, "additive": 3}
# Unit roundoff of the operands of the products; of sums and powers where these are exact.
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8, "tf32": 2.0**-11, "fp32": 2.0**-21}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "token", "column")]


class Params(ctypes.Structure):
    """AttentionParams of csrc/attention/attention.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "qkv"),
        ("type", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "width")),
        *((f"{name}_strides", Strides) for name in "qkv"),
        ("mask_kind", ctypes.c_int),
        ("mask", ctypes.c_void_p),
        ("mask_strides", Strides),
        ("scale", ctypes.c_double),
        ("mean", ctypes.c_bool),
        ("out", ctypes.c_void_p),
        ("out_strides", Strides),
        ("lse", ctypes.c_void_p),
    ]


class BackwardParams(ctypes.Structure):
    _fields_ = [
        ("forward", Params),
        ("grad_out", ctypes.c_void_p),
        ("grad_out_strides", Strides),
        *((f"grad_{name}", ctypes.c_void_p) for name in "qkv"),
        *((f"grad_{name}_strides", Strides) for name in "qkv"),
        ("scratch", ctypes.c_void_p),
    ]


def strides(tensor: torch.Tensor) -> Strides:
    """Of (B, H, N, D), or of a mean over heads (B, N, D)."""
    steps = tensor.stride()
    return Strides(*(steps if len(steps) == 4 else (steps[0], 0, *steps[1:])))


class Run:
    """One call of the emulated kernels: forward at once, backward on demand; outputs start as NaN."""

    def __init__(self, kernels, name, q, k, v, mask=None, kind=None, scale=None, mean=False, lse=True):
        self.kernels, self.tf32 = kernels, int(name == "tf32")
        batch, heads, queries, width = q.shape
        keys = k.shape[2]
        shape = (batch, queries, width) if mean else (batch, queries, heads, width)
        out = q.new_full(shape, torch.nan)
        self.out = out if mean else out.transpose(1, 2)
        self.lse = torch.full((batch, heads, queries), torch.nan)
        self.scale = width**-0.5 if scale is None else scale
        mask = mask.expand(batch, heads, queries, keys) if mask is not None else None
        self.params = Params(
            *(x.data_ptr() for x in (q, k, v)), CODES[q.dtype], batch, heads, queries, keys, width,
            *(strides(x) for x in (q, k, v)), KIND[kind],
            None if mask is None else mask.data_ptr(), Strides() if mask is None else strides(mask),
            self.scale, mean, self.out.data_ptr(), strides(self.out), self.lse.data_ptr() if lse else None,
        )  # fmt: skip
        self.kept = (q, k, v, mask, out)
        kernels.attention(ctypes.byref(self.params), self.tf32)

    def backward(self, grad, grads=None):
        q, k, v = self.kept[:3]
        grads = [torch.full_like(x, torch.nan) for x in (q, k, v)] if grads is None else grads
        self.kernels.scratch_bytes.restype = ctypes.c_int64
        count = self.kernels.scratch_bytes(ctypes.byref(self.params))
        scratch = torch.full((count + 256,), 255, dtype=torch.uint8)
        start = -scratch.data_ptr() % 64
        params = BackwardParams(
            self.params, grad.data_ptr(), strides(grad), *(x.data_ptr() for x in grads), *(strides(x) for x in grads),
            scratch.data_ptr() + start,
        )  # fmt: skip
        self.kernels.attention_backward(ctypes.byref(params), self.tf32)
        assert (scratch[:start] == 255).all() and (scratch[start + count :] == 255).all(), "beyond the scratch memory"
        return grads


def expected_of(q, k, v, mask=None, kind=None, scale=None, mean=False, grad=None):
    """out, and with `grad` the gradients, in float64."""
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    wide_mask = mask.double() if kind == "additive" else mask
    out = reference.attention(*wide, wide_mask, is_causal=kind == "causal", scale=scale)
    out = out.mean(1) if mean else out
    if grad is None:
        return out.detach(), ()
    return out.detach(), torch.autograd.grad(out, wide, grad.double(), materialize_grads=True, allow_unused=True)


def assert_near(found, expected, tolerance, what, scale=None):
    """Within `tolerance` of the largest value, or of `scale`."""
    assert torch.equal(found.isnan(), expected.isnan()), f"{what}: NaN"
    if not found.numel():
        return
    error = (found.double() - expected).nan_to_num(0).abs()
    scale = expected.nan_to_num(0).abs().max().clamp(min=1e-30) if scale is None else scale
    worst = int(error.argmax())
    assert error.max() <= tolerance * scale, (
        f"{what}: {found.flatten()[worst]:.6g} instead of {expected.flatten()[worst]:.6g} at {worst}, "
        f"{float(error.max() / scale):.3g} of the largest, {tolerance:.3g} allowed"
    )


def mask_of(kind, batch, heads, queries, keys, dtype):
    """Every third score or so closed; query 1 of batch 0 without any key."""
    if kind in (None, "causal"):
        return None
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(batch, 1, queries, keys, generator=generator) > 0.3
    if queries > 1:
        mask[0, :, 1] = False
    if kind == "bool":
        return mask
    return torch.randn(batch, 1, queries, keys, generator=generator).to(dtype).masked_fill(~mask, -torch.inf)


def check(kernels, name, shape, kind=None, scale=None, mean=False, backward=True):
    """Forward, lse and the three gradients of one call; shape (B, H, N, M, D)."""
    batch, heads, queries, keys, width = shape
    what = f"{name} {shape} {kind} mean {mean}"
    dtype, rounding = DTYPES[name], ROUNDING[name]
    q, k, v = (
        randn(batch, rows, heads, width, seed=seed, dtype=dtype).transpose(1, 2)
        for seed, rows in enumerate((queries, keys, keys))
    )
    mask = mask_of(kind, batch, heads, queries, keys, dtype)
    run = Run(kernels, name, q, k, v, mask, kind, scale, mean)
    grad = randn(*run.out.shape, seed=9, dtype=dtype)
    out, grads = expected_of(q, k, v, mask, kind, scale, mean, grad)
    assert_near(run.out, out, 3 * rounding, f"{what} out")
    scores = q.double() @ k.double().transpose(2, 3) * run.scale
    if kind == "causal":
        scores = scores.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if kind == "bool" else scores + mask.double()
    lse = torch.logsumexp(scores, -1) if keys else torch.full(scores.shape[:3], -torch.inf, dtype=torch.float64)
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    assert torch.equal(run.lse == torch.inf, lse == torch.inf), f"{what} lse"
    assert_near(run.lse.where(run.lse != torch.inf, 0), lse.where(lse != torch.inf, 0), 3 * rounding, f"{what} lse")
    if not backward:
        return
    # With one key the gradients of q and k vanish by cancellation, so one scale for all three.
    scale = max((float(x.abs().max()) for x in grads if x.numel()), default=0.0)
    for label, found, wanted in zip("qkv", run.backward(grad), grads, strict=True):
        assert_near(found, wanted, 6 * rounding, f"{what} grad_{label}", scale)
