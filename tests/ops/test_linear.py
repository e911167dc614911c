"""The fused linear layer of inference: every instruction set against float64, and what never changes its rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meditok import native
from meditok.errors import DtypeError, ShapeError
from meditok.ops import reference
from meditok.ops.linear import VECTOR_LEVELS, linear

from .helpers import randn

KINDS = ("none", "gelu", "geglu")


def operands(rows, width, columns, kind="none", norms=0, seed=0):
    """Arguments of `linear` with every part there is."""
    x = randn(rows, width, seed=seed, scale=2)
    weight, bias = randn(columns, width, seed=seed + 1, scale=width**-0.5), randn(columns, seed=seed + 2)
    gate = (randn(columns, width, seed=seed + 3, scale=width**-0.5), randn(columns, seed=seed + 4))
    return (x, weight, bias), dict(
        norms=[(randn(width, seed=seed + 5 + i), randn(width, seed=seed + 7 + i), 1e-6 * 10**i) for i in range(norms)],
        activation="gelu" if kind == "gelu" else "none",
        gate=gate if kind == "geglu" else None,
        residual=randn(rows, columns, seed=seed + 9),
    )


def exact(arguments, options, dtype=torch.float64):
    x, weight, bias = (t.to(dtype) for t in arguments)
    flat = [t.to(dtype) for gain, shift, _ in options["norms"] for t in (gain, shift)]
    gate, gate_bias = (t.to(dtype) for t in options["gate"]) if options["gate"] else (None, None)
    residual = None if options["residual"] is None else options["residual"].to(dtype)
    eps = [e for *_, e in options["norms"]]
    return reference.linear(x, weight, bias, residual, gate, gate_bias, flat, eps, options["activation"])


def assert_close(arguments, options):
    """Error against float64 at most twice PyTorch's own, or a few roundings of the largest value."""
    wanted = exact(arguments, options)
    found, own = linear(*arguments, **options), exact(arguments, options, torch.float32)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    if wanted.numel():
        error, peer = (found - wanted).abs().max(), (own - wanted).abs().max()
        assert error <= max(2 * peer, 1e-6 * wanted.abs().max()), f"{error:.1e} beside {peer:.1e} of PyTorch's"


@pytest.mark.parametrize("norms", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_values_at_the_edges_of_tiles_and_panels(level, kind, norms):
    """Rows around 6, 14, 16 and 32, widths around 16, 32 and 64, columns around 16, 32 and 64; none, one, and more than
    a chunk holds."""
    for shape in [(0, 5, 3), (3, 5, 0), (1, 1, 1), (5, 7, 15), (6, 16, 16), (7, 17, 33), (13, 31, 31), (14, 48, 32)]:
        assert_close(*operands(*shape, kind, norms))
    for shape in [(15, 33, 65), (29, 9, 130), (300, 2100, 5), (16, 32, 64), (17, 65, 33), (33, 64, 31), (47, 96, 97)]:
        assert_close(*operands(*shape, kind, norms))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40), st.integers(1, 70), st.integers(0, 70), st.sampled_from(KINDS), st.integers(0, 2), st.integers()
)
def test_any_shape_equals_the_reference(rows, width, columns, kind, norms, seed):
    assert_close(*operands(rows, width, columns, kind, norms, seed=seed % 1000))


def test_gelu_is_right_over_its_whole_range(level):
    """From -20 to 20 within 2e-7 of max(1, |x|), by both formulas; infinities and NaN as in PyTorch."""
    x = torch.cat([torch.linspace(-20, 20, 40001), torch.tensor([1e30, -1e30, 0.0, torch.inf, torch.nan])])[:, None]
    one, zero = torch.ones(1, 1), torch.zeros(1)
    for found, wanted in (
        (linear(x, one, zero, activation="gelu"), torch.nn.functional.gelu(x.double())),
        (
            linear(x, one, zero, gate=(torch.zeros(1, 1), torch.ones(1))),
            torch.nn.functional.gelu(x.double(), approximate="tanh"),
        ),
    ):
        finite = wanted.isfinite()
        assert (((found - wanted).abs() / x.abs().clamp(min=1))[finite]).max() <= 2e-7
    assert linear(x[-2:], one, zero, activation="gelu").tolist()[0] == [torch.inf]
    assert linear(x[-1:], one, zero, activation="gelu").isnan().all()


def test_values_far_from_one(level):
    """Products of 1e30 and 1e-30, of values near the largest float, and what overflows; none takes others with it."""
    for scale in (1e30, 1e-25):
        (x, weight, bias), options = operands(20, 70, 40)
        options["residual"] = None
        assert_close((x * scale, weight / scale, bias), options)
    x, weight = randn(5, 3), randn(4, 3, seed=1)
    x[1] = torch.tensor([3e38, 1.0, -1.0])
    weight[2] = torch.tensor([1e-38, -torch.inf, 0.0])
    found, wanted = linear(x, weight), torch.nn.functional.linear(x.double(), weight.double()).float()
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_others_who_compute_on_tiles_are_not_disturbed():
    """PyTorch's bfloat16 products, which configure AMX tiles where there are any, before and after ours."""
    half, (arguments, options) = randn(64, 64, dtype=torch.bfloat16), operands(40, 70, 50)
    before = half @ half
    first = linear(*arguments, **options)
    assert torch.equal(half @ half, before) and torch.equal(linear(*arguments, **options), first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_itself_alone(level, kind):
    """Bit for bit: alone, among others, shuffled, for any number of threads."""
    (x, weight, bias), options = operands(61, 40, 70, kind, 2)
    residual, before = options.pop("residual"), torch.get_num_threads()
    together = linear(x, weight, bias, residual=residual, **options)
    order = torch.randperm(61, generator=torch.Generator().manual_seed(1))
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            shuffled = linear(x[order], weight, bias, residual=residual[order], **options)
            assert torch.equal(shuffled, together[order])
            for size in (1, 7, 20):
                parts = zip(x.split(size), residual.split(size), strict=True)
                alone = torch.cat([linear(a, weight, bias, residual=r, **options) for a, r in parts])
                assert torch.equal(alone, together)
    finally:
        torch.set_num_threads(before)


def test_any_strides_and_leading_axes():
    (x, weight, bias), _ = operands(24, 10, 9)
    wanted = linear(x, weight, bias)
    assert torch.equal(linear(x.view(2, 3, 4, 10), weight, bias), wanted.view(2, 3, 4, 9))
    wide = torch.cat([x, x], 1)[:, :10]
    assert not wide.is_contiguous() and torch.equal(linear(wide, weight, bias), wanted)
    assert torch.equal(linear(x.mT.contiguous().mT, weight.mT.contiguous().mT, bias), wanted)
    assert torch.equal(linear(x, weight, bias, residual=torch.ones(9)), wanted + 1)
    assert torch.equal(linear(x, weight), linear(x, weight, torch.zeros(9)))


def test_gradients_are_those_of_pytorch():
    """Where one is wanted PyTorch's functions run; the op itself refuses instead of giving none."""
    arguments, options = operands(5, 6, 4, "geglu", 2)
    arguments = tuple(t.double().requires_grad_() for t in arguments)
    options = {
        "norms": [(g.double().requires_grad_(), s.double(), e) for g, s, e in options["norms"]],
        "gate": tuple(t.double().requires_grad_() for t in options["gate"]),
        "residual": options["residual"].double().requires_grad_(),
    }
    assert torch.autograd.gradcheck(lambda *a: linear(*a, **options), arguments)
    x = randn(3, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match="linear"):
        torch.ops.meditok.linear(x, randn(2, 4), None, None, None, None, [], [], "none").sum().backward()


@pytest.mark.skipif(native.isa not in VECTOR_LEVELS, reason="this machine lacks AVX2, or the core is not built")
def test_the_kernel_runs_for_inference_alone():
    x, weight = randn(3, 4), randn(2, 4).requires_grad_()
    with native.count_calls() as calls:
        linear(x, weight)
        with torch.no_grad():
            linear(x.double(), weight.double())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert linear(x, weight).dtype == torch.bfloat16
    assert calls["linear"] == 0
    with native.count_calls() as calls, torch.no_grad():
        linear(x, weight)
    assert calls["linear"] == 1


def test_opcheck_and_compilation():
    (x, weight, bias), options = operands(6, 5, 4, "geglu", 1)
    gain, shift, eps = options["norms"][0]
    rest = options["residual"], *options["gate"], [gain, shift], [eps], "none"
    torch.library.opcheck(torch.ops.meditok.linear, (x, weight, bias, *rest))
    compiled = torch.compile(lambda a: linear(a, weight, bias, activation="gelu"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), linear(x, weight, bias, activation="gelu"))


def test_bad_input_is_named():
    x, weight = randn(3, 4), randn(2, 4)
    with pytest.raises(ShapeError, match=r"\(3, 4\) and weight \(2, 5\)"):
        linear(x, randn(2, 5))
    with pytest.raises(ShapeError, match="gate"):
        linear(x, weight, gate=(randn(3, 4), None))
    with pytest.raises(ValueError, match="relu"):
        linear(x, weight, activation="relu")
    with pytest.raises(ValueError, match="3 norms"):
        linear(x, weight, norms=[(randn(4), randn(4), 1e-6)] * 3)
    if native.isa in VECTOR_LEVELS:
        with pytest.raises(DtypeError, match="float64"):
            linear(x, weight.double())
