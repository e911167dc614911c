"""The compiled training pass against float64: values, gradients, statistics and EMA over shapes, types, strides,
masks and instruction sets; determinism and memory."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meditok import native, ops
from meditok.nn.quantizer import MultiCodebookQuantizer
from meditok.ops import reference

from .helpers import FLOATS, METRICS, assert_same_bits, has_native, levels_here, randn, run_python

needs_core = pytest.mark.skipif(not has_native(), reason="the compiled core does not run")
ROWS = st.sampled_from([0, 1, 2, 31, 63, 64, 65, 96, 97, 130])
WIDTHS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 33, 70])


def strided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values behind other strides."""
    if how == "reversed axes":
        return tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if how == "every second":
        wide = tensor.new_full((*tensor.shape[:2], 2 * tensor.shape[2]), torch.nan)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    return tensor.contiguous()


LAYOUTS = st.sampled_from(["contiguous", "reversed axes", "every second"])


@st.composite
def cases(draw):
    """(x, codebook, grad_z, mask, settings): random values with duplicates, zero rows and lengths far from 1."""
    dtype = draw(st.sampled_from(FLOATS))
    rows, width, codes = draw(ROWS), draw(WIDTHS), draw(st.sampled_from([1, 2, 31, 33, 50]))
    groups, seed = draw(st.sampled_from([1, 2, 3])), draw(st.integers(0, 2**16))
    far = 30.0 if dtype in (torch.float16, torch.bfloat16) else 1e12
    x = randn(rows, groups, width, seed=seed, scale=draw(st.sampled_from([1.0, far, 1 / far])))
    codebook = randn(groups, codes, width, seed=seed + 1, scale=draw(st.sampled_from([1.0, 3.0])))
    if draw(st.booleans()):
        x[::3], codebook[:, codes // 2] = codebook[:, 0].unsqueeze(0), codebook[:, 0]
    if draw(st.booleans()):
        x[1::5] = 0
    mask = draw(st.sampled_from([None, torch.arange(rows) % 3 > 0, torch.zeros(rows, dtype=torch.bool)]))
    grad = randn(rows, groups, width, seed=seed + 2)
    tensors = [strided(tensor.to(dtype), draw(LAYOUTS)) for tensor in (x, codebook, grad)]
    weights = dict(commitment_weight=draw(st.sampled_from([0.0, 0.25, 2.0])))
    weights["codebook_weight"] = draw(st.sampled_from([0.0, 1.0]))
    return *tensors, mask, dict(metric=draw(st.sampled_from(METRICS)), rotation=draw(st.booleans()), **weights)


def largest_error(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    return (found.double() - exact).abs().amax(-1)


@needs_core
@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_values_and_gradients_against_float64(case):
    """ids, z and counts are those of assign and lookup; loss and gradients err at most twice as much as PyTorch in
    the same type; masked rows are 0."""
    x, codebook, grad, mask, options = case
    metric = options["metric"]
    z, ids, loss, counts = ops.vq_quantize(x, codebook, mask=mask, **options)
    wanted = ops.vq_assign(x, codebook, metric=metric)
    rows = reference.vq_lookup(wanted, codebook, metric=metric)
    if mask is not None:
        wanted, rows = torch.where(mask[:, None], wanted, -1), torch.where(mask[:, None, None], rows, 0)
    assert torch.equal(ids, wanted) and torch.equal(counts, reference.count_ids(ids, codebook.shape[1]))
    assert_same_bits(z, rows, "z")

    wide = x.double(), codebook.double()
    hat, code = reference.unit_rows(wide[0], metric), z.double()
    kept = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    square = (hat - code)[kept].square()
    total = options["commitment_weight"] + options["codebook_weight"]
    expected = float(square.sum() / max(1, square.numel()) * total)
    assert abs(float(loss) - expected) <= 1e-6 * expected + 1e-12

    def gradients(grad, x, codebook):
        loss_grad = torch.tensor(3.0)
        return torch.ops.meditok.vq_quantize_backward(grad, loss_grad, x, codebook, ids, mask, **options)

    found = gradients(grad, x, codebook)
    arguments = torch.tensor(3.0), x, codebook, ids, mask
    in_type = reference.vq_quantize_backward(grad, *arguments, **options)
    exact = reference.vq_quantize_backward(grad.double(), arguments[0], *wide, ids, mask, **options)
    # A gradient across the row may cancel to nothing; its rounding is that of what went in.
    step = 6 / max(1, square.numel())
    sizes = grad.double().norm(dim=-1) + step, step * counts * wide[1].abs().amax(-1).clamp_min(1)
    for name, a, b, e, rows, size in zip("xc", found, in_type, exact, wide, sizes, strict=True):
        assert a.dtype == x.dtype and a.shape == e.shape and a.is_contiguous()
        if metric == "cosine":
            size = size / rows.norm(dim=-1).clamp_min(1e-12)
        allowed = 2 * largest_error(b, e) + 8 * torch.finfo(x.dtype).eps * (e.abs().amax(-1) + size)
        assert bool((largest_error(a, e) <= allowed).all()), name
    assert (found[0][~kept] == 0).all()


@needs_core
def test_small_integers_give_exact_gradients():
    """l2 on small integers with a power of two of elements: every sum is exact, so the bits are those of integers."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randint(-4, 5, (128, 2, 8), generator=generator) for _ in range(2))
    codebook = torch.randint(-4, 5, (2, 16, 8), generator=generator)
    found = [x.float().requires_grad_(), codebook.float().requires_grad_()]
    z, ids, loss, _ = ops.vq_quantize(*found, metric="l2", commitment_weight=0.25, codebook_weight=1.0)
    ((z * grad).sum() + 1024 * loss).backward()
    chosen = codebook[torch.arange(2), ids]
    assert float(loss.detach()) == 1.25 * (x - chosen).square().sum() / 2048
    assert torch.equal(found[0].grad, grad + 0.25 * (x - chosen))
    per_code = torch.zeros(2, 16, 8)
    for group in range(2):
        per_code[group].index_add_(0, ids[:, group], (chosen - x)[:, group].float())
    assert torch.equal(found[1].grad, per_code)


@needs_core
@pytest.mark.parametrize("dtype", FLOATS)
def test_statistics_have_the_bits_of_the_reference(dtype):
    """Around blocks of 4,096 rows, wide and narrow, strided, ids of -1, few codes and many."""
    for rows, codes, width in [(0, 3, 2), (1, 1, 1), (4095, 5, 3), (4096, 900, 8), (4097, 2, 9), (9000, 7, 70)]:
        x = strided(randn(rows, 2, width, dtype=dtype), "reversed axes")
        ids = torch.randint(-1, codes, (2, rows), generator=torch.Generator().manual_seed(rows)).t()
        for a, b in zip(ops.vq_stats(x, ids, codes), reference.vq_stats(x, ids, codes), strict=True):
            assert torch.equal(a, b), (rows, codes, width)


@needs_core
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_update_follows_the_reference(dtype, metric):
    """EMA state bit for bit, rows within one rounding, in place through strides; empty codes and zero sums stay."""
    counts = torch.randint(0, 3, (3, 40), generator=torch.Generator().manual_seed(1))
    sums = strided(randn(3, 40, 9, seed=2) * (counts > 0)[..., None], "every second")
    state = [strided(randn(3, 40, 9, dtype=dtype, seed=3), "reversed axes"), torch.rand(40, 3).t(), randn(3, 40, 9)]
    state[2][0, :5], state[1][0, :5], counts[0, :5] = 0, 0, 0
    sums[0, :5] = 0
    wanted = [tensor.clone() for tensor in state]
    ops.vq_update_(*state, counts, sums, decay=0.9, eps=1e-5, metric=metric)
    reference.vq_update_(*wanted, counts, sums, decay=0.9, eps=1e-5, metric=metric)
    assert torch.equal(state[1], wanted[1]) and torch.equal(state[2], wanted[2])
    tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(state[0], wanted[0], rtol=tolerance, atol=tolerance)
    if metric == "cosine":
        assert torch.equal(state[0][0, :5], randn(3, 40, 9, dtype=dtype, seed=3)[0, :5])


def training_pass(rows: int = 5000, groups: int = 2, codes: int = 300, width: int = 8) -> list[torch.Tensor]:
    """Everything one step computes: forward, both gradients with rotation and mask, statistics, EMA."""
    x, codebook = randn(rows, groups, width).requires_grad_(), randn(groups, codes, width, seed=1).requires_grad_()
    z, ids, loss, counts = ops.vq_quantize(x, codebook, mask=torch.arange(rows) % 7 > 0, rotation=True)
    grads = torch.autograd.grad((z.square().sum() + loss), (x, codebook))
    state = [codebook.detach().clone(), torch.ones(groups, codes), codebook.detach().clone()]
    counts, sums = ops.vq_stats(x.detach(), ids, codes)
    ops.vq_update_(*state, counts, sums, decay=0.9, eps=1e-5, metric="l2")
    return [z.detach(), ids, loss.detach(), counts, *grads, sums, *state]


SHAPES = [{}, dict(rows=500, groups=1, codes=40, width=330)]  # gradients of codes added up in passing, or sorted


@needs_core
@pytest.mark.parametrize("shape", SHAPES)
def test_thirty_runs_and_any_threads_give_the_same_bits(shape):
    """30 runs over 1, 2 and 3 threads: nothing differs in any output of any op, the EMA included."""
    threads, expected = torch.get_num_threads(), training_pass(**shape)
    for run in range(30):
        torch.set_num_threads(1 + run % 3)
        found = training_pass(**shape)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), run
    torch.set_num_threads(threads)


LEVEL = """
import hashlib
from tests.ops.test_vq_training import SHAPES, training_pass
found = (tensor for shape in SHAPES for tensor in training_pass(**shape))
print(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in found)).hexdigest())
"""


@needs_core
def test_every_level_gives_the_same_bits():
    """Losses, gradients and sums do not depend on the instruction set."""
    found = {level: run_python(LEVEL, MEDITOK_ISA=level) for level in levels_here()}
    assert all(result.returncode == 0 for result in found.values()), found
    assert len({result.stdout for result in found.values()}) == 1, found


@needs_core
def test_a_training_pass_of_the_quantiser_runs_the_fused_kernels():
    """One native call forward and one backward, and no separate assignment or lookup."""
    quantizer = MultiCodebookQuantizer(2, 64, 8)
    with native.count_calls() as calls:
        for _ in range(3):
            found = quantizer(randn(2, 6, 16).requires_grad_())
            (found.z.sum() + found.loss).backward()
    assert calls["vq_quantize"] == calls["vq_quantize_backward"] == 3 and calls["vq_assign"] == calls["vq_lookup"] == 0


MEMORY = """
import torch
from meditok import ops
torch.set_num_threads(1)
def peak():
    with open("/proc/self/status") as status:  # of this process alone; ru_maxrss remembers the parent's
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
x, codebook = torch.randn(65536, 1, 2).requires_grad_(), torch.randn(1, 32768, 2).requires_grad_()
small = ops.vq_quantize(x[:8], codebook[:, :8])[2].backward()
before = peak()
z, ids, loss, counts = ops.vq_quantize(x, codebook)
(z.sum() + loss).backward()
print(peak() - before)
"""


@needs_core
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_peak_memory_stays_under_its_formula():
    """N = 65,536, K = 32,768: outputs, the packed codebook and 8 (N + K) bytes of norms and 4 (N + K) of order, with
    twice the inputs to spare; a matrix of N x K floats would be 8 GiB."""
    result = run_python(MEMORY)
    assert result.returncode == 0, result.stderr
    rows, codes, width = 65536, 32768, 2
    inputs = 4 * (rows + codes) * width
    outputs = 2 * inputs + 8 * rows + 8 * codes
    packed = native.core.vq_packed_bytes(1, codes, width)
    assert 0 < int(result.stdout) <= outputs + packed + 24 * (rows + codes) + 2 * inputs + (64 << 10) + (1 << 20)
