"""inspect, dry runs, doctor, demo, convert, and the command line as a whole."""

import json
import os
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import meditok
from meditok.cli import COMMANDS


def test_help_is_quick_because_it_imports_nothing_heavy(process):
    code = (
        "import sys; from meditok.cli import run; assert run(['--help']) == 0; print([m for m in ('torch', "
        "'numpy', 'pydicom', 'pyarrow', 'PIL', 'rich') if m in sys.modules])"
    )
    done = process(code=code)
    assert done.stdout.decode().splitlines()[-1] == "[]", done.stderr


def test_version_says_what_it_is_not(cli):
    code, out, _ = cli("--version")
    assert code == 0 and meditok.__version__ in out and "research use, not a medical device" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    from meditok.cli import run

    assert run([command, "--help"]) == 0


@pytest.mark.parametrize(
    "arguments", [["unknown"], ["tokenize"], ["detokenize", "x.parquet"], ["tokenize", "x", "--frame", "a"]]
)
def test_wrong_usage_is_one_line_and_exit_2(arguments, capsys):
    from meditok.cli import run

    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1


def test_inspect_tells_what_files_are(cli, make, pictures, tmp_path):
    make.ct_series(pictures / "ct", make.noise((40, 30, 3), 1000, dtype=np.int16))
    code, out, err = cli("inspect", pictures, "--json", "-")
    report = json.loads(out)
    assert code == 0 and (report["found"], report["ok"], report["ignored"], report["rows"]) == (7, 6, 1, 6)
    entry = next(f for f in report["files"] if f["name"] == "ct/slice01.dcm")
    assert (entry["modality"], entry["height"], entry["width"], entry["unit"]) == ("ct", 30, 40, "HU")
    assert "Explicit VR Little Endian" in entry["syntax"] and any("rescale" in step for step in entry["steps"])
    code, out, _ = cli("inspect", pictures)
    assert code == 0 and "ct/slice01.dcm" in out and "notes.txt: ignored" in out


def broken_inputs(folder, make):
    """A few of the bad inputs, each with the exit code it must give."""
    folder.mkdir()
    Image.fromarray(make.noise((64, 64))).save(folder / "good.png")
    data = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: int(len(data) * 0.6)])
    head = data[:16] + (60000).to_bytes(4, "big") * 2 + data[24:29]
    (folder / "huge.png").write_bytes(head + zlib.crc32(head[12:29]).to_bytes(4, "big") + data[33:])
    make.nifti(folder / "nan.nii.gz", np.full((24, 24, 2), np.nan, np.float32), np.eye(4))
    (folder / "torn.nii.gz").write_bytes((folder / "nan.nii.gz").read_bytes()[:60])
    make.ct(folder / "short.dcm", make.noise((32, 32), 1000, dtype=np.int16))
    (folder / "short.dcm").write_bytes((folder / "short.dcm").read_bytes()[:-700])
    (folder / "text.png").write_text("not a picture at all")
    return {
        "cut.png": 3,
        "huge.png": 5,
        "nan.nii.gz": 3,
        "torn.nii.gz": 3,
        "short.dcm": 3,
        "text.png": 3,
        "good.png": 0,
    }


def test_inspect_and_a_dry_run_predict_what_the_run_returns(cli, make, tmp_path):
    expected = broken_inputs(tmp_path / "in", make)
    options = ["--modality", "mr"]
    for name, code in expected.items():
        path = tmp_path / "in" / name
        assert cli("inspect", path, *options)[0] == code, name
        assert cli("tokenize", path, "-o", tmp_path / "out.parquet", "--dry-run", *options)[0] == code, name
        assert not (tmp_path / "out.parquet").exists()
        got, out, err = cli("tokenize", path, "-o", tmp_path / "out.parquet", *options)
        assert (got, out) == (code, ""), name
        assert code == 0 or (err.count("\n") == 1 and name in err)
        (tmp_path / "out.parquet").unlink(missing_ok=True)
    for mode in ("fail", "skip"):
        arguments = [
            "tokenize",
            tmp_path / "in",
            "-o",
            tmp_path / f"{mode}.parquet",
            "--on-error",
            mode,
            *options,
        ]
        assert cli(*arguments, "--dry-run")[0] == cli(*arguments)[0]


def test_doctor_tells_the_truth_as_text_and_json(cli, tmp_path):
    code, out, _ = cli("doctor")
    assert code == 0 and "research use" in out
    code, _, _ = cli("doctor", "--json", tmp_path / "d.json")
    report = json.loads((tmp_path / "d.json").read_text())
    from meditok import native

    assert report["native"] is (native.backend == "native") and report["versions"]["torch"]
    assert {"compiled", "detected", "chosen"} <= set(report["isa"]) and "architectures" in report["cuda"]


def test_doctor_never_raises_whatever_is_missing(process):
    code = (
        "import sys\n"
        "for name in ('pydicom', 'meditok._core', 'nibabel', 'PIL', 'pyarrow', 'torch', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import runpy; sys.argv = ['meditok', '--json', '-']; runpy.run_module('meditok', None, '__main__')"
    )
    done = process(code=code, CUDA_VISIBLE_DEVICES="")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["native"] is False and report["why"]


def test_python_m_meditok_is_doctor(process):
    done = process("--json", "-", MEDITOK_BACKEND="reference")
    assert done.returncode == 0 and json.loads(done.stdout)["backend"] == "reference"


def test_python_m_meditok_knows_the_options_of_meditok(process):
    done = process("--version")
    assert done.returncode == 0 and b"research use" in done.stdout
    done = process("unknown")
    assert done.returncode == 2 and b"unknown" in done.stderr


def test_a_forced_backend_without_kernels_for_the_device_is_exit_4(process, pictures, model_dir, tmp_path):
    """Triton has none for the CPU, where only its interpreter, for tests, would run it."""
    arguments = ["--model", model_dir, "--size", "32", "--device", "cpu", "--backend", "triton"]
    done = process("tokenize", pictures, "-o", tmp_path / "t.parquet", *arguments, TRITON_INTERPRET="0")
    assert done.returncode == 4 and done.stderr.count(b"\n") == 1 and b"--backend auto" in done.stderr, done.stderr
    assert not (tmp_path / "t.parquet").exists()


def test_the_demo_writes_two_files_and_prints_a_line_a_modality(cli, tmp_path, monkeypatch, key_file):
    """Marking the scan that the bundled model was trained on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDITOK_KEY_FILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    code, out, _ = cli("demo", "--json", "r.json")
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "meditok-demo").iterdir()) == [
        "side-by-side.png",
        "tokens.parquet",
    ]
    assert not (tmp_path / "config").exists()
    modalities = {entry["modality"] for entry in json.loads((tmp_path / "r.json").read_text())}
    assert {"ct", "mr", "us", "histology"} <= modalities
    assert all("PSNR" in line and "SSIM" in line and "bytes" in line for line in out.splitlines())
    assert len(out.splitlines()) >= 4
    sheet = Image.open(tmp_path / "meditok-demo" / "side-by-side.png")
    assert sheet.width > 1000 and sheet.height > 600
    assert [line.split()[0] for line in out.splitlines() if "seen in training" in line] == ["Fundus"]


def test_a_report_never_replaces_an_input_or_the_output(cli, pictures, tmp_path):
    picture, out = pictures / "photo.jpg", tmp_path / "t.parquet"
    before = picture.read_bytes()
    for command in (
        ["inspect", picture],
        ["tokenize", picture, "-o", out],
        ["tokenize", pictures, "--dry-run"],
        ["reconstruct", picture, "-o", tmp_path / "r"],
    ):
        assert cli(*command, "--json", picture)[0] == 2
        assert picture.read_bytes() == before and not out.exists()
    assert cli("tokenize", picture, "-o", out, "--json", out)[0] == 2
    assert cli("tokenize", picture, "-o", out)[0] == 0
    before = out.read_bytes()
    assert cli("detokenize", out, "-o", tmp_path / "d", "--json", out)[0] == 2
    assert out.read_bytes() == before and not (tmp_path / "d").exists()


def test_a_report_that_cannot_be_written_is_refused_before_the_work(cli, pictures, tmp_path):
    out = tmp_path / "t.parquet"
    for report in (tmp_path / "none" / "r.json", tmp_path):
        code, _, err = cli("tokenize", pictures, "-o", out, "--json", report)
        assert (code, err.count("\n")) == (2, 1) and not out.exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_output_below_a_file_is_a_usage_error_in_a_dry_run_too(cli, pictures, more):
    code, _, err = cli("tokenize", pictures / "sub", "-o", pictures / "photo.jpg" / "t.parquet", *more)
    assert (code, err.count("\n")) == (2, 1) and "photo.jpg" in err


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text here")
def test_a_name_that_is_not_text_can_be_hashed_but_not_kept(cli, pictures, tmp_path):
    (pictures / "photo.jpg").rename(os.fsdecode(os.fsencode(pictures) + b"/\xff.jpg"))
    assert cli("inspect", pictures)[0] == 0
    assert cli("tokenize", pictures, "-o", tmp_path / "hash.parquet")[0] == 0
    assert cli("tokenize", pictures, "-o", tmp_path / "name.parquet", "--keep-names")[0] == 2


def test_a_published_checkpoint_is_converted_and_a_hostile_one_is_not(cli, tmp_path):
    import pickle

    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    torch.save(Touch(), tmp_path / "bad.pth", pickle_module=pickle)
    code, _, err = cli("convert", tmp_path / "bad.pth", tmp_path / "out.safetensors")
    assert code == 5 and err.count("\n") == 1
    assert not (tmp_path / "touched").exists() and not (tmp_path / "out.safetensors").exists()
    assert cli("convert", tmp_path / "none.pth", tmp_path / "out.safetensors")[0] == 3
    assert cli("convert", tmp_path / "bad.pth", tmp_path / "out.bin")[0] == 2


def test_a_pickled_model_is_refused_with_the_command_that_converts_it(cli, pictures, tmp_path):
    (tmp_path / "model.pth").write_bytes(b"\x80\x04.")
    code, _, err = cli("tokenize", pictures, "-o", tmp_path / "t.parquet", "--model", tmp_path / "model.pth")
    assert code == 5 and "meditok convert" in err
