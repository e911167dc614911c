"""No name, tag, identifier or path reaches an output, report, log or traceback, whatever the command or failure."""

import shutil

import numpy as np
import pytest

from tests.hostile.marked import MARKER, everything, holds, marked_dicom, marked_files, marked_manifest
from tests.readers.bad_inputs import BAD_INPUTS
from tests.readers.bad_pictures import noise, png

# pydicom, while these tests write such files
pytestmark = pytest.mark.filterwarnings(
    "ignore:Invalid value:UserWarning", "ignore:A value of type:UserWarning", "ignore:Unknown encoding"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marked")
    marked_files(folder / "in" / f"{MARKER}_ward")
    marked_manifest(folder / "list")
    return folder


def check_silent(result, out, *, terminal=False):
    """Neither what was written nor, unless it is the terminal's, what was said holds the marker."""
    for path, data in everything(out):
        assert not holds(data), path
    assert not holds(result.err) or terminal, result.err
    assert "Traceback" not in result.err or not holds(result.err)


def test_every_command_over_marked_files_keeps_the_marker_to_itself(forks, inputs, tmp_path):
    """tokenize (file, store, processes, dry), inspect, reconstruct, detokenize, export, evaluate, doctor."""
    out = tmp_path / "out"
    out.mkdir()
    files, table = inputs / "in", inputs / "list" / f"{MARKER}.csv"
    reading = ["--size", 32, "--on-error", "skip"]
    common = ["--log-json", "--debug"]
    commands = [
        ["tokenize", files, "-o", out / "t.parquet", *reading],
        ["tokenize", files, "-o", out / "store", *reading],
        ["tokenize", files, "-o", out / "store2", "--workers", 2, *reading],
        ["tokenize", files, "-o", out / "none", "--dry-run", *reading],
        ["tokenize", table, "-o", out / "list.parquet", *reading],
        ["inspect", files, "--on-error", "skip"],
        ["reconstruct", files, "-o", out / "pictures", *reading],
        ["detokenize", out / "t.parquet", "-o", out / "again"],
        ["detokenize", out / "store", "-o", out / "native", "--as", "npy"],
        ["export", out / "t.parquet", "-o", out / "t.npz"],
        ["export", out / "store", "-o", out / "t.safetensors"],
        ["export", out / "store", "-o", out / "tars", "--to", "webdataset"],
        ["export", out / "store", "-o", out / "hf", "--to", "hf"],
        ["evaluate", files, "--html", out / "report.html", "--perceptual", "none", *reading],
        ["doctor"],
    ]
    for number, arguments in enumerate(commands):
        result = forks.command(*arguments, "--json", out / f"{number}.json", *common)
        assert result.code in (0, 6), (arguments, result)
        check_silent(result, out)
        if arguments[0] not in ("inspect", "doctor"):
            assert not holds(result.out)
    assert len(list(out.rglob("*.png"))) > 5 and list(out.rglob("*.nii.gz"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A published checkpoint of a small model; its arguments and its folder hold the marker."""
    import torch

    import meditok

    widths = dict(stem_width=24, stage_widths=(24, 48), decoder_widths=(64, 24), width=128, embed_dim=24)
    depths = dict(encoder_depth=1, decoder_depth=1, stage_depths=(1, 1), decoder_depths=(1, 1), codebook_size=96)
    state = meditok.build("vitamin-small", seed=0, **widths, **depths).state_dict()
    path = tmp_path_factory.mktemp(MARKER) / "published.pth"
    torch.save({"args": {"img_size": 64, "data": MARKER}, "trainer": {"unitok": state}, "note": MARKER}, path)
    return path


def test_training_and_its_failures_keep_the_marker_to_themselves(forks, tmp_path):
    """Data, its manifest, a step, going on, and what is refused: other settings, a missing file, a broken picture."""
    data, out = tmp_path / f"{MARKER}_data", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    rows = ["path,modality,split,source,caption"]
    for number in range(4):
        png(data / f"{MARKER}{number}.png", noise(40, 40, 3))
        rows.append(f"{MARKER}{number}.png,us,train,{MARKER},{MARKER}")
    (data / "manifest.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "own.toml").write_text(
        'base = "tiny-stage1"\nstart = ""\nperceptual = 0.0\nsize = 32\nbatch = 2\nlog_every = 1\nsheet_every = 1\n'
        "weights_ok = false\n"
    )
    train = ["train", tmp_path / "own.toml", "--out", out / "run", f"--data={data}", "--log-json", "--debug"]
    made = forks.command(*train, "--steps=2", "--json", out / "r.json")
    assert made.code == 0, made
    check_silent(made, out)
    assert (out / "run" / "model.safetensors").exists() and not holds(made.out)
    refused = [
        forks.command(*train, "--steps=2", "--lr=1"),
        forks.command(*train, "--steps=2", f"--{MARKER}=1"),
        forks.command(*train, f"--init={tmp_path / MARKER}.safetensors", "--fresh"),
        forks.command(*train[:4], *train[5:], f"--data={tmp_path / MARKER}", "--fresh"),
    ]
    (data / f"{MARKER}0.png").write_bytes((data / f"{MARKER}0.png").read_bytes()[:200])
    refused.append(forks.command(*train, "--steps=2", "--fresh"))
    for result in refused:
        assert result.code in (2, 3, 4), result
        check_silent(result, out)


def test_converting_and_its_failures_keep_the_marker_to_themselves(forks, checkpoint, tmp_path):
    """What a checkpoint says of its own training is not carried over; nor are names told of files that are refused. The
    name of a good one is that of the model."""
    import torch

    out = tmp_path / "out"
    out.mkdir()
    good = forks.command(
        "convert", checkpoint, out / "m.safetensors", "--json", out / "r.json", "--log-json", "--debug"
    )
    assert good.code in (0, 4), good  # 4: torch is too old to read checkpoints safely
    check_silent(good, out)
    bad = {"empty": b"", "text": MARKER.encode() * 50, "cut": checkpoint.read_bytes()[:5000]}
    for name, content in bad.items():
        (tmp_path / f"{MARKER}_{name}.pth").write_bytes(content)
    torch.save({MARKER: torch.zeros(3), "note": MARKER}, tmp_path / f"{MARKER}_other.pth")
    names = [*(f"{MARKER}_{name}.pth" for name in (*bad, "other")), f"{MARKER}_missing.pth"]
    for name in names:
        result = forks.command("convert", tmp_path / name, out / "x.safetensors", "--log-json", "--debug")
        assert result.code in (2, 3, 4, 5), result
        check_silent(result, out)
    assert not (out / "x.safetensors").exists()


def test_failing_evaluations_and_exports_keep_the_marker_to_themselves(forks, checkpoint, inputs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    name = tmp_path / f"{MARKER}.parquet"
    name.write_bytes(b"PAR1" + MARKER.encode() * 20)
    broken = next((inputs / "in").rglob("*_broken.png"))
    for arguments in (
        ["evaluate", inputs / "in", "--perceptual", "none", "--size", 32],
        ["evaluate", broken, "--perceptual", "none", "--size", 32],
        ["evaluate", broken, "--model", checkpoint],
        ["evaluate", tmp_path / MARKER],
        ["export", name, "-o", out / "t.npz"],
        ["export", tmp_path / MARKER, "-o", out / "t.npz"],
        ["detokenize", name, "-o", out / "pictures"],
        ["reconstruct", broken, "-o", out / "pictures", "--size", 32],
        ["tokenize", broken, "-o", out / "t.parquet", "--model", checkpoint],
        ["inspect", tmp_path / MARKER],
    ):
        report = [] if arguments[0] == "export" else ["--json", out / "r.json"]
        result = forks.command(*arguments, *report, "--log-json", "--debug")
        assert result.code in (2, 3, 4, 5), (arguments, result)
        check_silent(result, out)


@pytest.mark.parametrize(("name", "make", "error", "code", "options"), BAD_INPUTS, ids=[e[0] for e in BAD_INPUTS])
def test_no_failure_tells_names_to_a_log_or_traceback(forks, tmp_path, name, make, error, code, options):
    """With --debug and --log-json, from a folder and a file of that name."""
    folder = tmp_path / f"{MARKER}_in"
    folder.mkdir()
    made = make(folder)
    path = made.rename(made.with_name(f"{MARKER}_{made.name}")) if made.name != "DICOMDIR" else made
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    out = tmp_path / "out"
    out.mkdir()
    common = ["--size", 32, "--debug", "--log-json", *arguments]
    report = ["--json", out / "r.json"]
    result = forks.command("tokenize", path, "-o", out / "store", "--on-error", "skip", *report, *common)
    # a list of inputs that is itself unsafe cannot be skipped: it ends the run with its own code
    assert result.code in ((code,) if code == 5 and path.suffix == ".parquet" else (3, 6)), result
    check_silent(result, out)
    shown = forks.command("tokenize", path, "-o", out / "t.parquet", "--debug", *common[:2], *arguments)
    # the terminal of the person who gave the path: there it stands once, in the message, and not in the traceback
    trace, _, last = shown.err.rstrip().rpartition("\n")
    assert last.startswith("meditok: error: ") and not holds(trace), shown.err


def test_what_libraries_say_of_marked_values_is_not_repeated(forks, tmp_path):
    """pydicom and nibabel quote values in warnings and errors: dates, numbers and codes that are none."""
    import pydicom

    path = marked_dicom(tmp_path / "x.dcm")
    good = pydicom.dcmread(path)
    broken = {
        "WindowCenter": ("DS", 0x00281050), "RescaleSlope": ("DS", 0x00281053),
        "InstanceNumber": ("IS", 0x00200013), "ImagePositionPatient": ("DS", 0x00200032),
        "PixelSpacing": ("DS", 0x00280030), "NumberOfFrames": ("IS", 0x00280008),
        "PhotometricInterpretation": ("CS", 0x00280004), "SOPClassUID": ("UI", 0x00080016),
        "SpecificCharacterSet": ("CS", 0x00080005), "VOILUTFunction": ("CS", 0x00281056),
    }  # fmt: skip
    for keyword, (vr, tag) in broken.items():
        data = pydicom.Dataset(good)
        data.file_meta = good.file_meta
        data[tag] = pydicom.DataElement(tag, "LO", MARKER)  # written as text of another type
        raw_name = tmp_path / f"{keyword}.dcm"
        data.save_as(raw_name)
        raw = bytearray(raw_name.read_bytes())
        at = raw.index(tag.to_bytes(4, "big")[1::-1] + tag.to_bytes(4, "big")[3:1:-1], 132)
        raw[at + 4 : at + 6] = vr.encode()
        raw_name.write_bytes(raw)
        out = tmp_path / f"{keyword}-out"
        out.mkdir()
        result = forks.command("tokenize", raw_name, "-o", out / "t.parquet", "--size", 32, "--debug")
        check_silent(result, out)
        assert result.code in (0, 3), result
        seen = forks.command("inspect", raw_name, "--json", "-", "--debug")
        assert not holds(seen.out + seen.err), seen


def test_a_program_in_the_preamble_is_warned_about_and_never_copied(forks, tmp_path):
    """MZ and ELF: the picture is good and read; no byte of the preamble is in what is written."""
    for start in (b"MZ\x90\0", b"\x7fELF"):
        path = marked_dicom(tmp_path / "poly.dcm")
        raw = path.read_bytes()
        path.write_bytes((start + b"PAYLOAD-" * 20)[:128] + raw[128:])
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        result = forks.command("reconstruct", path, "-o", out, "--size", 32)
        assert result.code == 0 and "begins like a program" in result.err
        assert forks.command("tokenize", path, "-o", out / "t.parquet", "--size", 32).code == 0
        assert not any(b"PAYLOAD" in data for _, data in everything(out))


def test_a_file_name_cannot_command_the_terminal(forks, tmp_path):
    """Control characters in a name are shown as escapes."""
    path = tmp_path / "a\x1b[2J\x07b.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    for command in (["tokenize", path, "-o", tmp_path / "t.parquet"], ["inspect", path], ["inspect", tmp_path]):
        result = forks.command(*command)
        assert "\x1b" not in result.out + result.err and "\x07" not in result.out + result.err
        assert result.code == 3 and "\\x1b" in result.out + result.err


def test_a_turned_photograph_is_turned_once_and_it_is_recorded(forks, tmp_path):
    """EXIF orientation 6: the picture is shown upright, and what is written says nothing of it."""
    from PIL import Image

    from meditok.data import read

    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(6, 10)).save(tmp_path / "x.png", exif=exif)
    image = read(tmp_path / "x.png")
    stored = np.arange(60).reshape(6, 10)
    assert (image.height, image.width) == (10, 6) and "exif orientation 6 applied" in image.steps
    assert np.allclose((image.pixels[0].numpy() + 1) * 127.5, np.rot90(stored, -1), atol=1e-3)
    assert forks.command("reconstruct", tmp_path / "x.png", "-o", tmp_path / "out", "--size", 32).code == 0
    (written,) = (tmp_path / "out").glob("*.png")
    with Image.open(written) as picture:
        assert picture.size == (6, 10) and not picture.getexif() and not picture.info
