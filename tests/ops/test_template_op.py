"""The do-nothing op that new ops are copied from compiles, dispatches and does nothing."""

from __future__ import annotations

import pytest
import torch

from meditok import native

from .helpers import levels_here, randn


@pytest.mark.skipif(native.backend != "native", reason="the compiled core does not run")
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 20_000])
def test_the_template_op_copies(size):
    """Every level and thread count, contiguous and strided."""
    x = randn(2 * size)
    for level in levels_here():
        native.core.choose_isa(level)
        for stride, threads in ((1, 1), (2, 2)):
            out = torch.empty(size)
            with native.count_calls() as calls:
                native.core.template_op(x.data_ptr(), size, stride, out.data_ptr(), threads)
            assert calls["template_op"] == 1
            assert torch.equal(out, x[: size * stride : stride])
    native.core.choose_isa(native.isa or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [0, 1, 255, 20_000])
def test_the_template_op_copies_on_a_gpu(size):
    x = randn(2 * size).cuda()
    out = torch.empty(size, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    native.core.template_op_cuda(x.data_ptr(), size, 2, out.data_ptr(), x.device.index, stream)
    assert torch.equal(out, x[::2])
