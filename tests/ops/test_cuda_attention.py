"""The CUDA kernels of csrc/attention, run on the CPU by fibers, against the reference in float64.

This proves the kernels' logic where no GPU is at hand; test_gpu_attention.py runs them for real.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
import torch.nn.functional as F

from meditok.ops import reference
from meditok.ops._library import FLOATS as CODES

from .helpers import assert_same_bits, randn

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


@pytest.fixture
def kernels(attention_kernels):
    """The emulated kernels on a device of compute capability 8.0; what a test sets is put back."""
    attention_kernels.set_device(80, 163 * 1024, 2)
    yield attention_kernels
    attention_kernels.set_backwards(0)
    attention_kernels.set_accumulator_bits(24)


@pytest.fixture
def hopper(kernels):
    """The same on 9.0, where 16-bit types have a kernel of their own; calls of it are counted from 0."""
    kernels.set_device(90, 227 * 1024, 2)
    kernels.hopper_barriers()
    return kernels


NAMES = pytest.mark.parametrize("name", list(DTYPES))
# bfloat16 differs from fp16 in its product and its packing only.
KERNELS = pytest.mark.parametrize("name", ["fp16", "tf32", "fp32"])


@NAMES
def test_forward_and_gradients_equal_the_reference(kernels, name):
    """Every mask, shapes around the edges of tiles, every width class, several batches and heads."""
    check(kernels, name, (2, 1, 65, 70, 64))
    check(kernels, name, (1, 1, 1, 1, 1))
    check(kernels, name, (1, 1, 67, 130, 72), "causal")
    check(kernels, name, (1, 1, 70, 33, 33), "causal")
    check(kernels, name, (1, 2, 33, 70, 40), "bool")
    check(kernels, name, (1, 1, 20, 65, 128), "additive")


@NAMES
@pytest.mark.parametrize("kind", [None, "causal"])
def test_the_mean_over_heads_equals_the_reference(kernels, name, kind):
    """Heads summed within a block, with the lse of each; delta from a pass of its own in the backward."""
    check(kernels, name, (2, 3, 20, 20, 24), kind, mean=True)
    check(kernels, name, (1, 2, 40, 40, 96), kind, mean=True)


@KERNELS
def test_without_keys_or_queries(kernels, name):
    """No key: 0, lse infinite, zero gradients. No query: zero gradients of keys. Nothing at all: nothing happens."""
    for shape in [(1, 2, 5, 0, 8), (1, 2, 0, 5, 8), (0, 2, 5, 5, 8), (2, 0, 5, 5, 8)]:
        check(kernels, name, shape)


@KERNELS
def test_any_strides(kernels, name):
    """Packed projections with one packed gradient; columns apart, rows at odd addresses, expanded heads and rows."""
    dtype, rounding = DTYPES[name], ROUNDING[name]
    qkv = randn(2, 37, 3, 2, 40, dtype=dtype)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    packed = torch.full_like(qkv, torch.nan)
    run = Run(kernels, name, q, k, v, kind="causal")
    grad = randn(*run.out.shape, seed=3, dtype=dtype)
    out, grads = expected_of(q, k, v, kind="causal", grad=grad)
    assert_near(run.out, out, 3 * rounding, "packed out")
    run.backward(grad, [part.transpose(1, 2) for part in packed.unbind(2)])
    expected = torch.stack([part.transpose(1, 2) for part in grads], 2)
    assert_near(packed, expected, 6 * rounding, "packed gradient")

    flat = randn(20 * 2 * 9 + 1, seed=4, dtype=dtype)[1:]
    k, v = randn(1, 1, 5, 18, seed=5, dtype=dtype).expand(1, 2, 5, 18).mT, randn(1, 2, 18, 5, seed=6, dtype=dtype)
    q = torch.as_strided(flat, (1, 2, 20, 5), (0, 180, 9, 2))  # one element off, column stride 2
    run = Run(kernels, name, q, k, v)
    grad = randn(1, 2, 1, 1, seed=7, dtype=dtype).expand(1, 2, 20, 5)
    out, grads = expected_of(q, k, v, grad=grad)
    assert_near(run.out, out, 3 * rounding, "strided out")
    fresh = [torch.full(x.shape, torch.nan, dtype=dtype) for x in (q, k, v)]
    for label, found, wanted in zip("qkv", run.backward(grad, fresh), grads, strict=True):
        assert_near(found, wanted, 6 * rounding, f"strided grad_{label}")


@KERNELS
def test_vectors_of_16_bytes_and_single_elements_give_the_same_bits(kernels, name):
    """Aligned rows are copied as vectors, others one by one: the same numbers in the same order."""
    dtype = DTYPES[name]
    q, k, v = (randn(1, 2, 40, 16, seed=seed, dtype=dtype) for seed in range(3))
    apart = [torch.zeros(1, 2, 40, 17, dtype=dtype)[..., :16].copy_(x) for x in (q, k, v)]
    first, second = Run(kernels, name, q, k, v), Run(kernels, name, *apart)
    assert_same_bits(second.out, first.out)
    grad = randn(1, 2, 40, 16, seed=4, dtype=dtype)
    grads = [torch.zeros(1, 2, 40, 17, dtype=dtype)[..., :16] for _ in range(3)]
    for a, b in zip(first.backward(grad), second.backward(grad, grads), strict=True):
        assert_same_bits(a, b)


@KERNELS
def test_scales_and_large_logits(kernels, name):
    """Negative and zero scales; scores of thousands; a row whose maximum moves from tile to tile."""
    dtype, rounding = DTYPES[name], ROUNDING[name]
    for scale in (-0.3, 0.0, 1.0):
        check(kernels, name, (1, 1, 17, 70, 16), scale=scale)
    q, k, v = (randn(1, 1, 20, 16, seed=seed, dtype=dtype, scale=30) for seed in range(3))
    run = Run(kernels, name, q, k, v, scale=1.0)
    assert run.out.isfinite().all() and run.lse.isfinite().all()
    # One key has nearly all the weight: rounding its score hardly moves the result.
    q = torch.ones(1, 1, 3, 8, dtype=dtype)
    k = torch.arange(200, dtype=torch.float32).view(1, 1, 200, 1).expand(1, 1, 200, 8).contiguous().to(dtype)
    v = randn(1, 1, 200, 8, seed=2, dtype=dtype)
    for keys in (k, k.flip(2)):
        run = Run(kernels, name, q, keys, v, scale=1.0)
        assert_near(run.out, expected_of(q, keys, v, scale=1.0)[0], 4 * rounding, "growing scores")


@KERNELS
def test_nan_stays_in_its_row(kernels, name):
    """A NaN in a query makes that row NaN and no other; masked rows stay 0 with zero gradients."""
    q, k, v = (randn(1, 1, 40, 16, seed=seed, dtype=DTYPES[name]) for seed in range(3))
    q[0, 0, 7, 3] = torch.nan
    run = Run(kernels, name, q, k, v, kind="causal")
    assert run.out[0, 0, 7].isnan().all() and run.out.isnan().sum() == 16
    q[0, 0, 7, 3] = 0
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    mask[0, 0, 5] = False
    run = Run(kernels, name, q, k, v, mask, "bool")
    grads = run.backward(torch.ones_like(q))
    assert (run.out[0, 0, 5] == 0).all() and run.lse[0, 0, 5] == torch.inf and (grads[0][0, 0, 5] == 0).all()


@pytest.mark.parametrize("limits", [(75, 64), (80, 163), (120, 99)])
def test_what_smaller_devices_hold(kernels, limits):
    """One stage instead of two, or float32 products, where tensor cores or shared memory are less."""
    kernels.set_device(limits[0], limits[1] * 1024, 2)
    for name in ("fp16", "bf16", "tf32"):
        # float32 products round less than tf32's bounds allow for, so these hold whichever kernel ran.
        check(kernels, name, (1, 1, 20, 70, 64), "causal")
        check(kernels, name, (1, 1, 20, 40, 128), "additive")
        check(kernels, name, (1, 2, 20, 20, 64), mean=True)


@KERNELS
def test_no_result_depends_on_the_order_of_threads(kernels, name):
    """Threads between barriers run from first to last and from last to first: a missing barrier would show."""
    q, k, v = (randn(1, 2, 40, 64, seed=seed, dtype=DTYPES[name]) for seed in range(3))
    mask = mask_of("bool", 1, 2, 40, 40, q.dtype)
    found = []
    for backwards in (0, 1):
        kernels.set_backwards(backwards)
        runs = [Run(kernels, name, q, k, v, mask, "bool"), Run(kernels, name, q, k, v, kind="causal", mean=True)]
        found.append([x for run in runs for x in (run.out, run.lse, *run.backward(torch.ones_like(run.out)))])
    for first, second in zip(*found, strict=True):
        assert_same_bits(first, second)


@KERNELS
def test_a_row_does_not_depend_on_its_batch(kernels, name):
    """The same bits alone and among others."""
    q, k, v = (randn(3, 2, 40, 32, seed=seed, dtype=DTYPES[name]) for seed in range(3))
    together, alone = Run(kernels, name, q, k, v), Run(kernels, name, q[1:2], k[1:2], v[1:2])
    assert_same_bits(together.out[1:2], alone.out)
    grad = randn(3, 2, 40, 32, seed=4, dtype=DTYPES[name])
    for a, b in zip(together.backward(grad), alone.backward(grad[1:2]), strict=True):
        assert_same_bits(a[1:2], b)


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
def test_the_error_is_at_most_twice_that_of_pytorch(kernels, name):
    """Against SDPA in the same type, forward and backward, 128 tokens of width 64."""
    dtype = DTYPES[name]
    q, k, v = (randn(1, 1, 128, 64, seed=seed, dtype=dtype) for seed in range(3))
    grad = randn(1, 1, 128, 64, seed=4, dtype=dtype)
    run = Run(kernels, name, q, k, v)
    out, grads = expected_of(q, k, v, grad=grad)
    theirs = [x.clone().requires_grad_() for x in (q, k, v)]
    peer = F.scaled_dot_product_attention(*theirs)
    peers = torch.autograd.grad(peer, theirs, grad)
    ours = run.backward(grad)
    for label, mine, other, exact in zip("oqkv", (run.out, *ours), (peer, *peers), (out, *grads), strict=True):
        mine, other = ((x.double() - exact).abs().max() for x in (mine, other))
        assert mine <= 2 * other, f"{label}: {mine:.3g} against {other:.3g}"


HALVES = pytest.mark.parametrize("name", ["fp16", "bf16"])


@HALVES
def test_the_hopper_kernel_equals_the_reference(hopper, name):
    """wgmma on swizzled boxes: edges of boxes and widths, causal, several tiles a warpgroup and blocks a head."""
    for multiprocessors, shape, kind in [
        (1, (2, 2, 64, 64, 64), None),
        (1, (1, 1, 1, 1, 8), None),
        (1, (1, 2, 65, 130, 64), "causal"),
        (1, (1, 1, 200, 129, 40), "causal"),
        (3, (1, 1, 260, 70, 24), None),
        (99, (1, 1, 260, 260, 64), "causal"),
    ]:
        hopper.set_device(90, 227 * 1024, multiprocessors)
        check(hopper, name, shape, kind, backward=False)
        assert hopper.hopper_barriers() > 0, "another kernel ran"
    check(hopper, name, (1, 1, 33, 70, 16), scale=-0.3, backward=False)


@HALVES
def test_the_hopper_kernel_and_the_general_one_agree(hopper, name):
    """Packed projections and rows of separate arrays: the same sums in the same order, to rounding."""
    dtype = DTYPES[name]
    qkv = randn(2, 70, 3, 2, 64, dtype=dtype)
    packed = [part.transpose(1, 2) for part in qkv.unbind(2)]
    separate = [randn(2, 2, 70, 64, seed=seed, dtype=dtype) for seed in range(3)]
    for arrays in (packed, separate):
        hopper.set_device(90, 227 * 1024, 2)
        first = Run(hopper, name, *arrays, kind="causal")
        assert hopper.hopper_barriers() > 0
        hopper.set_device(80, 163 * 1024, 2)
        second = Run(hopper, name, *arrays, kind="causal")
        assert hopper.hopper_barriers() == 0
        assert_near(first.out, second.out.double(), ROUNDING[name], "out")
        assert_near(first.lse, second.lse.double(), ROUNDING["fp32"], "lse")


@HALVES
def test_what_the_copy_engine_does_not_take_goes_to_the_general_kernel(hopper, name):
    """Columns apart, rows at odd addresses, overlapping heads, too many keys, masks: right, by other means."""
    dtype, rounding = DTYPES[name], ROUNDING[name]
    plain = [randn(1, 2, 20, 16, seed=seed, dtype=dtype) for seed in range(3)]
    apart = randn(1, 2, 20, 32, seed=4, dtype=dtype)[..., ::2]
    odd = randn(1 + 2 * 20 * 16, seed=5, dtype=dtype)[1:].view(1, 2, 20, 16)
    expanded = randn(1, 1, 20, 16, seed=6, dtype=dtype).expand(1, 2, 20, 16)
    for k in (apart, odd, expanded):
        run = Run(hopper, name, plain[0], k, plain[2])
        assert_near(run.out, expected_of(plain[0], k, plain[2])[0], 3 * rounding, "by other means")
    check(hopper, name, (1, 1, 3, 900, 8), backward=False)
    check(hopper, name, (1, 1, 20, 30, 16), "bool", backward=False)
    check(hopper, name, (1, 2, 20, 20, 16), mean=True, backward=False)
    assert hopper.hopper_barriers() == 0


@HALVES
def test_the_hopper_kernel_does_not_depend_on_the_order_of_threads(hopper, name):
    """As above, for its barriers; one and two blocks of a head."""
    q, k, v = (randn(1, 1, 260, 64, seed=seed, dtype=DTYPES[name]) for seed in range(3))
    found = []
    for backwards, multiprocessors in ((0, 1), (1, 1), (1, 99)):
        hopper.set_backwards(backwards)
        hopper.set_device(90, 227 * 1024, multiprocessors)
        run = Run(hopper, name, q, k, v, kind="causal")
        found.append((run.out, run.lse))
    for out, lse in found[1:]:
        assert_same_bits(out, found[0][0])
        assert_same_bits(lse, found[0][1])


def test_boxes_are_described_as_triton_describes_them(attention_kernels):
    """An independent compiler emits for the same two products the descriptors, steps and operand orders that the Hopper
    kernel uses and its emulation reads."""
    pytest.importorskip("triton", reason="triton is not installed with this torch")
    from .triton_attention import hopper_ptx

    ptx = hopper_ptx()
    describe = attention_kernels.describe_box
    describe.restype = ctypes.c_uint64
    first = describe(0)
    found = {int(number) - first for number in re.findall(r"4611686\d{12}", ptx)}
    along, across = ([describe(step * size) - first for step in range(4)] for size in (32, 2048))
    assert found == {*along, *across} and len(found) == 7
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32\.f16\.f16 (.*);", ptx)
    assert [re.search(r"(\}?), %rd\d+, \S+ (1, 1.*)$", product).groups() for product in products] == [
        *[("", "1, 1, 0, 0")] * 4,
        *[("}", "1, 1, 1")] * 4,
    ]
