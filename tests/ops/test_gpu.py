"""The vq ops on a CUDA device: the CPU's ids and rows, the reference's gradients, streams, graphs, memory.

`pytest -m gpu` runs them; bench/gpu_check.sh builds for the device at hand first.
"""

from __future__ import annotations

import gc

import pytest
import torch

from meditok import native, ops
from meditok.ops import reference

from .helpers import (
    FLOATS,
    METRICS,
    adversarial_codebooks,
    assert_same_bits,
    assert_same_ids,
    near_ties,
    randn,
    run_python,
)
from .test_cuda_training import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# The widths of MedITok and MedUnifier among them; (rows, groups, codes, width).
SHAPES = [(1, 1, 1, 1), (1000, 8, 4096, 8), (130, 2, 257, 16), (77, 3, 65, 33), (100, 1, 512, 768)]
DECAY = dict(decay=0.9, eps=1e-5)


@pytest.fixture(autouse=True)
def _native_kernels():
    assert native.cuda_usable(torch.cuda.current_device()), native.cuda_problem()


def pair(rows, groups, codes, width, dtype=torch.float32):
    """x with strides of its own, and a codebook, on the CPU."""
    return randn(groups, rows, width, dtype=dtype).transpose(0, 1), randn(groups, codes, width, seed=1, dtype=dtype)


def train(x, codebook, metric, rotation=False, mask=None):
    """(z, ids, loss, counts, grad_x, grad_codebook) of one step."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    z, ids, loss, counts = ops.vq_quantize(x, codebook, metric=metric, rotation=rotation, mask=mask)
    weight = torch.linspace(-1, 1, x[0].numel(), device=x.device, dtype=x.dtype).view_as(x[0])
    return z, ids, loss, counts, *torch.autograd.grad((z * weight).sum() + 3 * loss, (x, codebook))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_ids_and_rows_are_those_of_the_cpu(metric, dtype):
    """vq_assign, vq_lookup and a packed codebook, every dtype, through the compiled kernels."""
    for shape in SHAPES:
        x, codebook = pair(*shape, dtype=dtype)
        expected = ops.vq_assign(x, codebook, metric=metric)
        with native.count_calls() as calls:
            ids = ops.vq_assign(x.cuda(), codebook.cuda(), metric=metric)
            rows = ops.vq_lookup(ids, codebook.cuda(), metric=metric)
            packed = ops.pack_codebook(codebook.cuda(), metric=metric)
            again = ops.vq_assign(x.cuda(), packed, metric=metric)
        assert calls["vq_assign_cuda"] == 2 and calls["vq_lookup_cuda"] == 1 and calls["vq_pack_cuda"] == 2
        assert_same_ids(ids.cpu(), expected, f"{shape}")
        assert_same_ids(again.cpu(), expected, f"{shape} packed")
        assert_same_bits(rows.cpu(), ops.vq_lookup(expected, codebook, metric=metric), f"{shape}")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [8, 40])
def test_adversarial_codebooks_and_near_ties_give_the_ids_of_the_cpu(metric, width):
    """What defeats shortcuts, and ties of an ulp."""
    x = torch.cat([randn(200, 1, width, seed=3), torch.zeros(1, 1, width), randn(5, 1, width) * 1e30])
    x[7, 0, 1], x[9, 0, 2] = torch.nan, torch.inf
    for name, codebook in adversarial_codebooks(700, width).items():
        expected = ops.vq_assign(x, codebook, metric=metric)
        assert_same_ids(ops.vq_assign(x.cuda(), codebook.cuda(), metric=metric).cpu(), expected, name)
    for seed in range(5):
        near, codebook = near_ties(1000, width, seed)
        expected = ops.vq_assign(near, codebook, metric=metric)
        assert_same_ids(ops.vq_assign(near.cuda(), codebook.cuda(), metric=metric).cpu(), expected, f"seed {seed}")


TRITON = """
import torch
from meditok import native, ops
from tests.ops.helpers import FLOATS, METRICS, adversarial_codebooks, near_ties, randn
assert native.cuda_backend(0) == "triton"
def check(x, codebook, metric):
    ids = ops.vq_assign(x, codebook, metric=metric)
    assert torch.equal(ops.vq_assign(x.cuda(), codebook.cuda(), metric=metric).cpu(), ids)
    rows = ops.vq_lookup(ids, codebook, metric=metric)
    found = ops.vq_lookup(ids.cuda(), codebook.cuda(), metric=metric).cpu()
    assert torch.equal(found.isnan(), rows.isnan()) and torch.equal(found.nan_to_num(0), rows.nan_to_num(0))
ops.checks = "never"
for metric in METRICS:
    for dtype in FLOATS:
        check(randn(300, 2, 8, dtype=dtype), randn(2, 700, 8, seed=1, dtype=dtype), metric)
    check(randn(50, 1, 768), randn(1, 512, 768, seed=1), metric)
    for codebook in adversarial_codebooks(300, 8).values():
        check(randn(64, 1, 8), codebook, metric)
    check(*near_ties(500, 8, 0), metric)
print("same")
"""


def test_the_triton_kernels_give_the_ids_of_the_cpu():
    """MEDITOK_BACKEND=triton on the device, where Triton is installed with this torch."""
    pytest.importorskip("triton")
    result = run_python(TRITON, MEDITOK_BACKEND="triton")
    assert result.stdout.strip() == "same", result.stderr


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rotation", [False, True])
def test_a_training_step_equals_the_reference(metric, dtype, rotation):
    """Forward and both gradients against the reference in float64; masks; every dtype."""
    for index, shape in enumerate(SHAPES):
        x, codebook = pair(*shape, dtype=dtype)
        mask = torch.arange(shape[0]) % 3 != 1 if index % 2 else None
        with native.count_calls() as calls:
            found = train(x.cuda(), codebook.cuda(), metric, rotation, None if mask is None else mask.cuda())
        assert calls["vq_quantize_cuda"] == 1 and calls["vq_quantize_backward_cuda"] == 1
        z, ids, loss, counts, grad_x, grad_codebook = (tensor.cpu() for tensor in found)
        exact = ops.vq_quantize(x, codebook, metric=metric, mask=mask)
        assert_same_bits(z, exact[0], f"{shape}")
        assert_same_ids(ids, exact[1], f"{shape}")
        torch.testing.assert_close(loss, exact[2], rtol=1e-5, atol=1e-7)
        assert torch.equal(counts, exact[3])
        weight = torch.linspace(-1, 1, x[0].numel(), dtype=dtype).view_as(x[0]).expand(x.shape)
        wide = (tensor.double() for tensor in (weight, torch.tensor(3.0), x, codebook))
        weights = dict(commitment_weight=0.25, codebook_weight=1.0)
        expected = reference.vq_quantize_backward(*wide, ids, mask, metric=metric, rotation=rotation, **weights)
        assert_close(grad_x, expected[0], dtype, f"grad_x {shape}")
        assert_close(grad_codebook, expected[1], dtype, f"grad_codebook {shape}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_statistics_and_update_are_those_of_the_cpu(dtype):
    """Sums bit for bit, ordinary codes and one that has half the rows; then the EMA."""
    rows, codes = 20000, 500
    x, ids = randn(rows, 2, 8, dtype=dtype), torch.randint(-1, codes, (rows, 2))
    ids[torch.rand(rows, 2) < 0.5] = 7
    counts, sums = ops.vq_stats(x.cuda(), ids.cuda(), codes)
    expected = ops.vq_stats(x, ids, codes)
    assert torch.equal(counts.cpu(), expected[0])
    assert_same_bits(sums.cpu(), expected[1])
    for metric in METRICS:
        state = [randn(2, codes, 8, dtype=dtype), torch.rand(2, codes), randn(2, codes, 8, seed=1)]
        on_device = [tensor.cuda() for tensor in state]
        ops.vq_update_(*on_device, counts, sums, metric=metric, **DECAY)
        ops.vq_update_(*state, *expected, metric=metric, **DECAY)
        for found, wanted in zip(on_device, state, strict=True):
            assert_close(found.cpu(), wanted, dtype, metric)


def test_thirty_training_steps_twice_are_the_same_bits():
    """Quantise, backward, statistics and EMA thirty times over, twice: no bit differs."""
    x = randn(9000, 2, 8).cuda()
    results = []
    for _ in range(2):
        codebook = randn(2, 300, 8, seed=1).cuda()
        counts, sums = torch.zeros(2, 300, device="cuda"), torch.zeros(2, 300, 8, device="cuda")
        trail = []
        for _ in range(30):
            z, ids, loss, _, grad_x, grad_codebook = train(x, codebook, "cosine", rotation=True)
            ops.vq_update_(codebook, counts, sums, *ops.vq_stats(x, ids, 300), **DECAY)
            trail += [z, ids, loss, grad_x, grad_codebook, codebook.clone()]
        results.append(trail)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("width", [8, 64])
def test_a_captured_step_replays_on_new_inputs(width):
    """Quantise, statistics and update in a CUDA graph: a replay on other values equals an eager step."""
    x, codebook = randn(5000, 2, width).cuda(), randn(2, 100, width, seed=1).cuda()
    state = [codebook.clone(), torch.ones(2, 100, device="cuda"), codebook.clone()]

    def step(x, state):
        z, ids, loss, _ = ops.vq_quantize(x, state[0])
        grads = torch.ops.meditok.vq_quantize_backward(
            z, loss, x, state[0], ids, None, metric="cosine", commitment_weight=0.25, codebook_weight=1.0, rotation=True
        )
        ops.vq_update_(*state, *ops.vq_stats(x, ids, 100), **DECAY)
        return z, ids, loss, *grads

    static_x, static_state = x.clone(), [tensor.clone() for tensor in state]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(static_x, static_state)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static_x, static_state)
    other = randn(5000, 2, width, seed=9).cuda()
    static_x.copy_(other)
    for static, tensor in zip(static_state, state, strict=True):
        static.copy_(tensor)
    graph.replay()
    expected = step(other, state)
    for found, wanted in zip((*captured, *static_state), (*expected, *state), strict=True):
        assert_same_bits(found, wanted)


def test_work_is_queued_on_the_current_stream():
    """Behind a long wait on a side stream the call returns at once, and what it reads is what that stream wrote."""
    x, codebook = randn(500, 1, 8).cuda(), randn(1, 50, 8, seed=1).cuda()
    target = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        target.copy_(x)
        z, ids, loss, counts = ops.vq_quantize(target, codebook)
        assert not side.query(), "the call waited for the device"
    side.synchronize()
    assert_same_ids(ids.cpu(), ops.vq_assign(x.cpu(), codebook.cpu()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no CUDA device beside the first")
def test_tensors_of_another_device_run_there():
    """The current device is the first, the tensors are on the second: right, and the current device stays."""
    x, codebook = randn(100, 2, 8), randn(2, 50, 8, seed=1)
    ids = ops.vq_assign(x.to("cuda:1"), codebook.to("cuda:1"))
    assert ids.device.index == 1 and torch.cuda.current_device() == 0
    assert_same_ids(ids.cpu(), ops.vq_assign(x, codebook))
    assert train(x.to("cuda:1"), codebook.to("cuda:1"), "cosine")[4].isfinite().all()


def test_an_id_out_of_range_gives_a_nan_row_and_the_device_stays_usable(monkeypatch):
    """Unchecked ids below and above: NaN rows from the lookup and the backward, left out of the statistics."""
    monkeypatch.setattr(ops, "checks", "never")
    codebook = randn(1, 5, 8).cuda()
    ids = torch.tensor([[0], [5], [-1], [2**40], [-(2**62)], [4]]).cuda()
    rows = ops.vq_lookup(ids, codebook)
    assert rows[1:5].isnan().all() and rows[[0, 5]].isfinite().all()
    counts, sums = ops.vq_stats(rows.nan_to_num(0), ids, 5)
    assert counts.sum() == 2 and sums.isfinite().all()
    x, one = randn(6, 1, 8).cuda(), torch.ones((), device="cuda")
    settings = dict(metric="l2", commitment_weight=0.25, codebook_weight=1.0, rotation=False)
    grad_x, grad_codebook = torch.ops.meditok.vq_quantize_backward(x, one, x, codebook, ids, None, **settings)
    assert grad_x[1:5].isnan().all() and grad_codebook.isfinite().all()
    torch.cuda.synchronize()
    assert ops.vq_assign(x, codebook).max() < 5


def test_nothing_is_allocated_beyond_outputs_packing_and_scratch():
    """torch's allocator is asked for the outputs, the packed codebook and one scratch buffer; nothing else takes device
    memory, and no N x K array exists."""
    rows, groups, codes, width = 20000, 4, 4096, 8
    x, codebook = randn(rows, groups, width).cuda(), randn(groups, codes, width, seed=1).cuda()
    ops.vq_quantize(x, codebook)  # loads what is loaded once
    gc.collect()
    torch.cuda.synchronize()
    size = (rows, groups, codes, width)
    outputs = x.numel() * 4 + rows * groups * 8 + 4 + groups * codes * 8
    packed = native.core.vq_packed_bytes(groups, codes, width)
    scratch = native.core.vq_quantize_scratch_bytes(*size)
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    count = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.reset_peak_memory_stats()
    results = ops.vq_quantize(x, codebook)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - count == 4 + 2
    assert torch.cuda.max_memory_allocated() - before <= outputs + packed + scratch + 6 * 512
    assert torch.cuda.mem_get_info()[0] == free
    assert scratch + packed <= 2 * (x.numel() + codebook.numel()) * 4 + 64 * 1024
    assert results[3].sum() == rows * groups


@pytest.mark.parametrize("metric", METRICS)
def test_cupy_arrays_in_and_out(metric):
    """Every vq op on CuPy arrays, on CuPy's current stream, without a copy; negative strides and mixed kinds too."""
    cupy = pytest.importorskip("cupy")
    x, codebook = randn(300, 2, 8), randn(2, 50, 8, seed=1)
    cx, cc = cupy.asarray(x.numpy()), cupy.asarray(codebook.numpy())
    with cupy.cuda.Stream(non_blocking=True) as stream:
        ids = ops.vq_assign(cx, cc, metric=metric)
        rows = ops.vq_lookup(ids, cc, metric=metric)
        packed = ops.pack_codebook(cc, metric=metric)
        z, again, loss, counts = ops.vq_quantize(cx, packed, metric=metric)
        stats_counts, sums = ops.vq_stats(cx, ids, 50)
        state = [cc.copy(), cupy.ones((2, 50), "float32"), cc.copy()]
        address = state[0].data.ptr
        ops.vq_update_(*state, stats_counts, sums, metric=metric, **DECAY)
        backwards = ops.vq_assign(cx[::-1], cc, metric=metric)
        stream.synchronize()
    assert all(isinstance(array, cupy.ndarray) for array in (ids, rows, z, again, loss, counts, sums))
    expected = ops.vq_assign(x, codebook, metric=metric)
    for found in (ids, again, backwards[::-1]):
        assert_same_ids(torch.from_numpy(found.get()), expected)
    assert_same_bits(torch.from_numpy(z.get()), ops.vq_lookup(expected, codebook, metric=metric))
    assert_same_bits(torch.from_numpy(rows.get()), ops.vq_lookup(expected, codebook, metric=metric))
    wanted = [codebook.clone(), torch.ones(2, 50), codebook.clone()]
    ops.vq_update_(*wanted, *ops.vq_stats(x, expected, 50), metric=metric, **DECAY)
    assert state[0].data.ptr == address
    assert_close(torch.from_numpy(state[0].get()), wanted[0], torch.float32, metric)
    with pytest.raises(TypeError, match="cupy and torch"):
        ops.vq_assign(cx, codebook.cuda())
    with pytest.raises(TypeError, match="cupy and numpy"):
        ops.vq_lookup(ids.get(), cc)
