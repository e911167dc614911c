"""The compiled attention on every instruction set: as near to float64 as PyTorch's own, the same bits always, gradients
included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meditok import native, ops
from meditok.ops import reference

from .helpers import assert_same_bits, levels_here, randn

pytestmark = pytest.mark.skipif(native.backend != "native", reason="the compiled core does not run")
HALVES = (torch.float16, torch.bfloat16)
MASKS = ("none", "causal", "bool", "additive")
EDGES = (0, 1, 2, 5, 6, 7, 11, 12, 13, 16, 17, 31, 32, 33, 47, 48, 49, 64)


@pytest.fixture(params=[name for name in levels_here() if name != "avx512vnni"])  # it takes avx512's kernel
def level(request):
    native.core.choose_isa(request.param)
    yield request.param
    native.core.choose_isa(native.isa)


def make_mask(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 3):
    """(attn_mask, is_causal) of this kind; about a third of the keys is not attended."""
    if kind in ("none", "causal"):
        return None, kind == "causal"
    attended = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.35
    if kind == "bool":
        return attended, False
    return torch.where(attended, randn(*shape, seed=seed), -torch.inf).to(dtype), False


def exact(tensors, mask, **options):
    """Result and gradients of sum(out * weight) in float64."""
    *inputs, weight = (tensor.double() for tensor in tensors)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    out = reference.attention(*inputs, mask, **options)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True)]


def run(op, tensors, mask, **options):
    *inputs, weight = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = op(*inputs, mask, **options)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True)]


def assert_as_near_as_torch(tensors, mask, what="", *, small=False, **options):
    """At most twice the error of PyTorch's attention in the same dtype, or four units in the last place of the largest
    element; for `small` shapes, where PyTorch may be right by chance, or what rounding the scores may do."""
    right = exact(tensors, mask, **options)
    ours = run(ops.attention, tensors, mask, **options)
    theirs = run(reference.attention, tensors, mask, **options)
    chance = rounding(*tensors, options.get("scale")) if small else (0.0,) * 4
    for name, a, b, c, allowed in zip(("out", "grad_q", "grad_k", "grad_v"), ours, theirs, right, chance, strict=True):
        if not c.numel():
            assert a.shape == c.shape
            continue
        eps = torch.finfo(a.dtype).eps
        floor = eps * max(4 * float(c.abs().max()), allowed) + 1e-30
        error, peer = (float((x.double() - c).abs().max()) for x in (a, b))
        assert error <= max(2 * peer, floor), f"{what} {name}: off by {error:.2e}, PyTorch by {peer:.2e}"


def rounding(q, k, v, weight, scale):
    """For the result and the gradients: how far scores (and dp) rounded once, at their largest, carry into them."""
    if not q.numel() or not k.numel():
        return (0.0,) * 4
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, weight = (x.double().abs() for x in (q, k, v, weight))
    scores = 4 + 2 * scale * float((q @ k.mT).max())
    dp = scale * float((weight @ v.mT).max()) * scores
    rows = q.shape[2] ** 0.5
    return scores * float(v.max()), dp * float(k.max()), rows * dp * float(q.max()), rows * scores * float(weight.max())


@settings(max_examples=80, deadline=None)
@given(
    batch=st.sampled_from((1, 1, 2, 0)),
    heads=st.integers(1, 3),
    queries=st.sampled_from(EDGES),
    keys=st.sampled_from(EDGES),
    width=st.sampled_from((1, 3, 7, 8, 9, 15, 16, 17, 24, 32, 40, 64, 80, 128)),
    kind=st.sampled_from(MASKS),
    dtype=st.sampled_from((torch.float32, torch.float32, *HALVES)),
    scale=st.sampled_from((None, None, 0.3, 0.0)),
    spread=st.sampled_from((1.0, 1.0, 0.01, 6.0)),
    seed=st.integers(0, 5),
)
def check_shapes(batch, heads, queries, keys, width, kind, dtype, scale, spread, seed):
    shapes = ((batch, heads, n, width) for n in (queries, keys, keys, queries))
    tensors = [randn(*shape, seed=seed + i, dtype=dtype, scale=spread) for i, shape in enumerate(shapes)]
    mask, causal = make_mask(kind, (batch, heads, queries, keys), dtype, seed)
    if causal and scale == 0:
        scale = None  # PyTorch's own gives NaN: 0 times -inf
    assert_as_near_as_torch(tensors, mask, small=True, is_causal=causal, scale=scale)


def test_any_shape_mask_and_dtype(level):
    """Sizes 0, 1 and around every tile edge, widths that fill no vector, all masks, scale zero."""
    check_shapes()


def test_a_negative_scale(level):
    """It is the positive one with q turned round (PyTorch's own attention takes its square root)."""
    q, k, v, _ = (randn(1, 2, 20, 16, seed=i) for i in range(4))
    for kind in MASKS:
        mask, causal = make_mask(kind, (20, 20), torch.float32)
        found = ops.attention(q, k, v, mask, is_causal=causal, scale=-0.7)
        assert_same_bits(found, ops.attention(-q, k, v, mask, is_causal=causal, scale=0.7))


@pytest.mark.parametrize("kind", MASKS)
def test_several_blocks_of_keys(level, kind):
    """Rows longer than a block: the running maximum and sum, and the gradients' delta; one query with many keys."""
    for queries, keys, width in ((300, 257, 64), (70, 600, 24), (1, 1500, 8), (513, 513, 16)):
        if level == "scalar" and queries * keys > 100_000:
            continue
        tensors = [randn(1, 2, n, width, seed=i) for i, n in enumerate((queries, keys, keys, queries))]
        mask, causal = make_mask(kind, (1, 1, queries, keys), torch.float32)
        one_key = causal and queries == 1  # its gradient to q is 0, which PyTorch hits on some processors by chance
        assert_as_near_as_torch(tensors, mask, f"{queries} x {keys}", small=one_key, is_causal=causal)


@pytest.mark.parametrize("kind", MASKS)
def test_large_logits(level, kind):
    """Scores in the thousands, where one key takes all, and equal ones; nothing overflows."""
    q, k, v, weight = (randn(1, 2, 40, 16, seed=i) for i in range(4))
    mask, causal = make_mask(kind, (40, 40), torch.float32)
    assert_as_near_as_torch((q * 80, k * 80, v, weight), mask, is_causal=causal)
    assert_as_near_as_torch((q * 0 + 300, k * 0 + 300, v, weight), mask, is_causal=causal)


def test_wide_heads(level):
    """More than 128 columns run through the same kernel."""
    for width in (129, 160, 300):
        assert_as_near_as_torch([randn(1, 1, 20, width, seed=i) for i in range(4)], None, is_causal=True)


def test_strides_and_broadcasts(level):
    """Transposed, stepped, expanded and column-major inputs, and masks broadcast over any axis, give the bits of
    contiguous ones; so do NumPy's reversed arrays."""
    base = randn(2, 33, 3, 4, 40)
    q, k, v = (part.transpose(1, 2)[..., ::2] for part in base.unbind(2))
    expected = ops.attention(*(x.contiguous() for x in (q, k, v)))
    assert_same_bits(ops.attention(q, k, v), expected)
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert_same_bits(ops.attention(*columns), expected)
    one = [x[:1, :1].expand(2, 4, 33, 20) for x in (k, v)]
    assert_same_bits(ops.attention(q, *one), ops.attention(q, *(x.contiguous() for x in one)))
    for kind in ("bool", "additive"):
        for shape in ((33, 33), (2, 1, 33, 33), (4, 1, 33), (2, 1, 1, 33), (33, 1)):
            mask, _ = make_mask(kind, shape, torch.float32)
            whole = mask.expand(2, 4, 33, 33).contiguous()
            assert_same_bits(ops.attention(q, k, v, mask), ops.attention(q, k, v, whole), f"{kind} {shape}")
    turned = [x.numpy()[..., ::-1, ::-1] for x in (q, k, v)]
    found = ops.attention(*turned)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, ops.attention(*(torch.tensor(x.copy()) for x in turned)).numpy())
    packed = base.numpy()[:, ::-1]
    for reduce in (None, "mean"):
        expected = ops.attention_qkv(torch.tensor(packed.copy()), is_causal=True, reduce=reduce).numpy()
        np.testing.assert_array_equal(ops.attention_qkv(packed, is_causal=True, reduce=reduce), expected)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("reduce", (None, "mean"))
def test_packed_projections_read_in_place(level, reduce, dtype):
    """attention_qkv has the bits of attention on its parts, its gradient is one packed array, and the mean of
    heads is as near to float64 as PyTorch's."""
    for tokens, heads, width, causal in ((50, 3, 24, True), (16, 2, 64, False), (300, 2, 16, True)):
        qkv = randn(2, tokens, 3, heads, width, dtype=dtype).requires_grad_()
        out = ops.attention_qkv(qkv, is_causal=causal, reduce=reduce)
        weight = randn(*out.shape, seed=9, dtype=dtype)
        grad = autograd_of(out, weight, qkv)
        assert grad.is_contiguous()
        if reduce is None:
            parts = [part.transpose(1, 2).detach() for part in qkv.unbind(2)]
            given = weight.unflatten(-1, (heads, width)).transpose(1, 2)
            found = run(ops.attention, (*parts, given), None, is_causal=causal)
            assert_same_bits(out.detach(), found[0].transpose(1, 2).flatten(2))
            for part, expected in zip(grad.unbind(2), found[1:], strict=True):
                assert_same_bits(part, expected.transpose(1, 2))
        wide = qkv.detach().double().requires_grad_()
        (own_out, own_grad), right = (
            (y := reference.attention_qkv(x, is_causal=causal, reduce=reduce), autograd_of(y, weight, x))
            for x in (qkv, wide)
        )
        for ours, theirs, true in zip((out, grad), (own_out, own_grad), right, strict=True):
            error, peer = (float((x - true).detach().abs().max()) for x in (ours, theirs))
            assert error <= max(2 * peer, 4 * torch.finfo(dtype).eps * float(true.detach().abs().max()))


def autograd_of(y: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad((y * weight.to(y.dtype)).sum(), x)[0]


def test_the_same_bits_whatever_the_threads_and_the_batch(level):
    """30 runs, 1 to 5 threads, each image alone or in a batch: one answer, forward and backward."""
    qkv = randn(5, 70, 3, 2, 16)
    threads = torch.get_num_threads()

    def both(x, reduce):
        x = x.detach().requires_grad_()
        out = ops.attention_qkv(x, is_causal=True, reduce=reduce)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    try:
        for reduce in (None, "mean"):
            expected = both(qkv, reduce)
            for turn in range(30):
                torch.set_num_threads(turn % 5 + 1)
                for a, b in zip(both(qkv, reduce), expected, strict=True):
                    assert_same_bits(a, b, f"run {turn}")
            for image in range(5):
                for a, b in zip(both(qkv[image : image + 1], reduce), expected, strict=True):
                    assert_same_bits(a, b[image : image + 1], f"image {image}")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", MASKS)
def test_what_is_not_attended_has_no_part(level, kind):
    """A NaN or infinity reaches exactly the rows that attend to it, in the result and in the gradients."""
    mask, causal = make_mask(kind, (9, 9), torch.float32)
    if kind == "none":
        attended = torch.ones(9, 9, dtype=torch.bool)
    else:
        attended = torch.ones(9, 9).tril().bool() if causal else (mask > -torch.inf if kind == "additive" else mask)
    for name in "qkv":
        for bad in (torch.nan, torch.inf):
            tensors = {part: randn(1, 1, 9, 5, seed=i) for i, part in enumerate("qkv")}
            tensors[name][0, 0, 4] = bad if bad != bad else torch.tensor([torch.inf, 1, 1, 1, 1])
            inputs = [tensor.requires_grad_() for tensor in tensors.values()]
            out = ops.attention(*inputs, mask, is_causal=causal)
            touched = torch.arange(9) == 4 if name == "q" else attended[:, 4]
            assert out[0, 0, ~touched].isfinite().all(), f"{bad} in {name}"
            if bad != bad:
                assert out[0, 0, touched].isnan().any(-1).all(), f"{bad} in {name}"
            grads = torch.autograd.grad(out[0, 0, ~touched].sum(), inputs)
            assert grads[0][0, 0, ~touched].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_rows_without_a_key(level, dtype):
    """A row with all keys masked, or all scores -inf, is 0 with zero gradient, in any block."""
    q, k, v = (randn(1, 2, n, 16, seed=i, dtype=dtype).requires_grad_() for i, n in enumerate((20, 300, 300)))
    mask = torch.ones(20, 300, dtype=torch.bool)
    mask[3], mask[7, :256], mask[8, 256:] = False, False, False
    for either in (mask, torch.zeros(20, 300, dtype=dtype).masked_fill(~mask, -torch.inf)):
        out = ops.attention(q, k, v, either)
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        assert (out[:, :, 3] == 0).all() and (grads[0][:, :, 3] == 0).all()
        assert (out[:, :, 7:9] != 0).any(-1).all() and all(grad.isfinite().all() for grad in grads)


def test_the_kernels_are_the_ones_called(level):
    """One native call a forward and one a backward, except for float64 and for the gradient to a mask."""
    q, mask = randn(1, 2, 8, 16).requires_grad_(), randn(8, 8).requires_grad_()
    with native.count_calls() as calls:
        ops.attention(q, q, q).sum().backward()
        ops.attention_qkv(randn(1, 8, 3, 2, 16).requires_grad_(), reduce="mean").sum().backward()
    assert calls["attention"] == 2 and calls["attention_backward"] == 2
    with native.count_calls() as calls:
        ops.attention(q, q, q, mask).sum().backward()
        ops.attention(q.double(), q.double(), q.double())
    assert calls["attention"] == 0 and mask.grad.isfinite().all()
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q, mask).sum(), mask)[0]
    torch.testing.assert_close(mask.grad, expected)
    found = torch.ops.meditok.attention(q, q, q, mask)[0].sum()  # the op itself drops no gradient either
    torch.testing.assert_close(torch.autograd.grad(found, mask)[0], expected)


def test_the_written_out_backward_is_autograds():
    """reference.attention_backward, which runs without the compiled core, equals autograd through SDPA."""
    for kind in MASKS:
        q, k, v, weight = (randn(2, 3, n, 4, seed=i, dtype=torch.float64) for i, n in enumerate((5, 7, 7, 5)))
        mask, causal = make_mask(kind, (3, 5, 7), torch.float64)
        needed = kind == "additive"
        if needed:
            mask = mask.nan_to_num(neginf=-2).requires_grad_()
        inputs = [x.requires_grad_() for x in (q, k, v)] + ([mask] if needed else [])
        out = reference.attention(q, k, v, mask, is_causal=causal)
        expected = torch.autograd.grad((out * weight).sum(), inputs)
        found = reference.attention_backward(weight, q, k, v, mask, is_causal=causal, mask_needed=needed)
        for a, b in zip(found, expected, strict=False):
            torch.testing.assert_close(a, b)


def test_vmap_equals_a_loop():
    """Over one of the inputs, and of the backward."""
    xs, k = randn(3, 2, 2, 9, 8), randn(2, 2, 9, 8, seed=1)
    found = torch.vmap(lambda x: ops.attention(x, k, k, is_causal=True))(xs)
    assert_same_bits(found, torch.stack([ops.attention(x, k, k, is_causal=True) for x in xs]))
    qkvs, grad = randn(3, 1, 7, 3, 2, 8), randn(1, 7, 16)
    out, lse = torch.ops.meditok.attention_qkv(qkvs[0])

    def backward(qkv):
        return torch.ops.meditok.attention_qkv_backward(grad, qkv, out, lse, is_causal=True, scale=None, reduce=None)

    assert_same_bits(torch.vmap(backward)(qkvs), torch.stack([backward(x) for x in qkvs]))


def test_compiled_without_graph_breaks():
    """torch.compile(fullgraph=True), dynamic in the batch, forward and backward, has the bits of eager."""

    def step(q, mask, qkv):
        y = ops.attention(q, q, q, mask).square().sum()
        return y + ops.attention_qkv(qkv, is_causal=True, reduce="mean").square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    mask = torch.ones(9, 9).tril().bool()
    for batch in (2, 5):
        inputs = [randn(batch, 2, 9, 8).requires_grad_(), randn(batch, 9, 3, 2, 8).requires_grad_()]
        grads = [torch.autograd.grad(f(inputs[0], mask, inputs[1]), inputs) for f in (compiled, step)]
        for a, b in zip(*grads, strict=True):
            assert_same_bits(a, b)
