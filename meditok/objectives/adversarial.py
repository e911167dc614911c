"""Adversarial terms: hinge losses, balanced consistency, the adaptive weight and its schedules.

A generator phase that goes through the expensive networks once (r the reconstruction, `last` the last layer's weight):

    likelihood, at_r = settle(0.2 * l1(r, x) + l2(r, x) + lpips(r, x), r)
    adversarial, adversarial_at_r = settle(hinge_generator(discriminator(augment(r, drawn, fade))), r)
    w = adaptive_weight(r, at_r, adversarial_at_r, last)
    loss = likelihood + ramp(step, steps) * 0.4 * w * adversarial
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from . import wide

MIN_WEIGHT, MAX_WEIGHT = 0.015, 1e4


def hinge_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(): mean max(0, 1 - D(x)) + mean max(0, 1 + D(r)), logits of any shape (Lim & Ye 2017, arXiv 1705.02894)."""
    return F.relu(1 - wide(real)).mean() + F.relu(1 + wide(fake)).mean()


def hinge_generator(fake: torch.Tensor) -> torch.Tensor:
    """(): -mean D(r)."""
    return -wide(fake).mean()


def balanced_consistency(
    real: torch.Tensor, real_again: torch.Tensor, fake: torch.Tensor, fake_again: torch.Tensor
) -> torch.Tensor:
    """(): mean (D(x'') - D(x'))^2 + mean (D(r'') - D(r'))^2 between the logits of two augmentations of the same images
    (Zhao et al. 2021, arXiv 2002.04724, eq. 4); both sides of each difference carry gradient. In MedITok the second
    augmentation is drawn anew and has no blur, and the weight is 4."""
    return (wide(real_again) - wide(real)).square().mean() + (wide(fake_again) - wide(fake)).square().mean()


def ramp(step: int, steps: int, start: int = 0) -> float:
    """Factor of the adversarial term: 0 up to `start`, then linearly to 1 over `steps` optimiser steps."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / steps) if steps else 1.0


def fade(step: int, steps: int, start: int = 0) -> float:
    """Strength of the augmentation's blur: 1 up to `start`, then linearly to 0 over `steps` optimiser steps."""
    return 1.0 - ramp(step, steps, start) if steps else 0.0


class _Settled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, loss, gradient):
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return upstream.to(gradient.dtype) * gradient, None, None


def settle(loss: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiate `loss` () with respect to `output` now: (loss of the same value, gradient of output's shape).

    Backward through the returned loss hands that gradient to `output` and runs nothing between the two again. `loss`
    must depend on trained weights through `output` alone; gradients on other ways are lost.
    """
    (gradient,) = torch.autograd.grad(loss, output)
    return _Settled.apply(output, loss.detach(), gradient), gradient


def adaptive_weight(
    output: torch.Tensor, likelihood_at: torch.Tensor, adversarial_at: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """(): |d Lnll / d last| / (|d Lg / d last| + 1e-6), clamped to [0.015, 1e4] (Esser et al. 2021, VQGAN, eq. 7).

    output: what both losses were computed from, whose gradients are `likelihood_at` and `adversarial_at`; last: the
    weight of the layer that made it (decoder.up_conv4.conv2.weight). |.| is the Euclidean norm. In a process group both
    gradients are averaged over ranks first, so every rank gets the weight of the joined batch. NaN stays NaN. Carries
    no gradient.
    """
    norms = []
    for gradient in (likelihood_at, adversarial_at):
        (at_last,) = torch.autograd.grad(output, last, gradient, retain_graph=True)
        norms.append(_mean_over_ranks(wide(at_last)).norm())
    return (norms[0] / (norms[1] + 1e-6)).clamp(MIN_WEIGHT, MAX_WEIGHT).detach()


def _mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.contiguous()
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x
