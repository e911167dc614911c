"""The loop that made the bundled model runs from a manifest and tars to weights that load."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import meditok
from meditok.errors import BadInputError
from meditok.train import reconstruction
from meditok.train.pictures import manifest_rows, read_pictures


@pytest.fixture
def data(tmp_path):
    """Three images that may be used (one a 16-bit CT of HU + 1024), one of another split, one of a closed licence."""
    random = np.random.default_rng(0)
    rows = [("a", "US", "train", "yes"), ("ct", "CT", "train", "yes"), ("b", "US", "train", "yes")]
    rows += [("c", "US", "val", "yes"), ("d", "US", "train", "no")]
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        for key, *_ in rows:
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            if key == "ct":
                pixels = np.full((64, 64), 1024 + 65, np.uint16)
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "PNG")
            member = tarfile.TarInfo(f"{key}.png")
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)
    with open(tmp_path / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "modality", "split", "weights_ok", "source", "licence", "licence_stated"])
        for key, modality, split, allowed in rows:
            writer.writerow([f"pictures.tar#{key}.png", modality, split, allowed, "made up", "CC0", "yes"])
    return tmp_path


@pytest.mark.parametrize("continuous", ["0", "0.5"])
def test_a_short_run_writes_weights_that_load_and_a_log(data, tmp_path, monkeypatch, continuous):
    out = tmp_path / "out"
    arguments = f"--data {data} --out {out} --steps 6 --batch 2 --crop 32 --full-size 64 --full-share 0.4 --window 2"
    monkeypatch.setattr(sys, "argv", ["train", *arguments.split(), "--continuous", continuous])
    reconstruction.main()
    model = meditok.load(out / "model.safetensors", device="cpu")
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.hash != meditok.build("tiny", seed=0).hash
    with open(out / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "5"]
    assert json.loads((out / "data.json").read_text())["images"] == 3


def test_only_images_of_the_split_and_an_open_licence_are_used(data):
    rows = manifest_rows(data / "manifest.csv", "train", publishable=True)
    assert [row["path"].split("#")[1] for row in rows] == ["a.png", "ct.png", "b.png"]
    with pytest.raises(BadInputError, match="test"):
        manifest_rows(data / "manifest.csv", "test", publishable=True)


def test_hounsfield_units_come_back_from_16_bit_pictures(data):
    picture = read_pictures(data, manifest_rows(data / "manifest.csv", "train", publishable=True))[1]
    assert picture.values().unique().tolist() == pytest.approx([0.065])


def test_a_member_that_is_not_there_is_named(data):
    rows = manifest_rows(data / "manifest.csv", "train", publishable=True)
    with pytest.raises(BadInputError, match="gone.png"):
        read_pictures(data, [*rows, dict(rows[0], path="pictures.tar#gone.png")])
