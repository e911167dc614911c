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


def assign(kernels, x, codebook, metric):
    ids = torch.full(x.shape[:2], -99)
    sizes = [ctypes.c_long(size) for size in (*x.shape[:2], codebook.shape[1], x.shape[2])]
    arguments = (pointer(x), CODES[x.dtype], pointer(codebook), CODES[codebook.dtype], *sizes)
    kernels.cuda_assign(*arguments, METRICS.index(metric), pointer(ids))
    return ids


def check(kernels, x, codebook, metric, what=""):
    x, codebook = x.contiguous(), codebook.contiguous()
    expected = reference.vq_assign(x, codebook, metric=metric)
    assert_same_ids(assign(kernels, x, codebook, metric), expected, what)


@pytest.mark.parametrize("metric", METRICS)
def test_assign_gives_the_same_ids(kernels, metric):
    """Both kernels, shapes around blocks, stages and tiles, every dtype."""
    shapes = [(1, 1, 1, 1), (127, 1, 31, 2), (129, 2, 33, 4), (3, 1, 129, 5), (5, 2, 257, 8), (4, 1, 300, 16)]
    for rows, groups, codes, width in [*shapes, (2, 1, 65, 32), (3, 2, 33, 33), (2, 1, 300, 100), (2, 1, 20, 2048)]:
        what = f"{rows} {groups} {codes} {width}"
        check(kernels, randn(rows, groups, width), randn(groups, codes, width, seed=1), metric, what)
    for dtype in FLOATS:
        for width in (8, 40):
            x, codebook = randn(6, 1, width, dtype=dtype), randn(1, 70, width, seed=1, dtype=dtype)
            check(kernels, x, codebook, metric, f"{dtype} {width}")
    check(kernels, randn(3, 1, 8200, scale=0.1), randn(1, 5, 8200, seed=1), metric, "wider than shared memory")


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
    for seed in range(3):
        x, codebook = near_ties(150, width, seed)
        check(kernels, x[:20], codebook, metric, f"near ties {seed}")


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
