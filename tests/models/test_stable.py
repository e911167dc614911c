"""Stable mode: no bit of an image's tokens, latents or picture depends on its batch, its place there or the threads."""

from __future__ import annotations

import pytest
import torch

import meditok
from meditok import native
from meditok.ops.linear import VECTOR_LEVELS

from ..ops.helpers import levels_here, run_python

# The published family's shape, small: convolution stages at both ends.
SMALL = {
    "stem_width": 32,
    "stage_widths": (32, 48),
    "stage_depths": (1, 2),
    "width": 192,
    "encoder_depth": 2,
    "decoder_depth": 3,
    "decoder_widths": (48, 32),
    "decoder_depths": (2, 1),
    "expansion": 2,
}
STAGES = "encoder", "quant_proj", "post_quant_proj", "decoder"


def results(model, x: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
    """Tokens and pictures of x, made `batch` at a time, and what every stage gave on the way."""
    seen = {name: [] for name in STAGES}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen[name].append(out))
        for name in STAGES
    ]
    tokens = torch.cat([model.tokenize(part, stable=True) for part in x.split(batch)])
    images = torch.cat([model.detokenize(part, stable=True) for part in tokens.split(batch)])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()} | {"tokens": tokens, "images": images}


def check(model, x: torch.Tensor, batches: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    alone = results(model, x, 1)
    # At the scalar level PyTorch's own products serve, whose sums are cut by the number of threads.
    for threads in (1,) if native.isa == "scalar" else (1, 2):
        torch.set_num_threads(threads)
        for batch in batches:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(batch))
            for name, found in results(model, x[order], batch).items():
                differ = int((found != alone[name][order]).sum())
                assert not differ, f"{name}: {differ} values differ, batch {batch}, {threads} threads"


LEVEL = """
import torch, meditok
from meditok import native
from tests.models.test_stable import SMALL, check
x = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
check(meditok.build("vitamin-small", seed=1, **SMALL), x, (2, 7, 64))
check(meditok.build("tiny", seed=1), x, (2, 7, 64))
print(native.isa)
"""


@pytest.mark.parametrize("level", levels_here())
def test_no_bit_depends_on_batch_position_or_threads(level):
    result = run_python(LEVEL, MEDITOK_ISA=level)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [level]


def test_whole_batches_run_where_rows_do_not_depend_on_each_other():
    """Float32 on vector kernels only: int8 rounds to the range of a batch, and autocast is PyTorch's products."""
    model, x = meditok.build("tiny", seed=1), torch.rand(3, 3, 32, 32) * 2 - 1
    sizes = []
    model.encoder.register_forward_hook(lambda _m, images, _out: sizes.append(len(images[0])))
    for precision in ("fp32", "int8", "bf16"):
        model.precision = precision
        model.tokenize(x, stable=True)
    assert sizes == ([3] if native.isa in VECTOR_LEVELS else [1, 1, 1]) + 6 * [1]
