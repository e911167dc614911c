"""attention and attention_qkv on a CUDA device: the error of SDPA at most twice, determinism, streams, graphs.

`pytest -m gpu` runs them; bench/gpu_check.sh builds for the device at hand first.
"""

from __future__ import annotations

import pytest
import torch

from meditok import native, ops
from meditok.ops import reference

from .helpers import assert_same_bits, randn
from .test_cuda_attention import mask_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HALVES = (torch.float16, torch.bfloat16)
KINDS = (None, "causal", "bool", "additive")
# (B, H, N, M, D): MedITok's blocks, Q-Former's cross-attention, edges of tiles and widths, one long sequence.
SHAPES = [(4, 16, 256, 256, 64), (2, 12, 32, 257, 64), (1, 1, 1, 1, 8), (2, 3, 129, 65, 40), (1, 2, 200, 333, 128)]
SHAPES += [(1, 2, 2100, 2100, 64)]


@pytest.fixture(autouse=True)
def _native_kernels():
    assert native.cuda_usable(torch.cuda.current_device()), native.cuda_problem()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def inputs(shape, dtype, kind=None):
    batch, heads, queries, keys, width = shape
    q, k, v = (
        randn(batch, rows, heads, width, seed=seed, dtype=dtype).cuda().transpose(1, 2)
        for seed, rows in enumerate((queries, keys, keys))
    )
    mask = mask_of(kind, batch, heads, queries, keys, dtype)
    return q, k, v, mask if mask is None else mask.cuda()


def results(op, q, k, v, mask, kind, grad=None):
    """(out, grad_q, grad_k, grad_v) of an op."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = op(*leaves, mask, is_causal=kind == "causal")
    grad = randn(*out.shape, seed=9).to(out) if grad is None else grad
    return out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True)


def assert_twice(found, peer, exact, dtype, what):
    """Each result's largest error is at most twice the peer's, plus two roundings of the largest value."""
    for label, mine, other, truth in zip(("out", "grad_q", "grad_k", "grad_v"), found, peer, exact, strict=False):
        assert mine.dtype == dtype and bool(mine.isfinite().all()), f"{what} {label}"
        error, allowed = ((x.double() - truth).abs().max() for x in (mine, other))
        floor = 2 * torch.finfo(dtype).eps * truth.abs().max()
        assert error <= 2 * allowed + floor, f"{what} {label}: {error:.3g}, SDPA {allowed:.3g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_the_error_is_at_most_twice_that_of_sdpa(dtype, kind):
    """Forward and gradients against the reference in float64; every mask; through the compiled kernels."""
    for shape in SHAPES:
        arrays = inputs(shape, dtype, kind)
        with native.count_calls() as calls:
            found = results(ops.attention, *arrays, kind)
        assert calls["attention_cuda"] == 1 and calls["attention_backward_cuda"] == 1
        wide = [x if x is None or x.dtype == torch.bool else x.double() for x in arrays]
        exact = results(reference.attention, *wide, kind)
        peer = results(reference.attention, *arrays, kind)
        assert_twice(found, peer, exact, dtype, f"{shape} {kind}")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("reduce", [None, "mean"])
def test_packed_projections(dtype, reduce):
    """attention_qkv with one packed gradient, causal; heads joined or averaged."""
    for shape in [(3, 256, 3, 16, 64), (2, 33, 3, 4, 24)]:
        qkv = randn(*shape, dtype=dtype).cuda()

        def run(op, qkv):
            leaf = qkv.detach().requires_grad_()
            out = op(leaf, is_causal=True, reduce=reduce)
            return out.detach(), *torch.autograd.grad(out, leaf, randn(*out.shape, seed=9).to(out))

        found = run(ops.attention_qkv, qkv)
        exact, peer = run(reference.attention_qkv, qkv.double()), run(reference.attention_qkv, qkv)
        assert_twice(found, peer, exact, dtype, f"{shape} {reduce}")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 256, 511, 513, 900])
def test_any_layout(dtype, tokens):
    """Heads before tokens, one element off, columns apart, heads expanded: what the copy engine takes and what not."""
    q, k, v, _ = inputs((2, 3, tokens, tokens, 64), dtype)
    odd = torch.empty(k.numel() + 1, dtype=dtype, device="cuda")[1:].view(k.shape).copy_(k)
    apart = torch.empty(*k.shape[:3], 128, dtype=dtype, device="cuda")[..., ::2].copy_(k)
    for other in (k.contiguous(), odd, apart, k[:, :1].expand(2, 3, tokens, 64)):
        arrays = (q, other, v.contiguous(), None)
        found, peer = (results(op, *arrays, "causal") for op in (ops.attention, reference.attention))
        exact = results(reference.attention, *(x if x is None else x.double() for x in arrays), "causal")
        assert_twice(found, peer, exact, dtype, f"{tokens} {other.stride()}")


def test_tf32_is_taken_only_where_it_is_allowed():
    """With allow_tf32 the products have 11 bits, without it float32's."""
    arrays = inputs((2, 4, 256, 256, 64), torch.float32)
    exact = results(reference.attention, *(x if x is None else x.double() for x in arrays), None)
    errors = []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        found = results(ops.attention, *arrays, None)
        errors.append([float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)])
    assert max(errors[0]) < 3e-6 and max(errors[1]) < 3e-3
    if torch.cuda.get_device_capability() >= (8, 0):
        assert min(errors[1]) > 10 * max(errors[0])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_thirty_runs_give_the_same_bits(dtype):
    """Forward and backward, masked and causal."""
    for kind in (None, "causal", "additive"):
        arrays = inputs((2, 8, 300, 300, 64), dtype, kind)
        first = results(ops.attention, *arrays, kind)
        for _ in range(29):
            for a, b in zip(results(ops.attention, *arrays, kind), first, strict=True):
                assert_same_bits(a, b)


def test_a_row_does_not_depend_on_its_batch():
    """Alone, and at another place among others."""
    q, k, v, _ = inputs((64, 16, 256, 256, 64), torch.bfloat16)
    together = ops.attention(q, k, v)
    for row in (0, 7, 63):
        part = slice(row, row + 1)
        assert_same_bits(ops.attention(q[part], k[part], v[part]), together[part])


def test_streams_and_graphs():
    """On a side stream, and captured forward and backward replayed on new contents."""
    qkv = randn(2, 256, 3, 4, 64, dtype=torch.bfloat16).cuda()

    def step(x):
        leaf = x.detach().requires_grad_()
        out = ops.attention_qkv(leaf, is_causal=True)
        return out.detach(), torch.autograd.grad(out, leaf, torch.ones_like(out))[0]

    expected = step(qkv)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step(qkv)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)
    static = torch.zeros_like(qkv)
    with torch.cuda.stream(stream):
        step(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    static.copy_(qkv)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    """Schema, fake and autograd registrations agree with what the kernels do on CUDA."""
    q, k, v, mask = inputs((2, 3, 33, 20, 16), torch.float32, kind)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.meditok.attention.default, (*leaves, mask), {"is_causal": kind == "causal"})
    qkv = randn(2, 9, 3, 4, 8).cuda().requires_grad_()
    torch.library.opcheck(torch.ops.meditok.attention_qkv.default, (qkv,), {"reduce": "mean"})


def test_what_the_library_takes():
    """Heads wider than 128 and float64 run through PyTorch's attention."""
    for width, dtype in ((160, torch.float16), (32, torch.float64)):
        q, k, v, _ = inputs((1, 2, 20, 20, width), dtype)
        with native.count_calls() as calls:
            found = results(ops.attention, q, k, v, None, None)
        assert calls["attention_cuda"] == 0 and calls["attention_backward_cuda"] == 0
        for a, b in zip(found, results(reference.attention, q, k, v, None, None), strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_without_a_graph_break():
    """torch.compile(fullgraph=True), forward and backward, gives the bits of eager."""
    qkv = randn(2, 64, 3, 4, 64, dtype=torch.bfloat16).cuda()

    def step(x):
        return ops.attention_qkv(x, is_causal=True)

    expected = step(qkv)
    assert_same_bits(torch.compile(step, fullgraph=True)(qkv), expected)
