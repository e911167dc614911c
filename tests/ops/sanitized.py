"""What .ci/run repeats with a core built under the sanitizers: every path and tile edge of the CPU kernels, once.

Not collected by name (no `test_` prefix): without the sanitizers test_vq_assign.py shows more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meditok import native, ops
from meditok.ops import reference
from meditok.ops.convolution import depthwise_gelu, upsample_differences, upsample_gather
from meditok.ops.linear import linear

from .helpers import FLOATS, METRICS, adversarial_codebooks, assert_same_ids, levels_here, quantisation_edges, randn
from .test_attention_kernels import MASKS, make_mask


@pytest.fixture(params=levels_here())
def level(request):
    native.core.choose_isa(request.param)
    yield request.param
    native.core.choose_isa(native.isa)


def test_the_core_is_the_sanitized_one():
    """The library loaded here asks for the address sanitizer's functions."""
    assert b"__asan_init" in Path(native.core.__file__).read_bytes()


@pytest.mark.parametrize("metric", METRICS)
def test_assign_and_lookup(level, metric):
    """Edges of tiles and blocks, every dtype, strides, codebooks on which shortcuts fail."""
    shapes = [
        (0, 2, 5, 8),
        (1, 1, 0, 4),
        (1, 1, 1, 1),
        (97, 2, 33, 8),
        (7, 1, 1025, 3),
        (5, 2, 129, 17),
        (9, 1, 70, 33),
    ]
    for rows, groups, codes, width in [*shapes, (4, 1, 64, 32), (3, 1, 31, 700), (50, 1, 4099, 5)]:
        x, codebook = randn(rows, groups, width), randn(groups, codes, width, seed=1)
        ids = ops.vq_assign(x, codebook, metric=metric)
        assert_same_ids(ids, reference.vq_assign(x, codebook, metric=metric), f"{rows} {codes} {width}")
        if codes > 0:
            ops.vq_lookup(ids, codebook, metric=metric)
    for dtype in FLOATS:
        x, codebook = randn(20, 3, 16, dtype=dtype)[::3, :, 1::2], randn(70, 8, 3, seed=1, dtype=dtype).permute(2, 0, 1)
        assert_same_ids(ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook, metric=metric))
    x = torch.cat([randn(9, 1, 8), torch.zeros(1, 1, 8), randn(2, 1, 8) * 1e30, torch.full((1, 1, 8), torch.nan)])
    for name, codebook in adversarial_codebooks(133, 8).items():
        assert_same_ids(
            ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook, metric=metric), name
        )
    x, codebook = quantisation_edges(8, seed=1)
    assert_same_ids(ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
def test_training_pass(level, metric):
    """Forward, loss, counts, both gradients, statistics and EMA, with masked rows, strides, half types and threads."""
    for rows, groups, codes, width in [(1, 1, 1, 1), (97, 2, 33, 8), (9, 1, 70, 33), (4100, 2, 5, 7)]:
        for dtype in (torch.float32, torch.bfloat16):
            x = randn(width, rows, groups, dtype=dtype).permute(1, 2, 0).requires_grad_()
            codebook = randn(groups, codes, width, seed=1, dtype=dtype).requires_grad_()
            mask = torch.arange(2 * rows)[::2] % 3 != 1
            for threads in (1, 3):
                torch.set_num_threads(threads)
                z, ids, loss, counts = ops.vq_quantize(x, codebook, metric=metric, mask=mask, rotation=threads > 1)
                x.grad = None
                (z.square().sum() + loss).backward()
                assert int(counts.sum()) == int(mask.sum()) * groups and x.grad.isfinite().all()
                counts, sums = ops.vq_stats(x.detach(), ids, codes)
                state = [codebook.detach().clone(), torch.ones(groups, codes), sums.clone()]
                ops.vq_update_(*state, counts, sums, decay=0.9, eps=1e-5, metric=metric)
            torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("kind", MASKS)
def test_attention(level, kind, dtype):
    """Forward and backward around the tile and block edges, strides, masks, the mean of heads, a value that is NaN."""
    for queries, keys, width in [(0, 3, 4), (3, 0, 4), (1, 1, 1), (13, 33, 17), (49, 257, 24), (7, 300, 130)]:
        q, k, v = (
            randn(2, n, 2, 2 * width, seed=i, dtype=dtype).transpose(1, 2)[..., i % 2 :: 2].requires_grad_()
            for i, n in enumerate((queries, keys, keys))
        )
        mask, causal = make_mask(kind, (2, 1, queries, keys), dtype)
        out = ops.attention(q, k, v, mask, is_causal=causal)
        grads = torch.autograd.grad(out.sum(), (q, k, v), materialize_grads=True)
        assert all(grad.isfinite().all() for grad in grads)
        if kind in ("none", "causal") and queries:
            qkv = randn(1, queries, 3, 3, width, dtype=dtype).requires_grad_()
            ops.attention_qkv(qkv, is_causal=causal, reduce="mean").sum().backward()
            assert qkv.grad.isfinite().all()
    v = randn(1, 1, 9, 5)
    v[0, 0, 4] = torch.nan
    assert ops.attention(v, v, v, is_causal=True)[0, 0, :4].isfinite().all()


def test_linear_layers_and_convolutions(level):
    """Edges of tiles, panels and vectors."""
    for rows, width, columns in [(0, 3, 3), (1, 1, 1), (6, 16, 32), (15, 33, 65), (29, 9, 130)]:
        x, weight, row = randn(rows, width), randn(columns, width, seed=1), randn(width, seed=2)
        norms = [(row, row, 1e-6)] * 2
        residual = randn(rows, columns, seed=3)
        found = linear(x, weight, None, norms=norms, gate=(weight, None), residual=residual)
        wanted = reference.linear(x, weight, None, residual, weight, None, [row] * 4, [1e-6] * 2)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * (1 + width))
    for shape in [(0, 2, 2, 3), (1, 1, 1, 1), (2, 5, 4, 17), (1, 3, 2, 33)]:
        x, width = randn(*shape), shape[-1]
        for stride in (1, 2):
            depthwise_gelu(x, randn(width, 1, 3, 3, seed=1), randn(width, seed=2), stride)
        parts = (torch.cat([part] * k, -1) for part, k in zip(upsample_differences(x), (2, 2, 4), strict=True))
        upsample_gather(x, *parts, (x.new_ones(width), x.new_zeros(width), 1e-6))
