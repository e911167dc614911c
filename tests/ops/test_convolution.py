"""Depthwise convolution with GELU and the passes around upsampling, on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meditok import native
from meditok.errors import DtypeError, ShapeError
from meditok.ops import reference
from meditok.ops.convolution import depthwise_gelu, upsample_differences, upsample_gather
from meditok.ops.linear import VECTOR_LEVELS

from .helpers import randn


def depthwise_operands(batch, h, w, channels, seed=0):
    x = randn(batch, h, w, channels, seed=seed, scale=2)
    return x, randn(channels, 1, 3, 3, seed=seed + 1), randn(channels, seed=seed + 2)


def gather_operands(batch, h, w, width, seed=0):
    parts = [
        randn(batch, *size, k * width, seed=seed + i)
        for i, (size, k) in enumerate((((h, w), 1), ((h + 1, w), 2), ((h, w + 1), 2), ((h + 1, w + 1), 4)))
    ]
    return parts, (randn(width, seed=seed + 5), randn(width, seed=seed + 6), 1e-6)


def double(tensors):
    return [t.double() for t in tensors]


def assert_close(found, wanted, own):
    """Error against float64 at most twice PyTorch's own, or a few roundings of the largest value."""
    assert found.shape == wanted.shape and found.dtype == torch.float32
    if wanted.numel():
        error, peer = (found - wanted).abs().max(), (own - wanted).abs().max()
        assert error <= max(2 * peer, 1e-6 * wanted.abs().max()), f"{error:.1e} beside {peer:.1e} of PyTorch's"


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "shape", [(0, 3, 3, 4), (1, 1, 1, 1), (2, 5, 4, 7), (1, 3, 6, 16), (2, 4, 3, 33), (1, 7, 7, 9)]
)
def test_depthwise_equals_convolution_and_gelu(level, shape, stride):
    arguments = depthwise_operands(*shape)
    wanted = reference.depthwise_gelu(*double(arguments), stride)
    assert_close(depthwise_gelu(*arguments, stride), wanted, reference.depthwise_gelu(*arguments, stride))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "shape", [(0, 3, 3, 4), (1, 1, 1, 1), (2, 5, 4, 7), (1, 3, 6, 16), (2, 2, 3, 33), (1, 1, 4, 8)]
)
def test_gathering_equals_its_four_sums_norm_and_gelu(level, shape, normed):
    parts, norm = gather_operands(*shape)
    gain, bias, eps = norm
    exact = reference.upsample_gather(*double(parts), *(double((gain, bias)) if normed else (None, None)), eps)
    own = reference.upsample_gather(*parts, *((gain, bias) if normed else (None, None)), eps)
    assert_close(upsample_gather(*parts, norm if normed else None), exact, own)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), *[st.integers(1, 5)] * 2, st.integers(0, 40), st.integers(0, 99))
def test_differences_are_those_of_the_padded_map(batch, h, w, channels, seed):
    """Bit for bit."""
    x = randn(batch, h, w, channels, seed=seed)
    for found, wanted in zip(upsample_differences(x), reference.upsample_differences(x), strict=True):
        assert torch.equal(found, wanted)


def test_differences_on_every_level(level):
    x = randn(2, 3, 5, 19)
    for found, wanted in zip(upsample_differences(x), reference.upsample_differences(x), strict=True):
        assert torch.equal(found, wanted)


def test_an_image_depends_on_itself_alone(level):
    """Bit for bit, whatever the batch and the number of threads."""
    x, weight, bias = depthwise_operands(5, 4, 6, 21)
    parts, norm = gather_operands(5, 3, 4, 21)
    before = torch.get_num_threads()
    together = depthwise_gelu(x, weight, bias), upsample_gather(*parts, norm)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for i in range(5):
                one = slice(i, i + 1)
                assert torch.equal(depthwise_gelu(x[one], weight, bias), together[0][one])
                assert torch.equal(upsample_gather(*(part[one] for part in parts), norm), together[1][one])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(native.isa not in VECTOR_LEVELS, reason="this machine lacks AVX2, or the core is not built")
def test_kernels_serve_inference_and_pytorch_serves_gradients():
    x, weight, bias = depthwise_operands(1, 3, 4, 5)
    with native.count_calls() as calls:
        depthwise_gelu(x, weight, bias)
        upsample_differences(x)
        upsample_gather(*gather_operands(1, 2, 3, 4)[0])
    assert [calls[name] for name in ("depthwise", "upsample_differences", "upsample_gather")] == [1, 1, 1]
    with native.count_calls() as calls:
        assert torch.autograd.gradcheck(depthwise_gelu, tuple(t.double().requires_grad_() for t in (x, weight, bias)))
        depthwise_gelu(x, weight.requires_grad_(), bias).sum().backward()
    assert calls["depthwise"] == 0 and weight.grad.abs().sum() > 0
    for op, arguments in (("depthwise_gelu", (x, weight, bias)), ("upsample_differences", (x.requires_grad_(),))):
        out = getattr(torch.ops.meditok, op)(*arguments)
        with pytest.raises(NotImplementedError, match=op):
            (out[0] if isinstance(out, tuple) else out).sum().backward()


def test_opcheck_and_compilation():
    arguments = depthwise_operands(2, 3, 5, 4)
    torch.library.opcheck(torch.ops.meditok.depthwise_gelu, (*arguments, 2))
    parts, norm = gather_operands(2, 3, 4, 5)
    torch.library.opcheck(torch.ops.meditok.upsample_gather, (*parts, *norm))
    torch.library.opcheck(torch.ops.meditok.upsample_differences, (arguments[0],))
    compiled = torch.compile(lambda a: depthwise_gelu(a, *arguments[1:]), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments[0]), depthwise_gelu(*arguments))


def test_bad_input_is_named():
    x, weight, bias = depthwise_operands(1, 3, 4, 5)
    with pytest.raises(ShapeError, match=r"\(1, 3, 4, 5\), weight \(5, 1, 3, 3\) and stride is 3"):
        depthwise_gelu(x, weight, bias, 3)
    with pytest.raises(ShapeError, match="level"):
        upsample_gather(*[randn(1, 2, 3, 4)] * 4)
    if native.isa in VECTOR_LEVELS:
        with pytest.raises(DtypeError, match="float64"):
            depthwise_gelu(x, weight.double(), bias)
