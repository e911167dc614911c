"""Probes learn what is there and nothing that is not, and never see a group on both sides."""

from __future__ import annotations

import json

import hypothesis
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from meditok.evaluate.probes import Scorer, divide, usable
from meditok.evaluate.summary import Bootstrap

from .test_command import report_of

HOW = Bootstrap(100)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), min_size=8, max_size=60))
def test_no_group_straddles_a_division_and_every_picture_is_tested_at_most_once(pairs):
    y, groups = np.array([c for c, _ in pairs]), [str(g) for _, g in pairs]
    hypothesis.assume(len(set(groups)) > 1 and len(set(y)) > 1)
    tested = []
    for train, test in divide(y, groups):
        assert not {groups[i] for i in train} & {groups[i] for i in test}
        assert not set(train) & set(test)
        tested += list(test)
    assert len(tested) == len(set(tested))


def test_classes_too_small_to_divide_are_left_out():
    labels = ["a"] * 5 + ["b"] * 5 + ["c"] * 9 + ["d"] * 4 + [None]
    groups = ["1", "2"] * 5 + ["3"] * 9 + ["4", "5", "6", "7"] + ["8"]
    assert usable(labels, groups) == list(range(10))


def test_what_separates_classes_is_found_and_noise_is_not():
    random = np.random.default_rng(0)
    y = np.repeat([0, 1], 60)
    groups = [str(i // 2) for i in range(120)]
    score = Scorer(y, groups, divide(y, groups), HOW)
    apart = y[:, None] * 2.0 + random.normal(size=(120, 6)) * 0.3
    for kind in ("linear", "knn"):
        assert score(apart)[kind]["accuracy"] > 0.95
        assert 0.3 < score(random.normal(size=(120, 6)))[kind]["accuracy"] < 0.7
    assert 0.4 < score.majority()["accuracy"] <= 0.5


def test_a_patient_is_not_recognised_by_copies_of_itself():
    """Labels drawn by group at random, features that name the group: only a leak could tell them."""
    random = np.random.default_rng(1)
    of_group = random.integers(0, 2, 40)
    index = np.repeat(np.arange(40), 5)
    names = random.normal(size=(40, 16))
    y, groups = of_group[index], [str(i) for i in index]
    score = Scorer(y, groups, divide(y, groups), HOW)
    assert score(names[index] + 0.01 * random.normal(size=(200, 16)))["knn"]["balanced_accuracy"] < 0.7


def test_the_command_probes_a_column_against_three_baselines(evaluate, pictures, tmp_path):
    """Bright on the left or on the right: pixels tell, the most frequent class does not, and no label is written."""
    report = report_of(evaluate, pictures, tmp_path / "r.json", "--probe", "label")
    probe = report["probes"]["label"]
    assert (probe["classes"], probe["images"], probe["groups"]) == (2, 12, 6)
    assert probe["pca"]["linear"]["accuracy"] == 1 and probe["majority"]["balanced_accuracy"] <= 0.5
    (model,) = probe["models"].values()
    assert set(model) == {"linear", "knn", "random_encoder"} and set(model["random_encoder"]) == {"linear", "knn"}
    assert "left" not in json.dumps(report["probes"]).replace("left_out", "")


def test_a_column_that_no_picture_has_is_one_line(evaluate, pictures):
    got, out, err = evaluate(pictures, "--probe", "nothing")
    assert (got, out) == (2, "") and err.rstrip().splitlines()[-1].startswith("meditok: error: --probe")


def test_a_column_of_too_few_classes_is_withheld_with_the_reason(evaluate, pictures, tmp_path):
    report = report_of(evaluate, pictures, tmp_path / "r.json", "--probe", "modality", "--html", tmp_path / "r.html")
    assert "fewer than two classes" in report["probes"]["modality"]["withheld"] and report["models"][0]["overall"]
    assert "Withheld: fewer than two classes" in (tmp_path / "r.html").read_text()


def test_a_missing_package_is_named_before_any_picture_is_read(evaluate, pictures, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    got, out, err = evaluate(pictures, "--probe", "label")
    assert (got, out) == (4, "") and "pip install scikit-learn" in err.rstrip().splitlines()[-1]
    assert "ms_ssim is withheld: torchmetrics is needed" in err
