"""JPEG, JPEG 2000 and the PCA keep to their bytes, and lose what they must."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage import data, transform

from meditok.data import Geometry, MedicalImage, fit
from meditok.errors import UsageError
from meditok.evaluate.baselines import PatchPca, PillowCodec, from_patches, to_patches
from meditok.evaluate.metrics import psnr


def picture(colour: bool = True, shape: tuple[int, int] = (128, 128)) -> MedicalImage:
    """The IHC picture of scikit-image."""
    values = transform.resize(data.immunohistochemistry() / 255, shape, anti_aliasing=True)
    values = values if colour else values.mean(2, keepdims=True).repeat(3, 2)
    pixels = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1))).float() * 2 - 1
    return MedicalImage(pixels, 0, 255, channels=3 if colour else 1, geometry=Geometry(shape))


@pytest.mark.parametrize("name", ["jpeg", "jpeg2000"])
@pytest.mark.parametrize("colour", [True, False])
def test_a_file_takes_its_budget_and_no_more_and_a_larger_one_is_better(name, colour):
    fitted, quality = fit(picture(colour), 128)[0], []
    for budget in (1500, 3000):
        codec = PillowCodec(name, 128, lambda height, width, bytes_=budget: bytes_)
        coded = codec(fitted)
        assert 0.75 * budget < coded.size <= budget and codec.over == 0
        assert coded.pixels.shape == (3 if colour else 1, 128, 128)
        quality.append(psnr(fitted.pixels[: len(coded.pixels)], coded.pixels, 2.0))
    assert 15 < quality[0] < quality[1]


@pytest.mark.parametrize("name", ["jpeg", "jpeg2000"])
def test_a_budget_that_no_file_keeps_is_counted(name):
    codec = PillowCodec(name, 128, lambda height, width: 60)
    assert codec(fit(picture(), 128)[0]).size > 60 and codec.describe()["over_budget"] == 1


def test_no_byte_is_spent_on_padding():
    """The file of a padded picture is that of the picture alone."""
    codec = PillowCodec("jpeg", 128, lambda height, width: 2000)
    coded = codec(fit(picture(shape=(64, 128)), 128)[0])
    whole = replace(picture(shape=(64, 128)))
    assert coded.size == codec(fit(whole, 128, "none")[0]).size
    assert (coded.pixels[:, :32] == -1).all() and (coded.pixels[:, 96:] == -1).all()


def test_patches_go_there_and_back():
    x = torch.rand(3, 48, 64)
    assert to_patches(x).shape == (12, 768) and torch.equal(from_patches(to_patches(x), 48, 64), x)
    assert torch.equal(to_patches(x)[1], x[:, :16, 16:32].reshape(-1))


def test_the_pca_is_that_of_its_training_patches_and_keeps_to_its_bytes():
    """Few components, many patches: the basis is scikit-learn's, up to signs."""
    from sklearn.decomposition import PCA

    fitted = fit(picture(), 128)[0]
    codec = PatchPca(128, lambda height, width: 64 * 6).fit([fitted])
    theirs = PCA(6, svd_solver="full").fit(to_patches(fitted.pixels).numpy())
    overlap = np.abs(theirs.components_ @ codec.basis.numpy())
    assert np.allclose(overlap, np.eye(6), atol=1e-3)
    coded = codec(fitted)
    assert coded.size == 64 * 6 and psnr(fitted.pixels, coded.pixels, 2.0) > 15


def test_the_pca_needs_training_pictures():
    with pytest.raises(UsageError, match="training"):
        PatchPca(128, lambda height, width: 64).fit([])
