"""Upsampling convolutions on the small map against nearest-neighbour doubling and a dense convolution."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meditok.nn.upsample import Upsample, four, four_kernels, nine, nine_kernels

from ..ops.helpers import randn

FORMS = {"nine": (nine_kernels, nine), "four": (four_kernels, four)}


def naive(x, weight, bias):
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


def run(form, x, weight, bias):
    fold, apply = FORMS[form]
    return apply(x.permute(0, 2, 3, 1), fold(weight), bias).permute(0, 3, 1, 2)


def operands(batch, in_width, out_width, h, w, dtype=torch.float64, seed=0):
    return (
        randn(batch, in_width, h, w, seed=seed, dtype=dtype),
        randn(out_width, in_width, 3, 3, seed=seed + 1, dtype=dtype),
        randn(out_width, seed=seed + 2, dtype=dtype),
    )


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99)
)
def test_any_shape_equals_the_naive_form_in_float64(form, batch, in_width, out_width, h, w, seed):
    """Borders, single rows and columns, and empty batches included."""
    arguments = operands(batch, in_width, out_width, h, w, seed=seed)
    torch.testing.assert_close(run(form, *arguments), naive(*arguments), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_input_weight_and_bias_are_right(form):
    arguments = tuple(a.requires_grad_() for a in operands(2, 2, 3, 3, 2))
    assert torch.autograd.gradcheck(lambda *a: run(form, *a), arguments)
    wanted = torch.autograd.grad(naive(*arguments).square().sum(), arguments)
    found = torch.autograd.grad(run(form, *arguments).square().sum(), arguments)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_float32_errs_no_more_than_twice_the_dense_convolution():
    arguments = operands(1, 64, 32, 9, 7, torch.float32)
    exact = naive(*(a.double() for a in arguments))
    error, dense = ((f(*arguments).double() - exact).abs().max() for f in (lambda *a: run("nine", *a), naive))
    assert error <= 2 * dense


def test_bfloat16_takes_the_four_kernels_and_errs_no_more_than_twice_the_dense_convolution():
    module, x = Upsample(64, 32), randn(1, 64, 9, 7)
    with torch.no_grad():
        exact = naive(x.double(), module.conv.weight.double(), module.conv.bias.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, dense = module(x), naive(x, module.conv.weight, module.conv.bias)
    assert found.dtype == torch.bfloat16 and module._folded[0][0] is four_kernels
    assert (found.double() - exact).abs().max() <= 2 * (dense.double() - exact).abs().max()


@torch.no_grad()
def test_the_folded_weight_is_kept_until_the_weight_changes():
    """In place, by loading (copied or assigned), by a cast and back, and in a copy of the module."""
    module, x = Upsample(3, 4), randn(1, 3, 4, 4)

    def right(m):
        torch.testing.assert_close(m(x), naive(x, m.conv.weight, m.conv.bias), rtol=1e-5, atol=1e-5)

    right(module)
    kept = module._folded[1]
    module(x)
    assert module._folded[1] is kept
    module.conv.weight.mul_(-2)
    right(module)
    state = {key: randn(*value.shape, seed=5) for key, value in module.state_dict().items()}
    assert set(state) == {"conv.weight", "conv.bias"}
    module.load_state_dict(state)
    right(module)
    module.load_state_dict({key: value + 1 for key, value in state.items()}, assign=True)
    right(module)
    right(module.half().float())
    other = copy.deepcopy(module)
    other.conv.weight.add_(1)
    right(other)
    right(module)


OPTIMISERS = [(torch.optim.SGD, {}), (torch.optim.AdamW, {"fused": True}), (torch.optim.AdamW, {"foreach": True})]


@pytest.mark.parametrize("optimiser, settings", OPTIMISERS)
def test_a_step_of_training_moves_what_evaluation_uses(optimiser, settings):
    """Also a step that no version of a tensor shows, and also in evaluation mode."""
    module, x = Upsample(3, 4), randn(2, 3, 4, 4)
    with torch.no_grad():
        before = module(x)
    optimiser = optimiser(module.parameters(), 0.1, **settings)
    module(x).square().mean().backward()
    optimiser.step()
    with torch.no_grad():
        after = module(x)
        torch.testing.assert_close(after, naive(x, module.conv.weight, module.conv.bias), rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, after)


def test_inference_mode_weights_are_followed():
    with torch.inference_mode():
        module, x = Upsample(2, 2), randn(1, 2, 3, 3)
        for _ in range(2):
            torch.testing.assert_close(module(x), naive(x, module.conv.weight, module.conv.bias), rtol=1e-5, atol=1e-5)
            module.conv.weight.add_(1)


def test_it_compiles_without_a_graph_break_and_keeps_channels_last():
    module, x = Upsample(3, 4), randn(2, 3, 4, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, module(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    assert module.conv.weight.grad.abs().sum() > 0
