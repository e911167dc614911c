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
            native.core.template_op(x.data_ptr(), size, stride, out.data_ptr(), threads)
            assert torch.equal(out, x[: size * stride : stride])
    native.core.choose_isa(native.isa or "")
