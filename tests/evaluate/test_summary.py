"""What is averaged, what is left out, and what an interval is drawn over."""

from __future__ import annotations

import numpy as np
import pytest

from meditok.evaluate.summary import PSNR_CAP, Bootstrap, mean_interval, summarise

HOW = Bootstrap(draws=300)


def many(modality: str, groups: int, each: int = 2) -> tuple[list[str], list[str]]:
    names = [f"{modality}{i}" for i in range(groups) for _ in range(each)]
    return [modality] * len(names), names


def test_macro_counts_modalities_alike_and_micro_pictures():
    ct, ct_groups = many("ct", 5)
    mr, mr_groups = many("mr", 10, 3)
    values = [10.0] * len(ct) + [20.0] * len(mr)
    found = summarise(ct + mr, ct_groups + mr_groups, {"psnr": values, "ssim": values}, HOW)
    assert found["overall"]["psnr"] == 15 and found["overall"]["modalities"] == ["ct", "mr"]
    assert found["overall_micro"]["psnr"] == pytest.approx((10 * 10 + 30 * 20) / 40)


@pytest.mark.parametrize(("groups", "each", "counted"), [(5, 2, True), (4, 9, False), (9, 1, False), (1, 50, False)])
def test_a_modality_of_few_images_or_groups_is_shown_marked_and_left_out(groups, each, counted):
    names, members = many("us", groups, each)
    found = summarise(names, members, {"psnr": np.arange(len(names)), "ssim": np.ones(len(names))}, HOW)
    entry = found["modalities"]["us"]
    assert (entry["n"], entry["groups"], entry["counted"]) == (groups * each, groups, counted)
    assert (found["overall"]["psnr"] is not None) is counted
    assert (entry["interval"]["psnr"] is not None) is (groups > 1)


def test_a_perfect_picture_counts_as_the_cap_and_an_undefined_one_not_at_all():
    names, members = many("ct", 5)
    psnr = [np.inf] * 5 + [50.0] * 5
    ms = [np.nan] * 4 + [0.5] * 6
    found = summarise(names, members, {"psnr": psnr, "ssim": [1.0] * 10, "ms_ssim": ms, "mae_hu": [np.nan] * 10}, HOW)
    entry = found["modalities"]["ct"]
    assert entry["psnr"] == (PSNR_CAP + 50) / 2 and entry["ms_ssim"] == 0.5 and entry["undefined"] == {"ms_ssim": 4}
    assert "mae_hu" not in entry and "mae_hu" not in found["overall"]


def test_intervals_are_drawn_over_groups_and_not_over_pictures():
    """Ten thousand copies of two patients tell no more than two patients."""
    values = np.repeat([0.0, 1.0], 10_000)
    assert mean_interval(["a"] * 10_000 + ["b"] * 10_000, values, HOW) == [0, 1]
    alone = mean_interval([str(i) for i in range(20_000)], values, HOW)
    assert 0.48 < alone[0] < alone[1] < 0.52
    assert mean_interval(["a"] * 20_000, values, HOW) is None


def test_an_interval_holds_the_mean_about_as_often_as_it_says():
    random, held = np.random.default_rng(0), 0
    for _ in range(200):
        patients = random.normal(size=30)
        values = np.repeat(patients, 3) + 0.1 * random.normal(size=90)
        low, high = mean_interval([str(i) for i in range(30) for _ in range(3)], values, HOW)
        held += low <= 0 <= high
    assert 0.86 <= held / 200 <= 0.99


def test_two_runs_agree():
    names, members = many("ct", 6)
    scores = {"psnr": np.random.default_rng(0).normal(size=12), "ssim": np.ones(12)}
    assert summarise(names, members, scores, HOW) == summarise(names, members, scores, HOW)
