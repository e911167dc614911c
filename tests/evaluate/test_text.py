"""Retrieval and zero-shot: ranks, chance, ties, and a pair of towers that meditok train made."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meditok.evaluate.summary import Bootstrap
from meditok.evaluate.text import both_ways, ranks_of_captions, ranks_of_pictures, ridge, within

from .conftest import SMALL, write_rows
from .test_command import report_of

HOW = Bootstrap(100)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 6))
def test_ranks_are_those_of_sorting(seed, n, captions):
    random = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(captions), random.integers(0, captions, n)])
    similarity = random.normal(size=(len(truth), captions))
    for i, rank in enumerate(ranks_of_captions(similarity, truth)):
        assert list(np.argsort(-similarity[i])).index(truth[i]) + 1 == rank
    for j, rank in enumerate(ranks_of_pictures(similarity, truth)):
        order = np.argsort(-similarity[:, j])
        assert next(place for place, i in enumerate(order) if truth[i] == j) + 1 == rank


def test_a_space_where_all_is_alike_finds_nothing():
    """Ties count against the model."""
    truth = np.arange(20)
    found = both_ways(np.ones((20, 20)), truth, [str(i) for i in truth], HOW)
    assert found["image_to_text"]["r1"] == found["image_to_text"]["r10"] == found["text_to_image"]["r1"] == 0
    perfect = both_ways(np.eye(20), truth, [str(i) for i in truth], HOW)
    assert perfect["image_to_text"]["r1"] == perfect["text_to_image"]["r1"] == 1


def test_chance_is_what_random_similarities_reach():
    random = np.random.default_rng(0)
    truth = np.repeat(np.arange(10), [1, 2, 3, 4, 5, 1, 2, 3, 4, 5])
    groups = [str(i) for i in range(len(truth))]
    drawn = [both_ways(random.normal(size=(30, 10)), truth, groups, HOW) for _ in range(300)]
    for way in ("image_to_text", "text_to_image"):
        for k in ("r1", "r5"):
            assert np.mean([d[way][k] for d in drawn]) == pytest.approx(drawn[0][way]["chance"][k], abs=0.03)


def test_within_a_modality_only_its_captions_compete():
    """Perfect between modalities, blind within: R@1 over all is that of chance within."""
    modality = np.array(["ct"] * 4 + ["mr"] * 4)
    truth, groups = np.arange(8), [str(i) for i in range(8)]
    similarity = (modality[:, None] == modality[None]) * 10.0 + np.random.default_rng(3).normal(size=(8, 8))
    found = within(similarity, truth, modality, groups, HOW)
    assert found["chance"] == 0.25 and found["images"] == 8
    assert found["r1"] == both_ways(similarity, truth, groups, HOW)["image_to_text"]["r1"]
    alone = within(similarity, np.zeros(8, int), modality, groups, HOW)
    assert alone["r1"] is None and alone["images"] == 0


def test_the_histogram_probe_learns_from_other_groups_only():
    random = np.random.default_rng(0)
    texts = random.normal(size=(60, 4))
    plain = np.hstack([texts @ random.normal(size=(4, 32)), random.normal(size=(60, 40))])
    apart = ridge(plain, texts, [str(i) for i in range(60)])
    assert np.corrcoef(apart.ravel(), texts.ravel())[0, 1] > 0.8
    assert ridge(plain, texts, ["one"] * 60) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that meditok train wrote: one step of stage 2 with the offline text teacher."""
    from meditok.cli import run

    folder = tmp_path_factory.mktemp("trained")
    rows = [
        {"modality": "us", "split": "train", "label": ["left", "right"][i % 2], "caption": f"bright on side {i % 2}"}
        for i in range(4)
    ]
    data = write_rows(folder / "in", rows, seed=1)  # other pictures than those evaluated
    model = json.dumps(SMALL | {"embed_dim": 16})
    settings_ = [
        "--preset=tiny", f"--model={model}", f"--data={data}", "--size=32", "--steps=1", "--batch=4", "--workers=0",
        "--weights_ok=false", "--perceptual=0", "--adversarial=0", "--teacher=offline", "--precision=fp32",
    ]  # fmt: skip
    assert run(["train", "tiny-stage2", "--out", str(folder / "out"), "--quiet", *settings_]) == 0
    return folder / "out"


def test_a_trained_pair_of_towers_is_evaluated_on_texts(evaluate, trained, pictures, tmp_path):
    report = report_of(
        evaluate, pictures, tmp_path / "r.json", "--model", trained, "--retrieval", "--zero-shot", "label",
        "--html", tmp_path / "r.html",
    )  # fmt: skip
    (found,) = report["texts"].values()
    assert found["zero_shot"]["label"]["classes"] == 2 and found["zero_shot"]["label"]["chance"] == 0.5
    retrieval = found["retrieval"]
    assert (retrieval["images"], retrieval["captions"]) == (12, 4)
    assert retrieval["image_to_text"]["chance"]["r1"] == 0.25 and retrieval["image_to_text"]["r5"] == 1
    assert math.isclose(retrieval["within_modality"]["chance"], 0.25)
    assert "Retrieval" in (tmp_path / "r.html").read_text()


def test_what_meditok_train_was_given_is_refused(evaluate, trained):
    """data.json beside the weights says it, whatever the manifest calls the split."""
    data = trained.parent / "in"
    manifest = data / "manifest.csv"
    before = manifest.read_text()
    manifest.write_text(before.replace(",train", ",val"))
    code, _, err = evaluate(data, "--model", trained)
    manifest.write_text(before)
    assert code == 3 and "was trained on this very file" in err


def test_a_model_without_a_text_side_is_one_line_and_exit_4(evaluate, pictures):
    for option in (["--retrieval"], ["--zero-shot", "label"]):
        got, out, err = evaluate(pictures, *option)
        assert (got, out) == (4, "") and "no text tower" in err.rstrip().splitlines()[-1]
