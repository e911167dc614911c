"""No name, tag, identifier or path reaches an output, report, log or traceback, whatever the command or failure."""

import shutil

import numpy as np
import pytest

from tests.hostile.marked import MARKER, everything, holds, marked_dicom, marked_files, marked_manifest
from tests.readers.bad_inputs import BAD_INPUTS

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
