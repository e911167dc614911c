"""vq_assign for wide rows (more than 32 columns): the blocked product gives the canonical ids."""

from __future__ import annotations

import pytest
import torch

from meditok import ops
from meditok.ops import reference

from .helpers import (
    FLOATS,
    METRICS,
    adversarial_codebooks,
    assert_same_ids,
    has_native,
    levels_here,
    near_ties,
    quantisation_edges,
    randn,
    run_python,
)


def check(x: torch.Tensor, codebook: torch.Tensor, metric: str, what: str = "") -> None:
    found = ops.vq_assign(x, codebook, metric=metric)
    assert_same_ids(found, reference.vq_assign(x, codebook, metric=metric), f"{what} {metric}")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [33, 64, 191, 193, 385])
def test_shapes_around_the_tile_edges(width, metric):
    """Rows around the register tiles and the block of rows, codes around tiles of 32 and blocks of 128, columns
    around the pieces of 160 and 192."""
    for rows, codes in [(1, 1), (2, 31), (3, 33), (4, 127), (13, 129), (97, 160), (0, 5), (2, 0)]:
        check(randn(rows, 2, width, seed=rows), randn(2, codes, width, seed=codes), metric, f"{rows} {codes}")


@pytest.mark.parametrize("metric", METRICS)
def test_the_published_widths(metric):
    """K = 512 codes of 768 and 1,536 columns, and a width that no power of two divides."""
    for width in (768, 1536, 2047):
        check(randn(5, 1, width), randn(1, 512, width, seed=1), metric, str(width))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", adversarial_codebooks(8, 40))
def test_adversarial_codebooks(name, metric):
    """Zero, equal, outlying, dead, NaN and infinite codes; zero, huge, tiny, NaN and infinite rows."""
    ordinary = randn(6, 1, 40, seed=3)
    bad = torch.zeros(3, 1, 40)
    bad[1, 0, 7], bad[2, 0, 39] = torch.nan, -torch.inf
    x = torch.cat([ordinary, bad, ordinary * 1e20, ordinary * 1e-30, ordinary * 1e-42])
    check(x, adversarial_codebooks(300, 40)[name], metric, name)


@pytest.mark.parametrize("metric", METRICS)
def test_more_near_ties_than_a_row_can_hold(metric):
    """Hundreds of codes within one or two ulp: those held are scored when there is no room for another, and the
    first best wins."""
    for seed in range(3):
        check(*near_ties(300, 48, seed), metric, "near ties")
    base = randn(1, 1, 64)
    step = (torch.arange(200) % 7).view(1, 200, 1) * torch.finfo(torch.float32).eps
    check(randn(20, 1, 64, seed=1), base * (1 + step), metric, "multiples")


@pytest.mark.parametrize("metric", METRICS)
def test_codes_that_sixteen_bits_cannot_tell_apart(metric):
    """Steps of quantisation; families of 20 codes closer than a filter of 16 bits sees, which leave the rest of the
    codebook useful or useless to it; rows beyond its range; widths up to its last and one more."""
    for width in (40, 321):
        check(*quantisation_edges(width, seed=width), metric, f"edges {width}")
    for width in (64, 2047, 2048, 2049):
        family = randn(1, 15, width).repeat_interleave(20, 1)
        for step in (3e-6, 3e-4):
            codebook = family + step * randn(1, 300, width, seed=1)
            x = randn(20, 1, width, seed=2)
            for scale in (1.0, 1e3, 3e4):
                check(x * scale, codebook, metric, f"families {width} {step} {scale}")
            check(x, codebook + 2, metric, f"far {width} {step}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_types_and_strides(dtype):
    """Each type, read through any strides: transposed, reversed groups, expanded, sliced."""
    x, codebook = randn(3, 40, 50, dtype=dtype).permute(1, 0, 2), randn(3, 60, 100, seed=1, dtype=dtype)[:, :, ::2]
    for metric in METRICS:
        check(x, codebook, metric)
        check(x[:, :, :1].expand(-1, -1, 50), codebook, metric)
        check(x.double()[:, ::2], codebook.flip(0)[:2], metric)


def test_small_integers_give_the_canonical_ids_with_ties():
    """Integer rows and codes: every sum is exact, many codes tie, the lowest id wins."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (70, 1, 48), generator=generator).float()
    codebook = torch.randint(-1, 2, (1, 400, 48), generator=generator).float()
    expected = (x.long() - codebook.long()).square().sum(-1).argmin(-1, keepdim=True)
    assert_same_ids(ops.vq_assign(x, codebook, metric="l2"), expected)


@pytest.mark.skipif(not has_native(), reason="the compiled core does not run")
def test_threads_and_batches_change_no_id():
    """1, 2 and 3 threads, and each row by itself."""
    x, codebook = randn(200, 2, 96), randn(2, 300, 96, seed=1)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(ops.vq_assign(x, codebook, metric="l2"))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    rows = torch.cat([ops.vq_assign(row[None], codebook, metric="l2") for row in x[:20]])
    assert torch.equal(rows, found[0][:20])


LEVEL = """
import torch
from meditok import ops
from meditok.ops import reference
generator = torch.Generator().manual_seed(5)
for rows, codes, width in ((100, 300, 40), (7, 129, 193), (100, 512, 768)):
    x, codebook = torch.randn(rows, 1, width, generator=generator), torch.randn(1, codes, width, generator=generator)
    for metric in ("cosine", "l2"):
        found = ops.vq_assign(x, codebook, metric=metric)
        assert torch.equal(found, reference.vq_assign(x, codebook, metric=metric))
print("same")
"""


@pytest.mark.parametrize("level", levels_here())
def test_each_level(level):
    """Every instruction set of this machine, in a fresh interpreter; test_levels.py emulates AVX-512."""
    result = run_python(LEVEL, MEDITOK_ISA=level)
    assert result.stdout.strip() == "same", result.stderr
