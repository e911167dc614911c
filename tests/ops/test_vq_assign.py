"""vq_assign gives the ids of the canonical float64 score, whatever the input, level, threads or batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meditok import native, ops
from meditok.errors import DtypeError, ShapeError
from meditok.ops import reference

from .helpers import (
    FLOATS,
    METRICS,
    adversarial_codebooks,
    assert_same_ids,
    levels_here,
    near_ties,
    quantisation_edges,
    randn,
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_it_equals_the_one_line_of_pytorch():
    """cosine is the argmax of the normalised product, l2 the argmin of the squared distance."""
    x, codebook = randn(50, 3, 8).double(), randn(3, 64, 8, seed=1).double()
    unit = torch.nn.functional.normalize(codebook, dim=-1)
    assert_same_ids(ops.vq_assign(x, codebook), torch.einsum("ngc,gkc->ngk", x, unit).argmax(-1))
    distance = (x[:, :, None] - codebook).square().sum(-1)
    assert_same_ids(ops.vq_assign(x, codebook, metric="l2"), distance.argmin(-1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 6, 7, 8, 9, 47, 48, 49, 97])
def test_rows_around_the_register_tile(level, metric, rows):
    """Row counts around tile and block edges change nothing."""
    x, codebook = randn(rows, 2, 8), randn(2, 257, 8, seed=1)
    assert_same_ids(ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codes", [0, 1, 31, 32, 33, 127, 128, 129, 255, 1023, 1025, 4099])
def test_codes_around_the_code_tile(level, metric, codes):
    """K need not be a multiple of anything; K = 0 gives -1."""
    x, codebook = randn(13, 1, 4), randn(1, codes, 4, seed=1)
    assert_same_ids(ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 257, 2048])
def test_every_width(level, metric, width):
    """C from 0 to 2,048."""
    x, codebook = randn(9, 2, width), randn(2, 70, width, seed=1)
    assert_same_ids(ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 3e3, 1e-30, 1e30])
def test_every_dtype_and_scale(level, metric, dtype, scale):
    """Inputs are upcast exactly; huge ones (infinite in float16) and tiny ones follow the same rule."""
    x, codebook = randn(40, 2, 8, dtype=dtype, scale=scale), randn(2, 100, 8, seed=1, dtype=dtype)
    assert_same_ids(ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook, metric=metric))
    mixed = codebook.float()
    assert_same_ids(ops.vq_assign(x, mixed, metric=metric), reference.vq_assign(x, mixed, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", adversarial_codebooks(64, 8))
def test_adversarial_codebooks(level, metric, name):
    """Codebooks on which shortcuts fail, met by ordinary, zero and code-equal rows."""
    codebook = adversarial_codebooks(333, 8)[name]
    ordinary = randn(40, 1, 8, seed=3)
    rows = [ordinary, torch.zeros(1, 1, 8), codebook[0, 5:9, None], ordinary * 1e20, ordinary * 1e-20]
    x = torch.cat(rows)
    assert_same_ids(ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook, metric=metric), name)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(5))
def test_near_ties(level, metric, seed):
    """Codes one or two ulp apart, x off the codes: float32 cannot tell them apart, the answer still can."""
    x, codebook = near_ties(200, 8, seed)
    found = ops.vq_assign(x, codebook, metric=metric)
    assert_same_ids(found, reference.vq_assign(x, codebook, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 11, 12, 13, 15, 16, 17, 18, 31, 32])
def test_rounding_to_16_bits_loses_no_code(level, metric, width):
    """Elements half-way between two 16-bit values, and single ones that fill the range, at every width class."""
    x, codebook = quantisation_edges(width, seed=width)
    for scale in (1.0, 3e-4, 1e-13):
        book = codebook * scale
        for rows in (x, x * scale):
            expected = reference.vq_assign(rows, book, metric=metric)
            assert_same_ids(ops.vq_assign(rows, book, metric=metric), expected, f"scale {scale}")


def test_l2_rows_far_longer_than_the_codes_or_shorter(level):
    """x from 2^-30 to 2^40 of the codes' length: outside the 16-bit filter's range others take over."""
    codebook = randn(1, 300, 8, seed=1)
    x = randn(71, 1, 8) * 2.0 ** torch.arange(-30.0, 41.0).view(-1, 1, 1)
    expected = reference.vq_assign(x, codebook, metric="l2")
    assert_same_ids(ops.vq_assign(x, codebook, metric="l2"), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_crowded_codes(level, metric):
    """Hundreds of different codes inside the 16-bit band of every row: float32 and float64 sort them out."""
    direction = randn(1, 1, 8, seed=1)
    for spread in (1e-3, 1e-5, 1e-6):
        codebook = torch.cat([direction + spread * randn(1, 400, 8, seed=2), randn(1, 100, 8, seed=3)], dim=1)
        x = torch.cat([randn(15, 1, 8), direction.view(1, 1, 8) + spread * randn(15, 1, 8, seed=4)])
        assert_same_ids(ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook, metric=metric))


@pytest.mark.parametrize("width", [1, 3, 8, 32, 33])
@pytest.mark.parametrize("spread", [0.2, 1e-2, 1e-4, 1e-7])
def test_cosine_codes_in_a_narrow_cone(level, width, spread):
    """Scores that float32 cannot tell apart near 1: rows in the cone, beside it and opposite, of any length, find their
    code among hundreds, some of them far out in the cone, equal, or one ulp apart."""
    direction = randn(1, 1, width, seed=1)
    tail = randn(1, 700, 1, seed=2).exp()
    codebook = direction + spread * tail * randn(1, 700, width, seed=3)
    codebook[:, 600:650] = codebook[:, :50]
    codebook[:, 650:] = torch.nextafter(codebook[:, 50:100], torch.tensor(torch.inf))
    lengths = 10.0 ** torch.linspace(-30, 30, 100).view(-1, 1, 1)
    near = direction + spread * randn(100, 1, width, seed=4)
    x = torch.cat([near * lengths, -near, randn(50, 1, width, seed=5), codebook[0, ::20, None] * 3, near[:1] * 0])
    for book in (codebook, codebook * 1e-20, torch.cat([codebook, torch.zeros(1, 1, width)], dim=1)):
        assert_same_ids(ops.vq_assign(x, book), reference.vq_assign(x, book))
        assert_same_ids(ops.vq_assign(x.double(), book.double()), reference.vq_assign(x.double(), book.double()))


@pytest.mark.skipif(native.backend != "native", reason="the compiled core does not run")
def test_every_row_of_a_block_may_take_another_path(level):
    """Rows for the 16-bit filter, for float32, for the float64 loop and for none, side by side, keep their ids."""
    x = randn(200, 2, 8)
    x[::5] *= 1e30
    x[1::7] = torch.nan
    x[2::9] = 0.0
    x = x.double()
    x[3::11] *= 1e-200
    codebook = randn(2, 130, 8, seed=1)
    for metric in METRICS:
        assert_same_ids(ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook, metric=metric))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 40),
    groups=st.integers(1, 3),
    codes=st.integers(1, 300),
    width=st.integers(1, 40),
    metric=st.sampled_from(METRICS),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    whole=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape_dtype_and_grid_of_values(level, rows, groups, codes, width, metric, dtypes, whole, seed):
    """Random shapes; small integers make exact ties frequent, of which the lowest id wins."""
    x, codebook = randn(rows, groups, width, seed=seed), randn(groups, codes, width, seed=seed + 1)
    if whole:
        x, codebook = x.round(), codebook.round()
    x, codebook = x.to(dtypes[0]), codebook.to(dtypes[1])
    assert_same_ids(ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
def test_any_strides(level, metric):
    """Transposed, expanded, sliced and offset views are read as they lie."""
    base = randn(3, 8, 40, seed=1)
    views = [base.permute(2, 0, 1), base.permute(2, 0, 1)[::2], base.permute(2, 0, 1)[5:7]]
    views += [randn(1, 3, 8).expand(9, 3, 8), randn(20, 6, 16)[:, ::2, 3:11]]
    codebook = randn(8, 60, 3, seed=2).permute(2, 1, 0)[:, 1::2]
    for x in views:
        expected = reference.vq_assign(x.contiguous(), codebook.contiguous(), metric=metric)
        assert_same_ids(ops.vq_assign(x, codebook, metric=metric), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_infinite_rows_get_no_id(level, metric):
    """A row of x with a NaN or infinity gets -1; the others are not touched by it."""
    x, codebook = randn(20, 2, 8), randn(2, 50, 8, seed=1)
    expected = ops.vq_assign(x, codebook, metric=metric)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[7, 1, 3] = value
        expected_now = expected.clone()
        expected_now[7, 1] = -1
        assert_same_ids(ops.vq_assign(broken, codebook, metric=metric), expected_now)


@pytest.mark.parametrize("metric", METRICS)
def test_threads_batches_and_levels_change_no_id(threads, metric):
    """1, 2 and 3 threads, every level, and any split of the batch give the same ids."""
    x, (tied, codebook) = randn(700, 1, 8), near_ties(1000, 8, 3)
    x = torch.cat([x, tied.repeat(3, 1, 1)])
    expected = reference.vq_assign(x, codebook, metric=metric)
    for level in levels_here() or [""]:
        if level:
            native.core.choose_isa(level)
        for count in (1, 2, 3):
            threads(count)
            assert_same_ids(ops.vq_assign(x, codebook, metric=metric), expected, f"{level}, {count} threads")
        parts = [ops.vq_assign(part, codebook, metric=metric) for part in x.split(37)]
        assert_same_ids(torch.cat(parts), expected, f"{level}, split")
    if native.core is not None:
        native.core.choose_isa(native.isa or "")


def test_flushed_subnormals_change_no_id():
    """torch.set_flush_denormal of the caller does not reach the scores."""
    x, codebook = randn(30, 1, 8) * 1e-39, randn(1, 40, 8, seed=1)
    expected = reference.vq_assign(x, codebook)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        found = ops.vq_assign(x, codebook)
    finally:
        torch.set_flush_denormal(False)
    if native.backend == "native":
        assert_same_ids(found, expected)


@pytest.mark.parametrize("metric", METRICS)
def test_a_packed_codebook_changes_only_the_time(level, metric):
    """pack_codebook is accepted where a codebook is and gives the same ids; another metric is refused."""
    x, codebook = randn(20, 2, 8), randn(2, 100, 8, seed=1)
    packed = ops.pack_codebook(codebook, metric=metric)
    assert_same_ids(ops.vq_assign(x, packed, metric=metric), ops.vq_assign(x, codebook, metric=metric))
    other = "l2" if metric == "cosine" else "cosine"
    with pytest.raises(ValueError, match="packed for metric"):
        ops.vq_assign(x, packed, metric=other)


@pytest.mark.skipif(native.backend != "native", reason="the compiled core does not run")
def test_the_core_refuses_a_packing_of_another_codebook():
    """A packed codebook of another shape is an error, not a wrong answer."""
    packed = ops.pack_codebook(randn(1, 64, 8))
    with pytest.raises(ValueError, match="another codebook"):
        torch.ops.meditok.vq_assign(randn(3, 1, 8), randn(1, 60, 8), packed.packed)


def test_wrong_shapes_and_dtypes_are_named():
    """Each error is one line with the offending shape or dtype."""
    x, codebook = randn(4, 2, 8), randn(2, 10, 8)
    with pytest.raises(ShapeError, match=r"\(4, 8\)"):
        ops.vq_assign(x[:, 0], codebook)
    with pytest.raises(ShapeError, match=r"\(3, 10, 8\)"):
        ops.vq_assign(x, randn(3, 10, 8))
    with pytest.raises(DtypeError, match="int64"):
        ops.vq_assign(x.long(), codebook)
    with pytest.raises(ValueError, match="metric='dot'"):
        ops.vq_assign(x, codebook, metric="dot")
    with pytest.raises(TypeError, match="one kind"):
        ops.vq_assign(x.numpy(), codebook)
    with pytest.raises(ShapeError, match="x on cpu, codebook on meta"):
        ops.vq_assign(x, codebook.to("meta"))
