"""vq_lookup gathers rows, normalised for cosine, bit-equal to the reference; wrong ids are named before any
gather."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meditok import native, ops
from meditok.errors import DtypeError, ShapeError, TokenRangeError
from meditok.ops import reference

from .helpers import FLOATS, METRICS, adversarial_codebooks, assert_same_bits, levels_here, randn


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 3, 8, 33, 300])
def test_rows_are_bit_equal_to_the_reference(metric, dtype, width):
    """Every dtype and width, also in the subnormal and overflowing range of the half types."""
    for scale in (1.0, 1e-6, 3e4):
        codebook = randn(2, 50, width, dtype=dtype, scale=scale)
        ids = torch.randint(50, (70, 2), generator=torch.Generator().manual_seed(1))
        assert_same_bits(ops.vq_lookup(ids, codebook, metric=metric), reference.vq_lookup(ids, codebook, metric=metric))


def test_it_equals_the_one_line_of_pytorch():
    """Rows of F.normalize(codebook) to float32 rounding; rows of the codebook itself for l2."""
    codebook, ids = randn(2, 30, 8), torch.randint(30, (10, 2))
    group = torch.arange(2)
    expected = torch.nn.functional.normalize(codebook, dim=-1)[group, ids]
    torch.testing.assert_close(ops.vq_lookup(ids, codebook), expected, rtol=0, atol=2e-7)
    assert_same_bits(ops.vq_lookup(ids, codebook, metric="l2"), codebook[group, ids])


@pytest.mark.parametrize("name", adversarial_codebooks(8, 4))
def test_adversarial_codebooks(name):
    """Zero, infinite, NaN and subnormal rows are normalised as the reference does."""
    codebook = adversarial_codebooks(50, 8)[name]
    ids = torch.arange(50)[:, None]
    assert_same_bits(ops.vq_lookup(ids, codebook), reference.vq_lookup(ids, codebook), name)


def test_strided_ids_and_codebooks():
    """Transposed ids, sliced and expanded codebooks, int32 ids."""
    ids = torch.randint(20, (3, 40), generator=torch.Generator().manual_seed(1)).t()[::2]
    codebook = randn(8, 60, 3, seed=2).permute(2, 1, 0)[:, ::3]
    expected = reference.vq_lookup(ids.contiguous(), codebook.contiguous())
    assert_same_bits(ops.vq_lookup(ids, codebook), expected)
    assert_same_bits(ops.vq_lookup(ids.int(), codebook), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32])
def test_ids_of_narrow_types_give_the_rows_gradients_and_statistics_of_int64(dtype):
    """K = 300 is more than 8 bits hold; from torch and from NumPy."""
    ids = torch.randint(100, (40, 2), generator=torch.Generator().manual_seed(1))
    codebook, x = randn(2, 300, 4).requires_grad_(), randn(40, 2, 4, seed=1)
    weight = randn(40, 2, 4, seed=2)
    found, expected = ops.vq_lookup(ids.to(dtype), codebook), ops.vq_lookup(ids, codebook)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad((rows * weight).sum(), codebook)[0] for rows in (found, expected)]
    assert torch.equal(*gradients) and gradients[0].any()
    narrow, wide = ids.to(dtype).numpy(), codebook.detach().numpy()
    assert np.array_equal(ops.vq_lookup(narrow, wide), expected.detach().numpy())
    assert torch.equal(reference.vq_lookup(ids.to(dtype), codebook.detach()), expected)
    for counted in (ops.vq_stats(x, ids.to(dtype), 300), reference.vq_stats(x, ids.to(dtype), 300)):
        assert all(map(torch.equal, counted, ops.vq_stats(x, ids, 300)))


def test_wrong_ids_are_named():
    """Smallest, largest, K, position and codebook in one line; nothing is gathered."""
    codebook = randn(2, 10, 4)
    ids = torch.tensor([[0, 9], [3, 4096], [-1, 2]])
    with pytest.raises(TokenRangeError, match=r"from -1 to 4096.*K = 10.*position 1 of codebook 1"):
        ops.vq_lookup(ids, codebook)
    with pytest.raises(TokenRangeError, match="-7"):
        ops.vq_lookup(torch.full((1, 2), -7), codebook)
    with pytest.raises(ShapeError, match=r"\(3, 1\)"):
        ops.vq_lookup(ids[:, :1], codebook)
    with pytest.raises(DtypeError, match="float32"):
        ops.vq_lookup(ids.float(), codebook)


def test_unchecked_wrong_ids_give_nan_rows(monkeypatch):
    """With checks off, the kernel neither faults nor returns another row."""
    monkeypatch.setattr(ops, "checks", "never")
    codebook = randn(1, 10, 4)
    ids = torch.tensor([[0], [10], [-1], [2**40], [-(2**40)]])
    rows = ops.vq_lookup(ids, codebook)
    assert rows[0].isfinite().all() and rows[1:].isnan().all()
    rows = ops.vq_lookup(ids.numpy(), codebook.numpy())
    assert np.isfinite(rows[0]).all() and np.isnan(rows[1:]).all()


def test_empty_inputs():
    """No rows, no codes (unchecked, all NaN), no columns."""
    assert ops.vq_lookup(torch.empty(0, 2, dtype=torch.int64), randn(2, 5, 3)).shape == (0, 2, 3)
    assert ops.vq_lookup(torch.zeros(4, 2, dtype=torch.int64), randn(2, 5, 0)).shape == (4, 2, 0)


@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_reaches_the_codebook(metric):
    """gradcheck in float64, through the normalisation for cosine."""
    codebook = randn(2, 6, 3, dtype=torch.float64).requires_grad_()
    ids = torch.randint(6, (9, 2), generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda code: ops.vq_lookup(ids, code, metric=metric), (codebook,))


@pytest.mark.skipif(not levels_here(), reason="the compiled core does not run")
def test_the_native_kernel_is_what_runs():
    """One call of each op is one call of the core."""
    x, codebook = randn(4, 1, 8), ops.pack_codebook(randn(1, 16, 8))
    with native.count_calls() as calls:
        ops.vq_lookup(ops.vq_assign(x, codebook), codebook)
    assert calls["vq_assign"] == 1 and calls["vq_lookup"] == 1 and calls["vq_pack"] == 0
