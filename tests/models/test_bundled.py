"""The model in the wheel loads, reconstructs, and says what it was made from."""

from __future__ import annotations

import csv
import importlib.util
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
from meditok.train.distributed import World
from meditok.train.items import data_record, find_items

DATA = Path(os.environ.get("MEDITOK_SHARED", Path(__file__).parents[3] / "shared")) / "data"


@pytest.fixture(scope="module")
def tiny():
    return meditok.load("tiny")


def test_every_bundled_model_has_a_card_a_licence_and_its_training_list():
    assert bundled()
    for weights in bundled().values():
        for name in ("README.md", "LICENSE.md", "data.json", "log.csv", "metrics.json"):
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
    config = load_config(
        "tiny-stage2", [f"data={DATA}", "include=train/*", "weights_ok=true"]
    )  # as the card's command has it
    recorded = json.loads((bundled()["tiny"].parent / "data.json").read_text())
    assert (
        data_record(find_items(config), config, World(0, 1, torch.device("cpu"))) == recorded
    )  # its `files` are what `meditok evaluate` refuses


def test_an_image_it_never_saw_comes_back_recognisably(tiny):
    from skimage import data, transform

    image = transform.resize(data.immunohistochemistry(), (256, 256), anti_aliasing=True)
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()[None] * 2 - 1
    assert psnr(x[0], tiny.reconstruct(x)[0].cpu(), 2.0) > 18


@pytest.fixture(scope="module")
def report():
    """What `meditok evaluate` wrote of the bundled model and the baselines."""
    return json.loads((bundled()["tiny"].parent / "metrics.json").read_text())


@pytest.fixture(scope="module")
def recorded(report):
    return report["models"][0]


def test_the_tables_of_card_and_readme_are_the_recorded_measurements(tiny, recorded, report):
    assert recorded["model_hash"] == tiny.hash
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("tiny_card", root / "bench" / "tiny_card.py")
    spec.loader.exec_module(tables := importlib.util.module_from_spec(spec))
    card, readme = (bundled()["tiny"].parent / "README.md").read_text(), (root / "README.md").read_text()
    for lines, text in ((tables.for_card(report), card), (tables.for_readme(report), readme)):
        assert f"{tables.MARKS[0]}\n" + "\n".join(lines) + f"\n{tables.MARKS[1]}" in text


def test_it_embeds_pictures_and_texts_in_one_space(tiny):
    vectors = tiny.embed(torch.zeros(2, 3, 64, 64)), tiny.embed_text(["a chest X-ray", "an axial MRI of the head"])
    for found in vectors:
        assert found.shape == (2, tiny.config.embed_dim)
        assert found.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)


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
