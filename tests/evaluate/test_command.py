"""`meditok evaluate`: its numbers, what it refuses, what it writes, and how it ends."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import meditok
from meditok.data import read
from meditok.evaluate import metrics
from meditok.evaluate.codecs import Coded
from meditok.evaluate.held_out import fingerprints
from meditok.evaluate.reconstruction import Reconstruction
from meditok.evaluate.summary import PSNR_CAP, Bootstrap

from .conftest import write_rows


def report_of(evaluate, path, out, *arguments):
    code, _, err = evaluate(path, "--json", out, *arguments)
    assert code == 0, err
    return json.loads(out.read_text())


def test_its_scores_are_those_of_the_library_calls(evaluate, pictures, model_dir, tmp_path):
    """PSNR and SSIM of every val picture, computed by hand from the public calls."""
    report = report_of(evaluate, pictures, tmp_path / "r.json")
    model = meditok.load(model_dir)
    psnr, ssim, native = [], [], []
    for i in range(12):
        image = read(pictures / f"{i:03d}.png", modality="us")
        fitted = model.processor.fit(image)[0]
        other = model.reconstruct(fitted.pixels[None], stable=True)[0].mean(0, keepdim=True)
        pair = [(x.double() + 1) / 2 for x in (fitted.pixels[:1], other)]
        psnr.append(metrics.psnr(*pair, 1.0))
        ssim.append(metrics.ssim(*pair, 1.0))
        back = model.processor.post_process(other.expand(3, -1, -1)[None], [fitted.geometry])[0]
        native.append(metrics.psnr(image.pixels[:1], back[:1], 2.0))
    entry = report["models"][0]
    assert entry["modalities"]["us"]["psnr"] == pytest.approx(np.mean(psnr), abs=1e-6)
    assert entry["overall"]["ssim"] == pytest.approx(np.mean(ssim), abs=1e-6)
    assert entry["native"]["overall_micro"]["psnr"] == pytest.approx(np.mean(native), abs=1e-5)
    assert (entry["modalities"]["us"]["n"], entry["modalities"]["us"]["groups"]) == (12, 6)
    assert entry["codebook"]["tokens"] == 12 * 4 and entry["bytes_mean"] == 2 * 2 * 2 * 6 / 8
    assert {"usage_min", "usage_mean", "perplexity_mean"} <= set(entry["codebook"])


def test_two_runs_write_the_same_file(evaluate, pictures, tmp_path):
    for name in ("a.json", "b.json"):
        report_of(evaluate, pictures, tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


class Same:
    """A codec that loses nothing, or moves everything by a pixel."""

    name, side = "same", 32

    def __init__(self, shift: int = 0):
        self.shift = shift

    def __call__(self, fitted):
        return Coded(fitted.pixels[:1].roll(self.shift, -1), 1)

    def describe(self):
        return {}


def test_identical_pictures_are_perfect_and_a_shift_of_one_pixel_is_not(pictures):
    from meditok.data import discover

    scores = Reconstruction([Same(), Same(1)])
    image = torch.linspace(-1, 1, 32).expand(3, 32, 32).contiguous()
    for source in discover([str(pictures)]).sources[:4]:
        for row in source.rows():
            row.image.pixels = image
            scores.add(row)
    same, shifted = scores.result(Bootstrap(100))
    for record in (same, same["native"]):
        assert record["overall_micro"]["psnr"] == PSNR_CAP
        assert record["overall_micro"]["ssim"] == pytest.approx(1, abs=1e-9)
    assert shifted["overall_micro"]["psnr"] < 40 and shifted["overall_micro"]["ssim"] < 1


def test_padding_is_not_scored(evaluate, tmp_path):
    """Black bars above and below a wide picture: padding in one run, part of the picture in the other."""
    folder = tmp_path / "in"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(60, 255, (16, 32)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "wide.png")
    wide = report_of(evaluate, folder, tmp_path / "w.json", "--modality", "us", "--size", 64)
    Image.fromarray(np.pad(noise, ((8, 8), (0, 0)))).save(folder / "wide.png")
    barred = report_of(evaluate, folder, tmp_path / "b.json", "--modality", "us", "--size", 64)
    values = [r["models"][0]["overall_micro"]["psnr"] for r in (wide, barred)]
    assert values[0] != pytest.approx(values[1], abs=0.2)
    assert wide["models"][0]["codebook"]["tokens"] == 8 and barred["models"][0]["codebook"]["tokens"] == 16


def test_ct_errors_are_in_hounsfield_units(evaluate, tmp_path):
    from tests.readers import make_dicom as dicom

    folder = tmp_path / "ct"
    folder.mkdir()
    for z in range(2):
        values = np.random.default_rng(z).integers(0, 2000, (32, 32)).astype(np.uint16)
        dicom.write(folder / f"{z}.dcm", dicom.dataset(values, "CT", **dicom.slice_tags(float(z), z + 1)))
    entry = report_of(evaluate, folder, tmp_path / "r.json")["models"][0]["modalities"]["ct"]
    assert 100 < entry["mae_hu"] < 2000 and entry["groups"] == 1 and entry["interval"]["mae_hu"] is None


# ---- which pictures --------------------------------------------------------------------------------------------


def test_training_rows_are_never_evaluated(evaluate, pictures, tmp_path):
    report = report_of(evaluate, pictures, tmp_path / "r.json")
    assert report["protocol"]["splits"] == ["val"] and report["rows"] == 12 and report["ignored"] == 5
    code, _, err = evaluate(pictures, "--split", "train")
    assert code == 2 and "trained on" in err and err.count("\n") == 1


def test_a_picture_in_the_models_training_record_is_refused(evaluate, pictures, model_dir, tmp_path):
    from meditok.data import discover

    source = next(s for s in discover([str(pictures)]).sources if s.name == "003.png")
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    (model / "data.json").write_text(json.dumps({"files": fingerprints(source), "unlisted": 7}))
    code, _, err = evaluate(pictures, "--model", model)
    assert code == 3 and "003.png" in err and "trained on" in err and "7 rows of token files" in err
    code, _, err = evaluate(pictures, "--model", model, "--on-error", "skip", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert code == 6 and (report["rows"], report["failed"]) == (11, 1)


def test_without_a_stated_split_everything_is_taken_and_that_is_said(evaluate, tmp_path):
    folder = write_rows(tmp_path / "in", [{"modality": "us"} for _ in range(2)])
    code, _, err = evaluate(folder)
    assert code == 0 and "no input states a split" in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--split", "test"], 2),
        (["--fit", "tile"], 2),
        (["--model", "no-such-model"], 4),
        (["--draws", "5"], 2),
        (["--json", "no/such/folder/r.json"], 2),
        (["--html", "no/such/folder/r.html"], 2),
        (["--html", "-"], 2),
        (["--baseline", "gif"], 2),
        (["--zero-shot", "label"], 4),
        (["--perceptual", "lpips-vgg16"], 4),
        (["--perceptual", "something"], 2),
    ],
)
def test_what_cannot_be_done_is_one_line_and_an_exit_code(evaluate, pictures, arguments, code):
    got, out, err = evaluate(pictures, *arguments)
    last = err.rstrip().splitlines()[-1]
    assert (got, out) == (code, "") and last.startswith("meditok: error: ")


def test_broken_pictures_end_the_run_or_are_listed(evaluate, pictures, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(pictures, folder)
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:60])
    code, out, err = evaluate(folder, "--json", tmp_path / "r.json")
    assert (code, out) == (3, "") and "001.png" in err and not (tmp_path / "r.json").exists()
    code, _, _ = evaluate(folder, "--json", tmp_path / "r.json", "--on-error", "skip")
    report = json.loads((tmp_path / "r.json").read_text())
    assert code == 6 and report["found"] == report["ok"] + report["failed"] + report["ignored"]
    assert report["failures"][0]["error"] == "CorruptImageError" and "001" not in json.dumps(report["failures"])
    empty = tmp_path / "empty"
    empty.mkdir()
    assert evaluate(empty)[0] == 3
