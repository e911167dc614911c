"""The CUDA kernels of the training path, run on the CPU by fibers, against the reference in float64."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from meditok.ops import reference
from meditok.ops._library import FLOATS as CODES

from .helpers import FLOATS, METRICS, adversarial_codebooks, assert_same_bits, assert_same_ids, randn

# (rows, groups, codes, width): one lane group a row and a warp a row, odd sizes, a block of rows and one more.
SHAPES = [(1, 1, 1, 1), (37, 2, 5, 3), (40, 3, 9, 8), (33, 1, 7, 17), (9, 2, 4, 70)]
EPSILON = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}
WEIGHTS = dict(commitment_weight=0.3, codebook_weight=0.7)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(*values: int):
    return (ctypes.c_int64 * len(values))(*values)


def call(entry, *arguments) -> None:
    """Calls an entry, which returns how many bytes it wrote beyond its scratch memory."""
    assert entry(*arguments) == 0, "written beyond the scratch memory"


def mask_of(rows: int, masked: bool) -> torch.Tensor | None:
    return torch.arange(rows) % 3 != 1 if masked else None


def quantize(kernels, x, codebook, metric, mask=None):
    rows, groups, width = x.shape
    z, ids = torch.full(x.shape, 7.0, dtype=x.dtype), torch.full((rows, groups), -99)
    loss, counts = torch.full((), 7.0), torch.full(codebook.shape[:2], -99)
    size = integers(rows, groups, codebook.shape[1], width)
    call(
        *(kernels.cuda_quantize, size, CODES[x.dtype], pointer(x), integers(*x.stride()), pointer(codebook)),
        *(pointer(mask), METRICS.index(metric), *map(ctypes.c_double, WEIGHTS.values())),
        *map(pointer, (z, ids, loss, counts)),
    )
    return z, ids, loss, counts


def backward(kernels, grad_z, grad_loss, x, codebook, ids, mask, metric, rotation, codebook_needed=True):
    grad_x, grad_codebook = torch.full_like(grad_z, 7.0), torch.full_like(codebook, 7.0)
    size = integers(*x.shape[:2], codebook.shape[1], x.shape[2])
    call(
        *(kernels.cuda_backward, size, CODES[x.dtype], pointer(grad_z), pointer(grad_loss), pointer(x)),
        *(integers(*x.stride()), pointer(codebook), pointer(ids), pointer(mask), METRICS.index(metric)),
        *(*map(ctypes.c_double, WEIGHTS.values()), int(rotation), pointer(grad_x)),
        pointer(grad_codebook if codebook_needed else None),
    )
    return grad_x, grad_codebook


def stats(kernels, x, ids, codes):
    counts, sums = torch.full((x.shape[1], codes), -99), torch.full((x.shape[1], codes, x.shape[2]), 7.0)
    size = integers(*x.shape[:2], codes, x.shape[2])
    call(
        *(kernels.cuda_stats, size, CODES[x.dtype], pointer(x), integers(*x.stride())),
        *map(pointer, (ids, counts, sums)),
    )
    return counts, sums


def inputs(rows, groups, codes, width, dtype=torch.float32):
    """x with strides of its own, and a contiguous codebook."""
    return randn(groups, rows, width, dtype=dtype).transpose(0, 1), randn(groups, codes, width, seed=1, dtype=dtype)


def assert_close(found, expected, dtype, what):
    """Within a few units of rounding of the largest value, in the dtype of the inputs; NaN where NaN is."""
    found, expected = found.double(), expected.double()
    assert torch.equal(found.isnan(), expected.isnan()), what
    scale = expected.nan_to_num(0).abs().max() if expected.numel() else 0
    worst = (found - expected).nan_to_num(0).abs().max() if expected.numel() else 0
    assert worst <= 4 * EPSILON[dtype] * scale + 1e-300, f"{what}: off by {worst}, largest value {scale}"


@pytest.mark.parametrize("metric", METRICS)
def test_the_forward_equals_the_reference(kernels, metric):
    """z bit-equal to the lookup, exact ids and counts, the loss to rounding; masks, dtypes, strides, shapes."""
    cases = [(shape, torch.float32, masked) for shape in SHAPES for masked in (False, True)]
    cases += [(SHAPES[2], dtype, True) for dtype in FLOATS[1:]] + [((0, 2, 3, 4), torch.float32, False)]
    for shape, dtype, masked in cases:
        what = f"{shape} {dtype} masked {masked}"
        x, codebook = inputs(*shape, dtype=dtype)
        mask = mask_of(shape[0], masked)
        z, ids, loss, counts = quantize(kernels, x, codebook, metric, mask)
        expected = reference.vq_quantize(x.double(), codebook.double(), metric=metric, mask=mask, **WEIGHTS)
        exact = reference.vq_assign(x, codebook, metric=metric)
        rows = reference.vq_lookup(exact, codebook, metric=metric)
        if masked:
            exact, rows = torch.where(mask[:, None], exact, -1), torch.where(mask[:, None, None], rows, 0)
        assert_same_ids(ids, exact, what)
        assert_same_bits(z, rows, what)
        assert torch.equal(counts, reference.count_ids(exact, shape[2])), what
        # The loss compares x with the rounded rows, so in a 16-bit type it is off by the rounding of those.
        torch.testing.assert_close(loss.double(), expected[2].double(), rtol=4 * EPSILON[dtype] + 1e-6, atol=1e-12)


def test_nan_rows_are_seen_unless_they_are_masked(kernels):
    """A used NaN row: id -1, NaN in z and loss, no count. Under the mask nothing of it is seen."""
    x, codebook = inputs(10, 2, 6, 4)
    x[3, 1, 0] = torch.nan
    z, ids, loss, counts = quantize(kernels, x, codebook, "cosine")
    assert ids[3, 1] == -1 and z[3, 1].isnan().all() and z[3, 0].isfinite().all() and loss.isnan()
    assert counts.sum() == 19
    mask = torch.arange(10) != 3
    z, ids, loss, counts = quantize(kernels, x, codebook, "cosine", mask)
    assert (z[3] == 0).all() and (ids[3] == -1).all() and loss.isfinite() and counts.sum() == 18
    z, ids, loss, counts = quantize(kernels, x, codebook, "l2", torch.zeros(10, dtype=torch.bool))
    assert loss == 0 and (z == 0).all() and counts.sum() == 0


@pytest.mark.parametrize("metric, rotation", [*itertools.product(METRICS, (False, True))])
def test_the_backward_equals_the_reference(kernels, metric, rotation):
    """Both gradients against the reference in float64: shapes, dtypes, masks, strides, ids out of range."""
    cases = [(shape, torch.float32, index % 2 == 1) for index, shape in enumerate(SHAPES)]
    cases += [(SHAPES[2], dtype, True) for dtype in FLOATS[1:]] + [((0, 2, 3, 4), torch.float32, False)]
    for shape, dtype, masked in cases:
        what = f"{shape} {dtype} masked {masked}"
        x, codebook = inputs(*shape, dtype=dtype)
        mask = mask_of(shape[0], masked)
        grad_z, grad_loss = randn(shape[0], shape[1], shape[3], seed=2, dtype=dtype), torch.tensor(3.0)
        ids = reference.vq_assign(x, codebook, metric=metric)
        found = backward(kernels, grad_z, grad_loss, x, codebook, ids, mask, metric, rotation)
        wide = (tensor.double() for tensor in (grad_z, grad_loss, x, codebook))
        expected = reference.vq_quantize_backward(*wide, ids, mask, metric=metric, rotation=rotation, **WEIGHTS)
        assert_close(found[0], expected[0], dtype, f"grad_x {what}")
        assert_close(found[1], expected[1], dtype, f"grad_codebook {what}")
        only = backward(kernels, grad_z, grad_loss, x, codebook, ids, mask, metric, rotation, codebook_needed=False)
        assert_same_bits(only[0], found[0], what)
        assert (only[1] == 7).all()
    ids[:] = -1  # of an empty batch; below, of one row
    x, codebook = inputs(4, 1, 3, 5)
    ids = torch.tensor([[0], [-1], [7], [2]])
    grad_x, grad_codebook = backward(
        kernels, torch.ones(4, 1, 5), torch.ones(()), x, codebook, ids, None, metric, rotation
    )
    assert grad_x[1:3].isnan().all() and grad_x[[0, 3]].isfinite().all() and grad_codebook.isfinite().all()
    assert (grad_codebook[0, 1] == 0).all()


@pytest.mark.parametrize("width", [3, 33])
def test_statistics_have_the_bits_of_the_reference(kernels, width):
    """Rows in order in blocks of 4,096, the blocks in order: float32 sums equal bit for bit, for ordinary codes, a
    code that has most rows of several blocks, and ids out of range."""
    rows, codes = 4096 * 2 + 77, 300
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, codes, (rows, 1), generator=generator)
    ids[torch.rand(rows, 1, generator=generator) < 0.5] = 7
    ids[5] = codes
    for dtype in (torch.float32, torch.bfloat16) if width == 3 else (torch.float64,):
        x = randn(1, rows, width, dtype=dtype, scale=100).transpose(0, 1)
        counts, sums = stats(kernels, x, ids, codes)
        expected = reference.vq_stats(x, ids, codes)
        assert torch.equal(counts, expected[0])
        assert_same_bits(sums, expected[1], f"{dtype}")
    counts, sums = stats(kernels, x[:0], ids[:0], codes)
    assert (counts == 0).all() and (sums == 0).all()


def test_more_codes_than_shared_memory_holds(kernels):
    """The order of the rows is kept in global memory where the codes are too many: the same sums."""
    x, ids = randn(200, 2, 2), torch.randint(0, 9000, (200, 2), generator=torch.Generator().manual_seed(1))
    ids[::3] = 8999
    counts, sums = stats(kernels, x, ids, 9000)
    expected = reference.vq_stats(x, ids, 9000)
    assert torch.equal(counts, expected[0])
    assert_same_bits(sums, expected[1])


@pytest.mark.parametrize("metric", METRICS)
def test_a_collapsed_codebook_has_the_gradient_of_the_reference(kernels, metric):
    """All rows on one code, more of them than one warp takes, and codebooks that defeat shortcuts."""
    x = randn(600, 1, 4)
    for name in ("all equal", "duplicates", "NaN rows", "infinite rows", "all zero"):
        codebook = adversarial_codebooks(6, 4)[name]
        ids = reference.vq_assign(x, codebook, metric=metric)
        grad_z, grad_loss = randn(600, 1, 4, seed=2), torch.tensor(2.0)
        found = backward(kernels, grad_z, grad_loss, x, codebook, ids, None, metric, False)
        wide = (tensor.double() for tensor in (grad_z, grad_loss, x, codebook))
        expected = reference.vq_quantize_backward(*wide, ids, None, metric=metric, rotation=False, **WEIGHTS)
        assert_close(found[0], expected[0], torch.float32, f"grad_x {name}")
        if name in ("all equal", "duplicates"):
            assert_close(found[1], expected[1], torch.float32, f"grad_codebook {name}")


@pytest.mark.parametrize("metric", METRICS)
def test_the_update_equals_the_reference(kernels, metric):
    """In place on codebook, counts and sums; a code without a sum stays; without any count nothing changes."""
    for (_, groups, codes, width), dtype in [*((shape, torch.float32) for shape in SHAPES), (SHAPES[2], torch.float16)]:
        codebook, ema_sums = randn(groups, codes, width, dtype=dtype), randn(groups, codes, width, seed=1)
        ema_counts = torch.rand(groups, codes)
        counts, sums = torch.randint(0, 5, (groups, codes)), randn(groups, codes, width, seed=2)
        counts[0, 0] = 3
        ema_sums[:, -1] = sums[:, -1] = 0
        for given in (counts, torch.zeros_like(counts)):
            state = [tensor.clone() for tensor in (codebook, ema_counts, ema_sums)]
            size = integers(0, groups, codes, width)
            call(
                *(kernels.cuda_update, size, CODES[dtype], *map(pointer, (*state, given, sums))),
                *(ctypes.c_double(0.9), ctypes.c_double(1e-5), METRICS.index(metric)),
            )
            expected = [tensor.clone() for tensor in (codebook, ema_counts, ema_sums)]
            reference.vq_update_(*expected, given, sums, decay=0.9, eps=1e-5, metric=metric)
            for name, a, b in zip(("codebook", "ema_counts", "ema_sums"), state, expected, strict=True):
                assert_close(a, b, dtype, f"{name} {groups} {codes} {width}")
            if given is not counts:
                assert all(torch.equal(a, b) for a, b in zip(state, (codebook, ema_counts, ema_sums), strict=True))
