"""vq_quantize, vq_stats and vq_update_: values, gradients, masks, and the EMA update."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meditok import native, ops
from meditok.errors import DtypeError, ShapeError, TokenRangeError
from meditok.ops import reference

from .helpers import METRICS, has_native, randn

DECAY = dict(decay=0.9, eps=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_equal_autograd_of_the_reference(metric, rotation, masked):
    """z, ids, loss, counts and both gradients against the plain definition, in float64."""
    x = randn(60, 2, 5, dtype=torch.float64).requires_grad_()
    codebook = randn(2, 17, 5, seed=1, dtype=torch.float64).requires_grad_()
    mask = torch.arange(60) % 3 > 0 if masked else None
    settings = dict(metric=metric, rotation=rotation, mask=mask, commitment_weight=0.3, codebook_weight=0.7)
    weight = randn(60, 2, 5, seed=2, dtype=torch.float64)
    found = ops.vq_quantize(x, codebook, **settings)
    expected = reference.vq_quantize(x, codebook, **settings)
    for name, a, b in zip(("z", "ids", "loss", "counts"), found, expected, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-6, atol=1e-12, msg=name)
    assert found[2].dtype == torch.float32 and not found[1].requires_grad and not found[3].requires_grad
    for a, b in zip(
        torch.autograd.grad((found[0] * weight).sum() + 3 * found[2], (x, codebook)),
        torch.autograd.grad((expected[0] * weight).sum() + 3 * expected[2], (x, codebook)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_the_loss_of_the_reference_passes_gradcheck(metric):
    """The written-out loss of the oracle, term by term, against finite differences in float64."""
    x = randn(7, 2, 3, dtype=torch.float64).requires_grad_()
    codebook = randn(2, 4, 3, seed=1, dtype=torch.float64).requires_grad_()

    def commitment(x):
        return reference.vq_quantize(x, codebook.detach(), metric=metric, codebook_weight=0.0)[2]

    def codes(codebook):
        return reference.vq_quantize(x.detach(), codebook, metric=metric, commitment_weight=0.0)[2]

    assert torch.autograd.gradcheck(commitment, (x,)) and torch.autograd.gradcheck(codes, (codebook,))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_z_is_bit_equal_to_the_lookup(metric, dtype):
    """z equals vq_lookup(ids) bit for bit in every dtype, with and without rotation."""
    x, codebook = randn(50, 2, 8, dtype=dtype), randn(2, 20, 8, seed=1, dtype=dtype)
    for rotation in (False, True):
        z, ids, loss, counts = ops.vq_quantize(x, codebook, metric=metric, rotation=rotation)
        assert torch.equal(z, ops.vq_lookup(ids, codebook, metric=metric))
        assert torch.equal(ids, ops.vq_assign(x, codebook, metric=metric))
        assert counts.sum() == ids.numel() and loss.dtype == torch.float32 and z.dtype == dtype


def test_masked_rows_take_no_part():
    """id -1, z 0, no gradient, no count; a NaN under the mask is not seen; all masked gives loss 0."""
    x, codebook = randn(10, 2, 4), randn(2, 6, 4, seed=1)
    x[3] = torch.nan
    x.requires_grad_()
    mask = torch.arange(10) != 3
    z, ids, loss, counts = ops.vq_quantize(x, codebook, mask=mask)
    (z.sum() + loss).backward()
    assert (ids[3] == -1).all() and (z[3] == 0).all() and loss.isfinite() and counts.sum() == 18
    assert x.grad[mask].isfinite().all() and (x.grad[3] == 0).all()
    kept = ops.vq_quantize(x.detach()[mask], codebook)[2]
    torch.testing.assert_close(loss.detach(), kept)
    nothing = ops.vq_quantize(x, codebook, mask=torch.zeros(10, dtype=torch.bool))
    assert nothing[2] == 0 and (nothing[0] == 0).all() and nothing[3].sum() == 0
    with pytest.raises(ShapeError, match="mask"):
        ops.vq_quantize(x, codebook, mask=mask[:5])
    with pytest.raises(ShapeError, match="mask"):
        ops.vq_quantize(x, codebook, mask=mask.long())


def test_no_rows_and_unmasked_nan_rows():
    """An empty batch has loss 0; a NaN row that is used is seen in z and loss, with id -1 and no count."""
    codebook = randn(2, 6, 4)
    z, ids, loss, counts = ops.vq_quantize(torch.empty(0, 2, 4), codebook)
    assert loss == 0 and counts.sum() == 0 and z.shape == (0, 2, 4)
    x = randn(3, 2, 4)
    x[1, 0, 0] = torch.nan
    z, ids, loss, counts = ops.vq_quantize(x, codebook)
    assert ids[1, 0] == -1 and z[1, 0].isnan().all() and loss.isnan() and counts.sum() == 5


@pytest.mark.skipif(not has_native(), reason="the compiled core does not run")
def test_training_runs_the_native_kernels():
    """One call of the core forward, one backward; mixed dtypes are refused."""
    x, codebook = randn(10, 2, 4).requires_grad_(), randn(2, 6, 4).requires_grad_()
    with native.count_calls() as calls:
        z, _, loss, _ = ops.vq_quantize(x, codebook)
        (z.sum() + loss).backward()
    made = {name: count for name, count in calls.items() if count}
    assert made == {"vq_pack": 1, "vq_quantize": 1, "vq_quantize_backward": 1}
    with pytest.raises(DtypeError, match="one dtype"):
        ops.vq_quantize(x.half(), codebook)


def test_statistics_count_and_sum():
    """Counts and sums by hand; id -1 is left out, any other wrong id is an error; thread counts change no
    bit."""
    x, ids = randn(9000, 2, 3), torch.randint(-1, 7, (9000, 2), generator=torch.Generator().manual_seed(1))
    counts, sums = ops.vq_stats(x, ids, 7)
    for g in range(2):
        for k in range(7):
            assert counts[g, k] == (ids[:, g] == k).sum()
            expected = x[ids[:, g] == k, g].double().sum(0)
            torch.testing.assert_close(sums[g, k].double(), expected, rtol=1e-4, atol=1e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    again = ops.vq_stats(x, ids, 7)[1]
    torch.set_num_threads(threads)
    assert torch.equal(again, sums) and counts.dtype == torch.int64 and sums.dtype == torch.float32
    with pytest.raises(TokenRangeError, match="K = 6"):
        ops.vq_stats(x, ids, 6)
    with pytest.raises(TokenRangeError, match="from -2 to"):
        ops.vq_stats(x, torch.where(ids < 0, -2, ids), 7)
    with pytest.raises(DtypeError, match="ids have dtype"):
        ops.vq_stats(x, ids.float(), 7)


@pytest.mark.parametrize("metric", METRICS)
def test_the_update_is_the_published_moving_average(metric):
    """EMA of counts and sums, Laplace smoothing for l2, normalised sums for cosine."""
    codebook, ema_counts, ema_sums = randn(2, 5, 3), torch.rand(2, 5), randn(2, 5, 3, seed=1)
    counts, sums = torch.randint(0, 9, (2, 5)), randn(2, 5, 3, seed=2)
    expected_counts = ema_counts * 0.9 + counts * 0.1
    expected_sums = ema_sums * 0.9 + sums * 0.1
    ops.vq_update_(codebook, ema_counts, ema_sums, counts, sums, metric=metric, **DECAY)
    torch.testing.assert_close(ema_counts, expected_counts)
    torch.testing.assert_close(ema_sums, expected_sums)
    if metric == "cosine":
        expected = torch.nn.functional.normalize(expected_sums, dim=-1)
    else:
        total = expected_counts.sum(-1, keepdim=True)
        smoothed = (expected_counts + 1e-5) / (total + 5e-5) * total
        expected = expected_sums / smoothed[..., None]
    torch.testing.assert_close(codebook, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_no_counts_change_nothing(metric):
    """An update without any count leaves codebook and state bit for bit."""
    state = [randn(2, 5, 3), torch.rand(2, 5), randn(2, 5, 3, seed=1)]
    before = [tensor.clone() for tensor in state]
    zeros = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, 3)
    ops.vq_update_(*state, *zeros, metric=metric, **DECAY)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    with pytest.raises(ShapeError, match="ema_sums"):
        ops.vq_update_(state[0], state[1], state[2][:, :4], *zeros, **DECAY)
    for arrays in ([state[0].long(), *state[1:]], [state[0].long().numpy(), state[1].numpy(), state[2].numpy()]):
        kind = [zero.numpy() for zero in zeros] if isinstance(arrays[0], np.ndarray) else zeros
        with pytest.raises(DtypeError, match="codebook has dtype"):
            ops.vq_update_(*arrays, *kind, **DECAY)


def test_state_that_cannot_be_written_in_place_is_refused():
    """Expanded, shared, or watched by autograd: an error that names it, and nothing is written."""
    codebook, counts, sums = randn(1, 5, 3), torch.ones(1, 5), randn(1, 5, 3, seed=1)
    new = torch.ones(1, 5, dtype=torch.int64), randn(1, 5, 3, seed=2)
    before = sums.clone()
    for state, message in (
        ((randn(1, 1, 3).expand(1, 5, 3), counts, sums), "codebook is expanded"),
        ((codebook, torch.ones(1, 1).expand(1, 5), sums), "ema_counts is expanded"),
        ((sums, counts, sums), "ema_sums shares its memory"),
        ((codebook.clone().requires_grad_(), counts, sums), "codebook requires a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.vq_update_(*state, *new, **DECAY)
    assert torch.equal(sums, before) and (counts == 1).all()
    with torch.no_grad():
        ops.vq_update_(codebook.requires_grad_(), counts, sums, *new, **DECAY)
    assert not torch.equal(sums, before)


def test_no_codes_give_no_statistics():
    """K = 0: every id is -1, the loss NaN, counts and sums are empty."""
    for width in (4, 40):  # both regimes
        x = randn(5, 2, width)
        z, ids, loss, counts = ops.vq_quantize(x, torch.empty(2, 0, width))
        assert (ids == -1).all() and z.isnan().all() and loss.isnan() and counts.shape == (2, 0)
        counts, sums = ops.vq_stats(x, ids, 0)
        assert counts.shape == (2, 0) and sums.shape == (2, 0, width)
