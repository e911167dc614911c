"""Differentiable augmentation against NumPy and SciPy, one part at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from meditok.objectives import diffaug
from meditok.objectives.diffaug import Drawn, augment, draw


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 20, 24, dtype=torch.float64) * 2 - 1


def _draw(seed: int = 0, **options) -> Drawn:
    return draw(3, 20, 24, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("fade", [1.0, 0.4, 0.15])
def test_blur_is_scipys_separable_correlation(images, fade):
    """Weights 2^(-(i/sigma)^2) with sigma sqrt(H/2) * fade, radius floor(3 sigma), borders mirrored."""
    sigma = math.sqrt(10) * fade
    radius = math.floor(3 * sigma)
    weights = np.array([2.0 ** -((i / sigma) ** 2) for i in range(-radius, radius + 1)])
    weights /= weights.sum()
    expected = correlate1d(correlate1d(images.numpy(), weights, axis=2, mode="mirror"), weights, axis=3, mode="mirror")
    np.testing.assert_allclose(diffaug.blur(images, fade).numpy(), expected, atol=1e-12)


def test_no_fade_is_no_blur(images):
    """Fade 0, and any fade whose radius is under a pixel, leaves the images as they are."""
    assert diffaug.blur(images, 0.0) is images and diffaug.blur(images, 0.1) is images


def test_translation_moves_pixels_and_fills_with_zero(images):
    """Pixel (y, x) goes to (y + dy, x + dx); what comes in is 0."""
    shift = torch.tensor([[2, -3], [0, 0], [-1, 1]])
    moved = diffaug.translate(images, shift).numpy()
    for i, (dy, dx) in enumerate(shift.tolist()):
        expected = np.zeros((3, 20, 24))
        for y in range(20):
            for x in range(24):
                if 0 <= y - dy < 20 and 0 <= x - dx < 24:
                    expected[:, y, x] = images[i, :, y - dy, x - dx]
        np.testing.assert_array_equal(moved[i], expected)


def test_recolouring_is_brightness_saturation_contrast_in_that_order(images):
    """Each image has its own three numbers."""
    colour = torch.tensor([[0.3, 1.7, 0.6], [-0.5, 0.0, 1.4], [0.0, 1.0, 1.0]])
    for image, (b, s, c), out in zip(
        images.numpy(), colour.double().tolist(), diffaug.recolour(images, colour), strict=True
    ):
        x = image + b
        grey = x.mean(0)
        x = grey + s * (x - grey)
        np.testing.assert_allclose(out.numpy(), x.mean() + c * (x - x.mean()), atol=1e-6)


def test_cutout_zeroes_a_fifth_of_each_side_and_may_hang_over(images):
    """Rows [cy - h // 2, cy - h // 2 + h), columns alike, of a 4 x 5 hole in 20 x 24."""
    centres = torch.tensor([[10, 12], [0, 0], [20, 23]])
    out = diffaug.cut_out(images + 5, centres)
    for i, (cy, cx) in enumerate(centres.tolist()):
        expected = images[i].numpy() + 5
        expected[:, max(cy - 2, 0) : cy + 2, max(cx - 2, 0) : cx + 3] = 0
        np.testing.assert_array_equal(out[i].numpy(), expected)


def test_parameters_cover_their_ranges():
    """Shifts reach both ends of round(12.5 %), brightness +-0.5, saturation 0 to 2, contrast 0.5 to 1.5."""
    drawn = draw(4000, 20, 24, generator=torch.Generator().manual_seed(0))
    assert (drawn.shift.amin(0).tolist(), drawn.shift.amax(0).tolist()) == ([-2, -3], [2, 3])
    assert (drawn.cutout.amin(0).tolist(), drawn.cutout.amax(0).tolist()) == ([0, 0], [20, 23])
    low, high = drawn.colour.amin(0), drawn.colour.amax(0)
    assert (
        torch.allclose(low, torch.tensor([-0.5, 0.0, 0.5]), atol=5e-3) and (low >= torch.tensor([-0.5, 0, 0.5])).all()
    )
    assert (
        torch.allclose(high, torch.tensor([0.5, 2.0, 1.5]), atol=5e-3) and (high <= torch.tensor([0.5, 2, 1.5])).all()
    )


def test_the_same_generator_state_gives_the_same_augmentation(images):
    """Real and fake images can share a draw, and a resumed run repeats it."""
    first, again, other = (augment(images, _draw(seed), 0.5) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_probability_zero_leaves_images_alone(images):
    """No part is drawn, so only the blur could change anything."""
    drawn = _draw(probability=0.0)
    assert drawn == Drawn(None, None, None) and torch.equal(augment(images, drawn), images)


def test_a_rank_can_take_its_rows_of_the_joined_draw(images):
    """Augmenting rows apart with the sliced draw equals augmenting the whole batch."""
    drawn = _draw()
    apart = torch.cat([augment(images[:1], drawn[:1], 0.5), augment(images[1:], drawn[1:], 0.5)])
    assert torch.equal(apart, augment(images, drawn, 0.5))


def test_augmentation_gradient():
    """The whole chain is differentiable with respect to the images."""
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    drawn = draw(1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: augment(x, drawn, 0.5), (x,), fast_mode=True)
