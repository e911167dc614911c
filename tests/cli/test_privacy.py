"""Names and tags stay out of everything that is written, and inputs stay as they are."""

import numpy as np
import pytest
from PIL import Image

MARKER = "ZQXMARKER"


@pytest.fixture
def marked(make, tmp_path):
    """A folder whose file names and DICOM text tags all hold the marker; one file is broken."""
    folder = tmp_path / "in" / f"{MARKER}_ward"
    volume = make.noise((32, 32, 3), 1000, dtype=np.int16)
    make.ct_series(folder / f"{MARKER}_ct", volume, text=MARKER)
    Image.fromarray(make.noise((40, 40, 3))).save(folder / f"{MARKER}_photo.jpg", comment=MARKER)
    (folder / f"{MARKER}_cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    make.nifti(folder / f"{MARKER}_mr.nii.gz", np.zeros((32, 32, 3), np.int16), np.eye(4))
    return folder.parent


def written(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def holds_marker(data: bytes) -> bool:
    return MARKER.encode() in data.upper()


def everything_under(folder):
    """Names and contents of all files, gzip and Parquet undone."""
    import gzip

    import pyarrow.parquet as pq

    for path in written(folder):
        yield str(path.relative_to(folder)).encode()
        data = path.read_bytes()
        yield data
        if path.suffix == ".gz":
            yield gzip.decompress(data)
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            yield str(file.read().to_pylist()).encode() + str(file.metadata.metadata).encode()


def test_no_marker_reaches_an_output_a_report_or_a_json_log(cli, marked, tmp_path, patch_model):
    out = tmp_path / "out"
    out.mkdir()
    logs = []
    common = ["--on-error", "skip", "--log-json"]
    for arguments in (
        ["tokenize", marked, "-o", out / "t.parquet", "--json", out / "a.json", *common],
        ["tokenize", marked, "-o", out / "store", "--json", out / "b.json", *common],
        ["tokenize", marked, "-o", out / "none", "--dry-run", "--json", out / "c.json", *common],
        ["inspect", marked, "--json", out / "d.json", *common],
        ["reconstruct", marked, "-o", out / "pictures", "--json", out / "e.json", *common],
        ["detokenize", out / "t.parquet", "-o", out / "again", "--json", out / "f.json", "--log-json"],
        ["tokenize", marked, "-o", out / "fails", "--log-json", "--debug"],
    ):
        code, stdout, err = cli(*arguments)
        assert code in (0, 3, 6), err
        logs.append(err if arguments[0] != "inspect" else err)
    assert not holds_marker("".join(logs).encode())
    for data in everything_under(out):
        assert not holds_marker(data)
    assert len(written(out)) > 12


def test_library_warnings_that_quote_values_are_not_repeated(cli, make, tmp_path, patch_model):
    path = tmp_path / "in" / "x.dcm"
    make.ct(path, make.noise((32, 32), 1000, dtype=np.int16))
    import pydicom

    data = pydicom.dcmread(path)
    with pytest.warns(UserWarning):
        data.PatientBirthDate = MARKER
        data.StudyTime = MARKER
    data.save_as(path)
    code, out, err = cli("tokenize", path, "-o", tmp_path / "t.parquet", "--debug")
    assert code == 0 and MARKER not in out + err


def test_keep_names_is_the_way_to_have_names(cli, marked, tmp_path, patch_model):
    code, _, _ = cli("tokenize", marked, "-o", tmp_path / "store", "--on-error", "skip", "--keep-names")
    assert code == 6
    assert any(holds_marker(data) for data in everything_under(tmp_path / "store"))
    assert MARKER in (tmp_path / "store" / "failures.jsonl").read_text()


def test_no_command_changes_a_byte_of_its_inputs(cli, marked, tmp_path, patch_model):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in written(marked)}
    photo = next(marked.rglob("*.jpg"))
    cli("tokenize", marked, "-o", tmp_path / "t.parquet", "--on-error", "skip", "--keep-names")
    cli("detokenize", tmp_path / "t.parquet", "-o", tmp_path / "out")
    for command in (
        ["inspect", photo],
        ["reconstruct", photo, "-o", tmp_path / "r"],
        ["reconstruct", photo, "-o", photo.parent, "--keep-names"],
        ["tokenize", photo, "-o", photo],
    ):
        cli(*command)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in written(marked)} == before
