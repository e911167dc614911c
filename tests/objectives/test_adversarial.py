"""Adversarial terms, the adaptive weight and the schedules against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from meditok.objectives.adversarial import (
    adaptive_weight,
    balanced_consistency,
    fade,
    hinge_discriminator,
    hinge_generator,
    ramp,
    settle,
)


def test_hinge_losses_written_out():
    """mean max(0, 1 - D(x)) + mean max(0, 1 + D(r)), and -mean D(r)."""
    real, fake = torch.randn(2, 4, 10, dtype=torch.float64) * 2
    a, b = real.numpy(), fake.numpy()
    expected = np.maximum(0, 1 - a).mean() + np.maximum(0, 1 + b).mean()
    assert hinge_discriminator(real, fake).item() == pytest.approx(expected, rel=1e-14)
    assert hinge_generator(fake).item() == pytest.approx(-b.mean(), rel=1e-14)


def test_consistency_gradient_reaches_both_sides():
    """The sum of two mean squared differences; neither augmentation's logits are detached."""
    logits = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    loss = balanced_consistency(*logits)
    a, b, c, d = (x.detach().numpy() for x in logits)
    assert loss.item() == pytest.approx(((b - a) ** 2).mean() + ((d - c) ** 2).mean(), rel=1e-14)
    loss.backward()
    assert all(torch.equal(x.grad, -y.grad) and x.grad.any() for x, y in (logits[:2], logits[2:]))


def test_schedules():
    """The ramp is 0 at its start, so the first step has no adversarial term; the blur fades as it rises."""
    assert [ramp(t, 10) for t in (0, 1, 5, 10, 99)] == [0, 0.1, 0.5, 1, 1]
    assert [ramp(t, 10, start=20) for t in (0, 20, 25, 30)] == [0, 0, 0.5, 1]
    assert [fade(t, 20) for t in (0, 5, 20, 21)] == [1, 0.75, 0, 0]
    assert (ramp(0, 0), ramp(1, 0), fade(0, 0)) == (0, 1, 0)


class Pair(nn.Module):
    """A small decoder with a last convolution, and a stand-in for the networks behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.critic = nn.Conv2d(3, 2, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


@pytest.fixture
def pair():
    model, x = Pair().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    r = model(x)
    return model, r, (r - x).square().mean(), hinge_generator(model.critic(r).tanh())


def test_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer(pair):
    """Equal to differentiating both losses all the way by hand."""
    model, r, likelihood, adversarial = pair
    norms = [torch.autograd.grad(x, model.last.weight, retain_graph=True)[0].norm() for x in (likelihood, adversarial)]
    (_, a), (_, b) = (settle(loss, r) for loss in (likelihood, adversarial))
    w = adaptive_weight(r, a, b, model.last.weight)
    assert w.item() == pytest.approx((norms[0] / (norms[1] + 1e-6)).item(), rel=1e-6) and not w.requires_grad


@pytest.mark.parametrize(("factor", "expected"), [(1e-9, 0.015), (1e9, 1e4), (float("nan"), float("nan"))])
def test_adaptive_weight_is_clamped_and_keeps_nan(pair, factor, expected):
    """Between 0.015 and 1e4; a NaN is left for the loop to find."""
    model, r, likelihood, adversarial = pair
    (_, a), (_, b) = (settle(loss, r) for loss in (likelihood, adversarial))
    assert adaptive_weight(r, a * factor, b, model.last.weight).item() == pytest.approx(expected, nan_ok=True)


def test_settled_losses_give_the_gradients_of_plain_backward(pair):
    """Value and every gradient of likelihood + w * adversarial are those without settling."""
    model, r, likelihood, adversarial = pair
    weights = [*model.first.parameters(), *model.last.parameters()]
    expected = torch.autograd.grad(likelihood + 0.7 * adversarial, weights, retain_graph=True)
    (a, _), (b, _) = (settle(loss, r) for loss in (likelihood, adversarial))
    assert a.item() == likelihood.item() and b.item() == adversarial.item()
    for found, wanted in zip(torch.autograd.grad(a + 0.7 * b, weights), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_settling_runs_the_networks_behind_once():
    """Backward through settled losses never enters the critic again."""
    calls = []
    x = torch.randn(3, requires_grad=True)
    r = x * 2
    behind = r.sin()
    behind.register_hook(lambda g: calls.append(1))
    loss, _ = settle(behind.sum(), r)
    loss.backward()
    assert len(calls) == 1 and torch.allclose(x.grad, 2 * (2 * x).cos())
