"""The CUDA kernels of csrc/vq, run on the CPU by fibers: the same source gives the same ids and rows as the reference.

This proves the kernels' logic where no GPU is at hand; tests marked `gpu` run them for real.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from meditok import native, ops
from meditok.ops import reference
from meditok.ops._library import FLOATS as CODES

from .helpers import (
    FLOATS,
    METRICS,
    adversarial_codebooks,
    assert_same_bits,
    assert_same_ids,
    near_ties,
    randn,
)


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def longs(values) -> ctypes.Array:
    return (ctypes.c_long * len(values))(*values)


def assign(kernels, x, codebook, metric):
    ids = torch.full(x.shape[:2], -99)
    sizes = [ctypes.c_long(size) for size in (*x.shape[:2], codebook.shape[1], x.shape[2])]
    arguments = (pointer(x), CODES[x.dtype], longs(x.stride()), pointer(codebook), CODES[codebook.dtype])
    kernels.cuda_assign(*arguments, longs(codebook.stride()), *sizes, METRICS.index(metric), pointer(ids))
    return ids


def check(kernels, x, codebook, metric, what=""):
    expected = reference.vq_assign(x, codebook, metric=metric)
    assert_same_ids(assign(kernels, x, codebook, metric), expected, what)


@pytest.fixture
def device(kernels):
    """device(multiprocessors, KiB of a block, KiB of a multiprocessor): limits the kernels see; put back afterwards."""
    yield lambda count, block, multiprocessor: kernels.set_device(count, block * 1024, multiprocessor * 1024)
    kernels.set_device(2, 227 * 1024, 228 * 1024)


@pytest.fixture
def accumulator(kernels):
    """accumulator(bits): what the emulated tensor core keeps; put back afterwards."""
    yield kernels.set_accumulator_bits
    kernels.set_accumulator_bits(24)


@pytest.mark.parametrize("metric", METRICS)
def test_assign_gives_the_same_ids(kernels, metric):
    """Both kernels, shapes around blocks, chunks and depth steps."""
    shapes = [(1, 1, 1, 1), (65, 1, 31, 2), (3, 2, 33, 8), (3, 1, 129, 9), (2, 1, 257, 16), (5, 1, 300, 17)]
    for rows, groups, codes, width in [*shapes, (2, 1, 65, 32), (129, 1, 31, 33), (3, 2, 129, 64), (2, 1, 20, 1000)]:
        what = f"{rows} {groups} {codes} {width}"
        check(kernels, randn(rows, groups, width), randn(groups, codes, width, seed=1), metric, what)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [8, 36])
def test_every_type_and_any_stride(kernels, metric, width):
    """Types of x and codebook on their own; transposed, sliced and expanded arguments."""
    for dtype in FLOATS:
        x, codebook = randn(6, 1, width, dtype=dtype), randn(1, 70, width, seed=1, dtype=torch.float32)
        check(kernels, x, codebook, metric, f"x {dtype}")
        check(kernels, x.float(), codebook.to(dtype), metric, f"codebook {dtype}")
    x, codebook = randn(width, 2, 7).permute(2, 1, 0), randn(2, width, 2 * 40).transpose(1, 2)[:, ::2]
    check(kernels, x, codebook, metric, "permuted")
    check(kernels, x[:1].expand(4, 2, width), codebook[:1].expand(2, 40, width), metric, "expanded")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [8, 36])
def test_adversarial_codebooks_and_near_ties(kernels, metric, width):
    """What defeats shortcuts, on the small-width and the large-width kernel."""
    ordinary = randn(6, 1, width, seed=3)
    broken = ordinary[:2].clone()
    broken[0, 0, 1], broken[1, 0, 2] = torch.nan, torch.inf
    x = torch.cat([ordinary, torch.zeros(1, 1, width), broken, ordinary[:2] * 1e30, ordinary[:2] * 1e-30])
    for name, codebook in adversarial_codebooks(70, width).items():
        check(kernels, x, codebook, metric, name)
    x, codebook = near_ties(150, width, 0)
    check(kernels, x[:20], codebook, metric, "near ties")


@pytest.mark.parametrize("metric", METRICS)
def test_rows_opposite_to_all_codes(kernels, metric):
    """No score is above zero, which is where maxima start; and rows of one block whose lengths differ by 2^40."""
    codebook = randn(1, 300, 8).abs()
    check(kernels, -randn(5, 1, 8, seed=1).abs(), codebook, metric)
    check(kernels, randn(6, 1, 8) * 2.0 ** torch.arange(-20, 40, 10).view(6, 1, 1), codebook, metric)
    check(kernels, randn(6, 1, 40) * 2.0 ** torch.arange(-20, 40, 10).view(6, 1, 1), randn(1, 60, 40), metric)


@pytest.mark.parametrize("limits", [(1, 64, 64), (1, 99, 100), (2, 163, 164), (500, 227, 228)])
def test_every_plan_of_the_small_width_kernel(kernels, device, limits):
    """Codes staged and resident, blocks that go on to further rows, warps that share the codes of the same rows."""
    device(*limits)
    shapes = [(3, 2500, 8), (2, 1400, 24)]
    if limits[0] < 3:
        shapes.append((600, 40, 8))
    for rows, codes, width in shapes:
        metric = "l2" if width == 8 else "cosine"
        check(kernels, randn(rows, 1, width), randn(1, codes, width, seed=1), metric, f"{rows} {codes} {width}")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [8, 64])
def test_the_filter_decides(kernels, metric, width):
    """Of random rows the filter leaves none (small width) or few (large width) to a search by a warp."""
    kernels.searches()
    check(kernels, randn(40, 1, width), randn(1, 256, width, seed=1), metric)
    assert kernels.searches() <= (0 if width == 8 else 8)


@pytest.mark.parametrize("width", [8, 64])
def test_the_bound_covers_a_worse_tensor_core(kernels, accumulator, width):
    """Answers stand with exact sums and with sums cut at the last bit the bound allows for, and break beyond it."""
    x, codebook = randn(40, 1, width), randn(1, 256, width, seed=1)
    for bits in (0, 23):
        accumulator(bits)
        for metric in METRICS:
            check(kernels, x, codebook, metric, f"{bits} bits")
    accumulator(4)
    kernels.searches()
    wrong = (assign(kernels, x, codebook, "cosine") != reference.vq_assign(x, codebook, metric="cosine")).any()
    assert wrong or kernels.searches() > 10, "the emulated accumulator does not reach the answer"


@pytest.mark.parametrize("metric", METRICS)
def test_packing_takes_copies_out_of_the_filter(kernels, metric):
    """Of equal codes the first stays, -0 being equal to 0; a code with a NaN stays out."""
    base = randn(1, 40, 5)
    base[0, 7] = 0
    base[0, 3, 2] = torch.nan
    codebook = torch.cat([base, base.flip(1), -base[:, 7:9]], 1).contiguous()
    kept = torch.empty(codebook.shape[1], dtype=torch.uint8)
    sizes = [ctypes.c_long(size) for size in codebook.shape[1:]]
    kernels.codes_in_filter(pointer(codebook), *sizes, METRICS.index(metric), pointer(kept))
    expected = [code < 40 and code != 3 or code == 81 for code in range(82)]
    assert kept.bool().tolist() == expected


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_lookup_gives_the_same_rows(kernels, metric, dtype):
    """Both launches of the lookup, ids out of range included."""
    for width in (3, 8, 33):
        codebook = randn(2, 20, width, dtype=dtype)
        ids = torch.randint(-2, 22, (30, 2), generator=torch.Generator().manual_seed(1))
        out = torch.empty(30, 2, width, dtype=dtype)
        sizes = [ctypes.c_long(size) for size in (30, *codebook.shape)]
        arguments = (pointer(ids), pointer(codebook), CODES[dtype], *sizes, METRICS.index(metric), pointer(out))
        kernels.cuda_lookup(*arguments)
        assert_same_bits(out, reference.vq_lookup(ids, codebook, metric=metric), f"{width}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("metric", METRICS)
def test_the_gpu_gives_the_ids_of_the_cpu(metric):
    """Small and large width on the device, in a side stream and under graph capture, through the native kernels."""
    assert native.cuda_usable(torch.cuda.current_device()), native.cuda_problem()
    for rows, groups, codes, width in [(1, 1, 1, 1), (1000, 8, 4096, 8), (130, 2, 257, 32), (100, 1, 512, 768)]:
        x, codebook = randn(rows, groups, width), randn(groups, codes, width, seed=1)
        with torch.cuda.stream(torch.cuda.Stream()):
            with native.count_calls() as calls:
                ids = ops.vq_assign(x.cuda(), codebook.cuda(), metric=metric)
                out = ops.vq_lookup(ids, codebook.cuda(), metric=metric)
            assert calls["vq_assign_cuda"] == 1 and calls["vq_lookup_cuda"] == 1
            assert_same_ids(ids.cpu(), ops.vq_assign(x, codebook, metric=metric))
            assert_same_bits(out.cpu(), ops.vq_lookup(ids.cpu(), codebook, metric=metric))
    x, codebook = randn(64, 2, 8).cuda(), randn(2, 100, 8).cuda()
    expected = ops.vq_assign(x, codebook, metric=metric)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.vq_assign(x, codebook, metric=metric)
    graph.replay()
    assert_same_ids(captured.cpu(), expected.cpu())
