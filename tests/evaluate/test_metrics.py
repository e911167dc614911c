"""The metrics agree with their libraries and formulas on public pictures, and say where they are not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage import data, transform
from skimage import metrics as skimage_metrics
from torchmetrics.functional import image as torchmetrics

from meditok.evaluate import metrics


@pytest.fixture(scope="module")
def pair():
    """The IHC picture of scikit-image and a blurred one: (3, 192, 192) float64 in [0, 1]."""
    picture = data.immunohistochemistry()[:352, :352] / 255
    image = transform.resize(picture, (192, 192), anti_aliasing=True)
    other = transform.resize(transform.resize(picture, (60, 60), anti_aliasing=True), (192, 192))
    return tuple(torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1))) for x in (image, other))


def test_equal_pictures_are_perfect(pair):
    image, _ = pair
    assert metrics.psnr(image, image, 1.0) == math.inf and metrics.mae(image, image) == 0
    assert metrics.ssim(image, image, 1.0) == pytest.approx(1, abs=1e-12)
    assert metrics.ms_ssim(image, image, 1.0) == pytest.approx(1, abs=1e-6)


def test_a_shift_of_one_pixel_is_seen(pair):
    image, _ = pair
    a, b = image[:, :, 1:], image[:, :, :-1]
    assert metrics.psnr(a, b, 1.0) < 40 and metrics.ssim(a, b, 1.0) < 0.98 and metrics.ms_ssim(a, b, 1.0) < 0.9999


def test_they_agree_with_the_libraries(pair):
    image, other = pair
    a, b = image.numpy(), other.numpy()
    assert metrics.psnr(image, other, 1.0) == pytest.approx(
        skimage_metrics.peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-9
    )
    theirs = torchmetrics.structural_similarity_index_measure(other[None], image[None], data_range=1.0)
    assert metrics.ssim(image, other, 1.0) == pytest.approx(float(theirs), abs=2e-3)  # they pad the border
    theirs = torchmetrics.multiscale_structural_similarity_index_measure(other[None], image[None], data_range=1.0)
    assert metrics.ms_ssim(image, other, 1.0) == pytest.approx(float(theirs), abs=1e-5)
    assert metrics.mae(image, other) == pytest.approx(np.abs(a - b).mean(), abs=1e-12)


def test_the_range_is_only_a_unit(pair):
    """In Hounsfield units from 0 to 2000 every measure but the error is that of 0 to 1."""
    image, other = pair
    for metric in (metrics.psnr, metrics.ssim, metrics.ms_ssim):
        assert metric(image * 2000, other * 2000, 2000.0) == pytest.approx(metric(image, other, 1.0), abs=1e-5)
    assert metrics.mae(image * 2000, other * 2000) == pytest.approx(2000 * metrics.mae(image, other))


@pytest.mark.parametrize(("side", "metric"), [(10, metrics.ssim), (175, metrics.ms_ssim)])
def test_pictures_too_small_for_a_window_have_no_value(side, metric):
    small, enough = (torch.rand(1, each, 300).double() for each in (side, side + 1))
    assert math.isnan(metric(small, small, 1.0)) and not math.isnan(metric(enough, enough, 1.0))
