"""A small data set on disk, a model of random weights, and the command line run in this process."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

import meditok
from meditok.cli import run

SMALL = dict(
    image_size=32, stem_width=16, stage_widths=(16, 32), stage_depths=(1, 1), width=64, encoder_depth=1,
    decoder_depth=1, decoder_widths=(32, 16), decoder_depths=(1, 1), num_codebooks=2, codebook_size=64,
)  # fmt: skip


@pytest.fixture(autouse=True)
def key_file(tmp_path_factory, monkeypatch):
    """A key of this test's own, so that the user's is neither made nor read."""
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_bytes(b"a key for tests")
    path.chmod(0o600)
    monkeypatch.setenv("MEDITOK_KEY_FILE", str(path))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    meditok.build("tiny", seed=0, **SMALL).save_pretrained(folder)
    return folder


def write_rows(folder, rows, seed=0):
    """manifest.csv of rows, and a picture for each that has none: bright on the left for label "left", else right."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number, row in enumerate(rows):
        row.setdefault("path", f"{number:03d}.png")
        pixels = random.integers(0, 60, (40, 40)).astype(np.uint8)
        half = slice(0, 20) if row.get("label") == "left" else slice(20, 40)
        pixels[:, half] += 150
        Image.fromarray(pixels).save(folder / row["path"])
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Twelve us pictures of six patients to evaluate, and four to train on."""
    rows = [
        {
            "modality": "us",
            "group": f"p{i // 2}",
            "split": "val",
            "label": ["left", "right"][i % 2],
            "caption": f"c{i % 4}",
        }
        for i in range(12)
    ] + [{"modality": "us", "group": f"t{i}", "split": "train"} for i in range(4)]
    return write_rows(tmp_path_factory.mktemp("pictures") / "in", rows)


@pytest.fixture
def evaluate(capsys, model_dir):
    """evaluate(*arguments) -> (exit code, stdout, stderr), with the saved model and no networks unless given."""

    def call(*arguments):
        arguments = [str(a) for a in arguments]
        for option, value in (("--model", str(model_dir)), ("--perceptual", "none"), ("--draws", "100")):
            if option not in arguments:
                arguments += [option, value]
        code = run(["evaluate", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call
