"""The Hopper kernel of csrc/attention, run on the CPU by fibers; what it does not take goes to the general one."""

from __future__ import annotations

import ctypes
import re

import pytest

from .cuda_attention import DTYPES, ROUNDING, Run, assert_near, check, expected_of
from .helpers import assert_same_bits, randn


@pytest.fixture
def hopper(attention_kernels):
    """The emulated kernels on 9.0, where 16-bit types have a kernel of their own; calls of it are counted from 0."""
    attention_kernels.set_device(90, 227 * 1024, 2)
    attention_kernels.hopper_barriers()
    yield attention_kernels
    attention_kernels.set_backwards(0)


HALVES = pytest.mark.parametrize("name", ["fp16", "bf16"])


@HALVES
def test_the_hopper_kernel_equals_the_reference(hopper, name):
    """wgmma on swizzled boxes: edges of boxes and widths, causal, several tiles a warpgroup and blocks a head."""
    for multiprocessors, shape, kind in [
        (1, (2, 2, 64, 64, 64), None),
        (1, (1, 1, 1, 1, 8), None),
        (1, (1, 2, 65, 130, 64), "causal"),
        (1, (1, 1, 200, 129, 40), "causal"),
        (3, (1, 1, 260, 70, 24), None),
        (99, (1, 1, 260, 260, 64), "causal"),
    ]:
        hopper.set_device(90, 227 * 1024, multiprocessors)
        check(hopper, name, shape, kind, backward=False)
        assert hopper.hopper_barriers() > 0, "another kernel ran"
    check(hopper, name, (1, 1, 33, 70, 16), scale=-0.3, backward=False)


@HALVES
def test_the_hopper_kernel_and_the_general_one_agree(hopper, name):
    """Packed projections and rows of separate arrays: the same sums in the same order, to rounding."""
    dtype = DTYPES[name]
    qkv = randn(2, 70, 3, 2, 64, dtype=dtype)
    packed = [part.transpose(1, 2) for part in qkv.unbind(2)]
    separate = [randn(2, 2, 70, 64, seed=seed, dtype=dtype) for seed in range(3)]
    for arrays in (packed, separate):
        hopper.set_device(90, 227 * 1024, 2)
        first = Run(hopper, name, *arrays, kind="causal")
        assert hopper.hopper_barriers() > 0
        hopper.set_device(80, 163 * 1024, 2)
        second = Run(hopper, name, *arrays, kind="causal")
        assert hopper.hopper_barriers() == 0
        assert_near(first.out, second.out.double(), ROUNDING[name], "out")
        assert_near(first.lse, second.lse.double(), ROUNDING["fp32"], "lse")


@HALVES
def test_what_the_copy_engine_does_not_take_goes_to_the_general_kernel(hopper, name):
    """Columns apart, rows at odd addresses, overlapping heads, too many keys, masks: right, by other means."""
    dtype, rounding = DTYPES[name], ROUNDING[name]
    plain = [randn(1, 2, 20, 16, seed=seed, dtype=dtype) for seed in range(3)]
    apart = randn(1, 2, 20, 32, seed=4, dtype=dtype)[..., ::2]
    odd = randn(1 + 2 * 20 * 16, seed=5, dtype=dtype)[1:].view(1, 2, 20, 16)
    expanded = randn(1, 1, 20, 16, seed=6, dtype=dtype).expand(1, 2, 20, 16)
    for k in (apart, odd, expanded):
        run = Run(hopper, name, plain[0], k, plain[2])
        assert_near(run.out, expected_of(plain[0], k, plain[2])[0], 3 * rounding, "by other means")
    check(hopper, name, (1, 1, 3, 900, 8), backward=False)
    check(hopper, name, (1, 1, 20, 30, 16), "bool", backward=False)
    check(hopper, name, (1, 2, 20, 20, 16), mean=True, backward=False)
    assert hopper.hopper_barriers() == 0


@HALVES
def test_the_hopper_kernel_does_not_depend_on_the_order_of_threads(hopper, name):
    """As above, for its barriers; one and two blocks of a head."""
    q, k, v = (randn(1, 1, 260, 64, seed=seed, dtype=DTYPES[name]) for seed in range(3))
    found = []
    for backwards, multiprocessors in ((0, 1), (1, 1), (1, 99)):
        hopper.set_backwards(backwards)
        hopper.set_device(90, 227 * 1024, multiprocessors)
        run = Run(hopper, name, q, k, v, kind="causal")
        found.append((run.out, run.lse))
    for out, lse in found[1:]:
        assert_same_bits(out, found[0][0])
        assert_same_bits(lse, found[0][1])


def test_boxes_are_described_as_triton_describes_them(attention_kernels):
    """An independent compiler emits for the same two products the descriptors, steps and operand orders that the Hopper
    kernel uses and its emulation reads."""
    pytest.importorskip("triton", reason="triton is not installed with this torch")
    from .triton_attention import hopper_ptx

    ptx = hopper_ptx()
    describe = attention_kernels.describe_box
    describe.restype = ctypes.c_uint64
    first = describe(0)
    found = {int(number) - first for number in re.findall(r"4611686\d{12}", ptx)}
    along, across = ([describe(step * size) - first for step in range(4)] for size in (32, 2048))
    assert found == {*along, *across} and len(found) == 7
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32\.f16\.f16 (.*);", ptx)
    assert [re.search(r"(\}?), %rd\d+, \S+ (1, 1.*)$", product).groups() for product in products] == [
        *[("", "1, 1, 0, 0")] * 4,
        *[("}", "1, 1, 1")] * 4,
    ]
