"""The 8-bit filter of vq_assign (AVX-512 VNNI, cosine) finds the codes of the float64 score, like every other way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meditok import native, ops
from meditok.ops import reference

from .helpers import assert_same_ids, near_ties, quantisation_edges, randn

GROUP_AT, REACH_AT = 64, 48  # csrc/vq/vq.h: where a packed codebook's first group starts, and its int8_reach in it


def uses_int8(codebook: torch.Tensor) -> bool:
    """Whether the packing of the first group holds codes in 8 bits."""
    packed = ops.pack_codebook(codebook).packed.numpy()
    return packed[GROUP_AT + REACH_AT :][:8].view(np.float64)[0] > 0


def check(x: torch.Tensor, codebook: torch.Tensor, what: str = "") -> None:
    assert_same_ids(ops.vq_assign(x, codebook), reference.vq_assign(x, codebook), what)


def clustered(spread: float, members: int, width: int = 8) -> torch.Tensor:
    """(1, K, C): codes around one direction among 3,000 that fill the sphere."""
    around = randn(1, 1, width, seed=1) + spread * randn(1, members, width, seed=2)
    order = torch.randperm(3000 + members, generator=torch.Generator().manual_seed(3))
    return torch.cat([around, randn(1, 3000, width, seed=4)], dim=1)[:, order]


@pytest.mark.skipif(native.isa != "avx512vnni", reason="needs AVX-512 VNNI")
def test_packing_takes_8_bits_where_they_tell_codes_apart():
    """Codes all over the sphere are packed in 8 bits; few, or within a narrow cone, or in 4 columns, they are not."""
    assert uses_int8(randn(1, 4096, 8)) and uses_int8(randn(1, 1024, 32)) and uses_int8(clustered(0.01, 200))
    assert not uses_int8(randn(1, 100, 8)) and not uses_int8(randn(1, 4096, 4))
    assert not uses_int8(randn(1, 4096, 8) + 8.0) and not uses_int8(torch.zeros(1, 4096, 8))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 60),
    groups=st.integers(1, 2),
    codes=st.integers(600, 2600),
    width=st.integers(3, 33),
    copies=st.integers(0, 700),
    seed=st.integers(0, 2**20),
)
def test_any_number_of_codes_and_columns(level, rows, groups, codes, width, copies, seed):
    """Groups of 256 codes partly filled, copies left out, columns that are no multiple of four."""
    x, codebook = randn(rows, groups, width, seed=seed), randn(groups, codes, width, seed=seed + 1)
    codebook[:, codes - min(copies, codes // 2) :] = codebook[:, : min(copies, codes // 2)]
    check(x, codebook)


@pytest.mark.parametrize("codes", [1023, 1024, 1025, 1040, 4096, 4097, 4113, 16384, 16385])
def test_rows_beside_the_code_that_fills_the_last_group(level, codes):
    """What fills a group up is a copy of the first code, and is never an answer of its own."""
    codebook = randn(1, codes, 8, seed=1)
    check(codebook[0, :1] + 0.05 * randn(50, 1, 8), codebook)
    check(codebook[0, -20:, None] + 0.05 * randn(20, 1, 8), codebook)


@pytest.mark.parametrize("width", [3, 4, 5, 7, 8, 9, 12, 16, 17, 20, 24, 31, 32])
@pytest.mark.parametrize("scale", [1.0, 3e-4, 1e12])
def test_rounding_to_8_bits_loses_no_code(level, width, scale):
    """Elements half-way between two 8-bit values, among codes enough for the filter."""
    x, edges = quantisation_edges(width, seed=width, steps=127)
    codebook = torch.cat([edges, randn(1, 3000, width, seed=5)], dim=1)
    check(x, codebook * scale)
    check(x * scale, codebook)


@pytest.mark.parametrize("spread", [0.3, 0.03, 1e-3, 1e-5])
@pytest.mark.parametrize("members", [70, 300, 2000])
def test_rows_with_more_codes_in_the_band_than_are_looked_at(level, spread, members):
    """Rows inside a cluster go on to 16 bits, to float32 and to float64, beside rows that do not."""
    codebook = clustered(spread, members)
    direction = randn(1, 1, 8, seed=1)
    x = torch.cat([direction + spread * randn(40, 1, 8, seed=6), randn(40, 1, 8, seed=7)])
    check(x[torch.randperm(80, generator=torch.Generator().manual_seed(8))], codebook)


@pytest.mark.parametrize("seed", range(4))
def test_near_ties_among_many_codes(level, seed):
    """Codes one or two ulp apart, spread over the groups."""
    x, codebook = near_ties(4000, 8, seed)
    check(x, codebook)
