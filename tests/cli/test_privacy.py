"""Names are written where they are asked for (tests/hostile: and nowhere else), and inputs stay as they are."""

import numpy as np
import pytest
from PIL import Image

from tests.hostile.marked import MARKER, everything, holds


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


def test_keep_names_is_the_way_to_have_names(cli, marked, tmp_path, patch_model):
    code, _, _ = cli("tokenize", marked, "-o", tmp_path / "store", "--on-error", "skip", "--keep-names")
    assert code == 6
    assert any(holds(data) for _, data in everything(tmp_path / "store"))
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
