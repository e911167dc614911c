"""attention and attention_qkv equal scaled_dot_product_attention, with a defined answer for fully masked
rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from meditok import ops
from meditok.errors import DtypeError, ShapeError

from .helpers import randn

Q, K, V = randn(2, 3, 7, 8), randn(2, 3, 5, 8, seed=1), randn(2, 3, 5, 8, seed=2)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_it_equals_sdpa(is_causal, scale):
    """Plain and causal (aligned top-left), any scale; the result is strided as (B, N, H, D)."""
    found = ops.attention(Q, K, V, is_causal=is_causal, scale=scale)
    expected = F.scaled_dot_product_attention(Q, K, V, is_causal=is_causal, scale=scale)
    torch.testing.assert_close(found, expected)
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_fully_masked_row_is_zero_with_zero_gradient(kind):
    """A query without any key gives exact zeros and takes no gradient; the others are as in SDPA."""
    mask = torch.rand(2, 1, 7, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[:, :, 0] = True
    mask[0, 0, 3] = False
    given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    q, k, v = (tensor.clone().requires_grad_() for tensor in (Q, K, V))
    out = ops.attention(q, k, v, given)
    out.square().sum().backward()
    assert (out[0, :, 3] == 0).all() and (q.grad[0, :, 3] == 0).all()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v))
    torch.testing.assert_close(out[1], F.scaled_dot_product_attention(Q, K, V, attn_mask=given)[1])


def test_no_keys_at_all_give_zero():
    """M = 0 is a fully masked row for every query; empty batches work."""
    assert (ops.attention(Q, K[:, :, :0], V[:, :, :0]) == 0).all()
    assert ops.attention(Q[:0], K[:0], V[:0]).shape == (0, 3, 7, 8)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("reduce", [None, "mean"])
def test_packed_projections(is_causal, reduce):
    """attention_qkv equals unbinding by hand, with one packed gradient."""
    qkv = randn(2, 6, 3, 4, 8).requires_grad_()
    out = ops.attention_qkv(qkv, is_causal=is_causal, reduce=reduce)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)
    expected = heads.mean(2) if reduce else heads.reshape(2, 6, 32)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    found, wanted = (torch.autograd.grad((o * weight).sum(), qkv)[0] for o in (out, expected))
    torch.testing.assert_close(found, wanted)


def test_wrong_shapes_are_named():
    """Shapes, dtypes and contradictory masks are errors of one line."""
    with pytest.raises(ShapeError, match=r"\(2, 3, 5, 8\)"):
        ops.attention(Q, K, V[:, :, :4])
    with pytest.raises(DtypeError, match="float16"):
        ops.attention(Q, K.half(), V)
    with pytest.raises(ShapeError, match="is_causal"):
        ops.attention(Q, K, V, torch.ones(7, 5, dtype=torch.bool), is_causal=True)
    for shape in ((3, 3), (5,), (7, 4), (2, 2, 7, 5), (1, 1, 1, 7, 5)):
        with pytest.raises(ShapeError, match=r"broadcast to \(2, 3, 7, 5\)"):
            ops.attention(Q, K, V, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"\(B, N, 3, H, D\)"):
        ops.attention_qkv(randn(2, 6, 2, 4, 8))
    with pytest.raises(ValueError, match="reduce"):
        ops.attention_qkv(randn(2, 6, 3, 4, 8), reduce="sum")
