"""The work of a step is counted also where our own ops do it."""

from __future__ import annotations

import pytest
import torch

from meditok import ops
from meditok.train.speed import Speed

B, N, H, D = 2, 16, 3, 8
PAIRS = B * H * N * N * D


def attention() -> int:
    q, k, v = (torch.randn(B, H, N, D, requires_grad=True) for _ in range(3))
    ops.attention(q, k, v).sum().backward()
    return 14 * PAIRS  # two products there, five back


def attention_qkv() -> int:
    ops.attention_qkv(torch.randn(B, N, 3, H, D, requires_grad=True)).sum().backward()
    return 14 * PAIRS


def product() -> int:
    torch.randn(4, 5) @ torch.randn(5, 6)
    return 2 * 4 * 5 * 6


def search() -> int:
    ops.vq_assign(torch.randn(10, 2, 8), torch.randn(2, 16, 8))
    return 2 * 10 * 2 * 16 * 8


@pytest.mark.parametrize("work", [attention, attention_qkv, product, search])
def test_the_work_of_a_step_is_counted(work):
    speed = Speed(torch.device("cpu"), "fp32", 1)
    with speed.step():
        expected = work()
    assert speed.flops == expected
    with speed.step():  # counted once
        work()
    assert speed.flops == expected and speed.rates()["share_of_peak"] > 0


def test_the_work_is_counted_again_once_other_losses_take_part():
    speed = Speed(torch.device("cpu"), "fp32", 1)
    with speed.step():
        product()
    speed.saw(frozenset({"l1"}))
    with speed.step():
        search()
    assert speed.flops == 2 * 4 * 5 * 6
    speed.saw(frozenset({"l1", "hinge"}))
    with speed.step():
        search()
    assert speed.flops == 2 * 10 * 2 * 16 * 8
