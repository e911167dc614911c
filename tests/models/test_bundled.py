"""The model in the wheel loads, reconstructs, and says what it was made from."""

from __future__ import annotations

import csv
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import meditok
from meditok.evaluate.metrics import psnr
from meditok.models.files import bundled
from meditok.train.config import load_config
from meditok.train.data import find_items
from meditok.train.run import data_record

DATA = Path(os.environ.get("MEDITOK_SHARED", Path(__file__).parents[3] / "shared")) / "data"


@pytest.fixture(scope="module")
def tiny():
    return meditok.load("tiny")


def test_every_bundled_model_has_a_card_a_licence_and_its_training_list():
    assert bundled()
    for weights in bundled().values():
        for name in ("README.md", "LICENSE.md", "data.json", "log.csv"):
            assert (weights.parent / name).stat().st_size > 0, f"{weights.parent.name}: no {name}"


def test_the_bundled_model_is_small_described_and_in_evaluation_mode(tiny):
    assert 5e6 < bundled()["tiny"].stat().st_size < 12e6
    config = tiny.config
    assert (config.num_codebooks, config.codebook_size, config.code_dim, config.image_size) == (8, 4096, 8, 256)
    assert "not a medical device" in config.intended_use and config.licence != "unstated"
    assert not tiny.training and tiny.device.type in ("cpu", "cuda")


def test_the_card_names_the_hashes_of_the_weights_it_describes(tiny):
    card = (bundled()["tiny"].parent / "README.md").read_text()
    data = json.loads((bundled()["tiny"].parent / "data.json").read_text())
    assert tiny.hash in card and tiny.codebook_hash in card and data["list_sha256"] in card


def test_every_source_of_the_training_images_is_attributed():
    folder = bundled()["tiny"].parent
    licence = (folder / "LICENSE.md").read_text()
    for source in json.loads((folder / "data.json").read_text())["sources"]:
        assert source["source"].split(" ")[0] in licence, source


def test_the_training_list_is_what_the_manifest_allows():
    if not DATA.is_dir():
        pytest.skip("manifest.csv of the training images is not here; set MEDITOK_SHARED")
    config = load_config("tiny-stage2", [f"data={DATA}", "include=train/*", "weights_ok=true"])  # as the card has it
    recorded = json.loads((bundled()["tiny"].parent / "data.json").read_text())
    assert data_record(find_items(config)) == recorded  # its `files` are what `meditok evaluate` refuses


def test_an_image_it_never_saw_comes_back_recognisably(tiny):
    from skimage import data, transform

    image = transform.resize(data.immunohistochemistry(), (256, 256), anti_aliasing=True)
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()[None] * 2 - 1
    assert psnr(x[0], tiny.reconstruct(x)[0].cpu(), 2.0) > 18


@pytest.fixture(scope="module")
def recorded():
    """What `meditok evaluate` wrote of the bundled model."""
    report = json.loads((bundled()["tiny"].parent / "metrics.json").read_text())
    return report["models"][0]


def test_the_card_and_the_readme_show_the_recorded_measurements(tiny, recorded):
    assert recorded["model_hash"] == tiny.hash
    card = (bundled()["tiny"].parent / "README.md").read_text()
    readme = Path(__file__).parents[2] / "README.md"
    for text in [card, readme.read_text()]:
        for scores in [recorded["overall"], *(m for m in recorded["modalities"].values() if m["n"] >= 10)]:
            assert f"{scores['psnr']:.2f}" in text and f"{scores['ssim']:.3f}" in text


def test_the_recorded_measurements_come_out_again_on_one_modality(recorded, tmp_path, monkeypatch):
    """The X-rays of the held-out split through `meditok evaluate`: the card's numbers, but for rounding."""
    if not DATA.is_dir():
        pytest.skip("manifest.csv of the training images is not here; set MEDITOK_SHARED")
    from meditok.cli import run

    (tmp_path / "key").write_bytes(b"a key for tests")
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setenv("MEDITOK_KEY_FILE", str(tmp_path / "key"))
    with open(DATA / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = [
            r for r in csv.DictReader(file) if r["modality"] == "X-ray" and r["split"] == "val" and "#" in r["path"]
        ]
    keys = {row["path"].partition("#")[2].rpartition(".")[0] for row in rows}
    source, target = DATA / "train" / "meditok-val-000.tar", tmp_path / "xr.tar"
    with tarfile.open(source) as whole, tarfile.open(target, "w") as part:
        for member in whole:
            if member.name.rpartition(".")[0] in keys:
                part.addfile(member, whole.extractfile(member))
    assert run(["evaluate", str(target), "--json", str(tmp_path / "r.json"), "--perceptual", "none"]) == 0
    again = json.loads((tmp_path / "r.json").read_text())["models"][0]["modalities"]["xr"]
    before = recorded["modalities"]["xr"]
    assert (again["n"], again["groups"]) == (before["n"], before["groups"])
    assert again["psnr"] == pytest.approx(before["psnr"], abs=0.05)
    assert again["ssim"] == pytest.approx(before["ssim"], abs=0.002)
