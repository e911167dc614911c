"""Learned measures: zero for equal sets, the formula otherwise, named and hashed, withheld where they mean nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from meditok.errors import MissingPartError, UsageError
from meditok.evaluate.extractors import Extractor, Frechet, Perceptual, load_extractor, weights_hash

from .test_command import report_of


def mean_colour() -> Extractor:
    """Three features: the mean of each channel."""
    return Extractor("mean colour", nn.Linear(1, 1), lambda x: x.mean((2, 3)))


def test_frechet_is_zero_for_equal_sets_and_the_formula_otherwise():
    random = torch.Generator().manual_seed(0)
    a, b = torch.rand(60, 3, 8, 8, generator=random), torch.rand(60, 3, 8, 8, generator=random) * 0.5 + 0.4
    same, other = Frechet(mean_colour()), Frechet(mean_colour())
    for x, y in zip(a, b, strict=True):
        same.add(x[None], x[None])
        other.add(x[None], y[None])
    assert same.value() == pytest.approx(0, abs=1e-9)
    u, v = (x.mean((2, 3)).double().numpy() for x in (a, b))
    cross = linalg.sqrtm(np.cov(u.T) @ np.cov(v.T)).real
    expected = ((u.mean(0) - v.mean(0)) ** 2).sum() + np.trace(np.cov(u.T) + np.cov(v.T) - 2 * cross)
    assert other.value() == pytest.approx(expected, rel=1e-6)


def test_a_network_is_hashed_by_its_weights():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    assert weights_hash(a) == weights_hash(b)
    b.weight.data[0, 0] += 1
    assert weights_hash(a) != weights_hash(b)


@pytest.mark.parametrize(("name", "width"), [("efficientnet-lite0", 1280), ("stlpips-vgg16", 512)])
def test_extractors_give_features_of_their_width(name, width):
    extractor = load_extractor(name)
    assert extractor(torch.zeros(1, 3, 64, 64)).shape == (1, width) and len(extractor.hash) == 64


def test_a_missing_extractor_file_says_where_to_get_it():
    with pytest.raises(MissingPartError, match="huggingface.co/microsoft/BiomedCLIP"):
        load_extractor("biomedclip")
    with pytest.raises(UsageError, match="efficientnet-lite0"):
        load_extractor("inception")


def test_the_perceptual_distance_is_zero_for_equal_pictures_and_sees_blur():
    distance = Perceptual("stlpips-alexnet")
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    blurred = nn.functional.avg_pool2d(x, 5, 1, 2)
    assert distance(x, x) == 0 and distance(x, blurred) > 0.05
    assert np.isnan(distance(x[..., :40, :], x[..., :40, :]))


def test_few_pictures_have_no_fid_and_the_reason_is_told(evaluate, pictures, tmp_path):
    report = report_of(evaluate, pictures, tmp_path / "r.json", "--perceptual", "auto", "--size", "64")
    protocol = report["protocol"]
    assert "2000" in protocol["withheld"]["fid"] and "fid" not in report["models"][0]
    assert protocol["st_lpips"]["network"] == "stlpips-alexnet" and len(protocol["st_lpips"]["weights_sha256"]) == 64
    assert report["models"][0]["overall"]["st_lpips"] > 0


def test_with_enough_pictures_the_fid_is_given_with_its_extractor(evaluate, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("meditok.evaluate.extractors.MIN_IMAGES", 12)
    report = report_of(evaluate, pictures, tmp_path / "r.json")
    assert report["models"][0]["fid"] > 0
    assert report["protocol"]["fid"]["extractor"] == "efficientnet-lite0"
    assert "fid" not in json.dumps(report["protocol"]["withheld"])
