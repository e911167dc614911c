"""The entropy regulariser: blocks of rows against one dense float64 computation."""

from __future__ import annotations

import pytest
import torch

from meditok import ops
from meditok.errors import DtypeError, ShapeError
from meditok.ops import entropy, reference

from ..ops.helpers import METRICS, randn, run_python
from ..readers.memory import PEAK_GIB


def inputs(dtype: torch.dtype, rows: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(rows, 3, 8, dtype=dtype).requires_grad_(), randn(3, 20, 8, seed=1, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_value_and_gradients_equal_the_dense_float64_reference(dtype, tolerance, metric, masked, monkeypatch):
    """Blocks of 7 rows, the last one shorter; gradients to x and codebook relative to their largest entry."""
    monkeypatch.setattr(entropy, "BLOCK_SCORES", 7 * 20)
    mask = torch.arange(50) % 3 > 0 if masked else None
    x, codebook = inputs(dtype)
    settings = dict(temperature=0.1, metric=metric, mask=mask)
    loss = ops.vq_entropy(x, codebook, **settings)
    found = torch.autograd.grad(loss, (x, codebook))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, codebook)]
    expected_loss = reference.vq_entropy(*exact, **settings)
    assert abs(loss.item() - expected_loss.item()) <= min(tolerance, 1e-6)
    for a, b in zip(found, torch.autograd.grad(expected_loss, exact), strict=True):
        assert a.dtype == dtype and (a - b).abs().max() <= tolerance * b.abs().max()


def test_the_published_temperature_is_the_default_and_the_term_lies_between_minus_log_k_and_0():
    """Rows on the codes, each code equally often: every row is sure, the use is even, the term is -log K."""
    codebook = torch.eye(8)[None]
    assert ops.vq_entropy(codebook.transpose(0, 1), codebook).item() == pytest.approx(-torch.tensor(8.0).log().item())
    one_code = codebook[:, :1].expand(8, 1, 8)
    assert ops.vq_entropy(one_code, codebook).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_opcheck(metric):
    """Schema, fake, autograd registration and dynamic-shape compilation of both passes."""
    x, codebook = inputs(torch.float32)
    settings = dict(temperature=0.1, metric=metric)
    mask = torch.arange(50) > 3
    torch.library.opcheck(torch.ops.meditok.vq_entropy, (x, codebook, mask), settings)
    _, share = torch.ops.meditok.vq_entropy(x, codebook, mask, **settings)
    backward = (torch.ones(()), x.detach(), codebook.detach(), share, mask)
    torch.library.opcheck(torch.ops.meditok.vq_entropy_backward, backward, settings)


def test_compiled_and_autocast_results_are_the_same_bits():
    """fullgraph=True, and a bfloat16 autocast around the call, change neither the value nor the gradient."""
    x, codebook = inputs(torch.float32)

    def step(x, codebook):
        return ops.vq_entropy(x, codebook)

    expected = step(x, codebook)
    gradient = torch.autograd.grad(expected, (x, codebook))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, codebook)
    assert torch.equal(compiled, expected)
    with torch.autocast("cpu", torch.bfloat16):
        cast = step(x, codebook)
        again = torch.autograd.grad(cast, (x, codebook))
    assert torch.equal(cast, expected) and all(map(torch.equal, gradient, again))


def test_no_rows_or_none_left_by_the_mask_give_zero_and_no_gradient():
    """NaN in masked rows stays out as well."""
    for rows, mask in ((0, None), (5, torch.zeros(5, dtype=torch.bool))):
        x, codebook = inputs(torch.float32, rows)
        loss = ops.vq_entropy(x * torch.nan, codebook, mask=mask)
        loss.backward()
        assert loss.item() == 0 and not codebook.grad.any()


def test_what_does_not_fit_is_refused():
    x, codebook = inputs(torch.float32)
    with pytest.raises(DtypeError, match="one dtype"):
        ops.vq_entropy(x.double(), codebook)
    with pytest.raises(ShapeError, match="mask"):
        ops.vq_entropy(x, codebook, mask=torch.ones(49, dtype=torch.bool))
    with pytest.raises(ValueError, match="temperature=0"):
        ops.vq_entropy(x, codebook, temperature=0)


def test_memory_stays_at_the_blocks():
    """Forward and backward over 8,192 x 4,096 probabilities need less than half of one array of them, 128 MiB."""
    code = PEAK_GIB + (
        "import torch\nfrom meditok import ops\n"
        "def run(rows):\n"
        "    x, codebook = torch.randn(rows, 1, 8, requires_grad=True), torch.randn(1, 4096, 8, requires_grad=True)\n"
        "    ops.vq_entropy(x, codebook).backward()\n"
        "run(512)\nbefore = peak_gib()\nrun(8192)\nprint(peak_gib() - before)\n"
    )
    done = run_python(code)
    assert float(done.stdout) < 0.0625, done.stderr
