"""The CUDA kernels of csrc/attention, run on the CPU by fibers, against the reference in float64.

This proves the kernels' logic where no GPU is at hand; test_gpu_attention.py runs them for real.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from .cuda_attention import DTYPES, ROUNDING, Run, assert_near, check, expected_of, mask_of
from .helpers import assert_same_bits, randn


@pytest.fixture
def kernels(attention_kernels):
    """The emulated kernels on a device of compute capability 8.0; what a test sets is put back."""
    attention_kernels.set_device(80, 163 * 1024, 2)
    yield attention_kernels
    attention_kernels.set_backwards(0)
    attention_kernels.set_accumulator_bits(24)


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
