"""Folders, globs, manifests and tars: everything found is ok, failed or ignored, and names never collide."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from meditok._lazy import require
from meditok.data import ReadOptions, discover
from meditok.errors import BadInputError, IntensityError, MissingPartError, UsageError
from tests.readers import make_dicom as dicom
from tests.readers.bad_dicom import b19_rtstruct, b19_secondary
from tests.readers.bad_pictures import noise, png
from tests.readers.bad_volumes import nifti, tar


def names(discovery):
    return sorted(row.name for source in discovery.sources for row in source.rows())


def test_a_mixed_folder_is_sorted_out_completely(tmp_path):
    """Pictures become rows; reports, captures, texts and hidden files are ignored with a reason."""
    (tmp_path / "x").mkdir()
    png(tmp_path / "x" / "a.png", noise(8, 8))
    nifti(tmp_path / "v.nii.gz", np.arange(27, dtype=np.int16).reshape(3, 3, 3))
    dicom.write(tmp_path / "s.dcm", dicom.dataset(noise(8, 8, dtype=np.uint16), "CT", **dicom.slice_tags(0, 1)))
    b19_rtstruct(tmp_path)
    b19_secondary(tmp_path)
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    found = discover([tmp_path])
    rows = [row for source in found.sources for row in source.rows()]
    assert names(found) == ["broken.png#0", "s.dcm#0", "v.nii.gz#0", "v.nii.gz#1", "v.nii.gz#2", "x/a.png#0"]
    assert [row.name for row in rows if row.error] == ["broken.png#0"] and not found.failed
    assert len(found.ignored) == 4 and all(reason for _, reason in found.ignored)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_a_folder_is_ignored_and_never_opened(tmp_path):
    """Opening one would wait for a writer for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    assert discover([tmp_path]).ignored == [(str(tmp_path / "pipe.png"), "a pipe or device")]


def test_names_are_relative_to_their_input_and_equal_ones_are_an_error(tmp_path):
    """Folder, file and glob."""
    for site in ("a", "b"):
        (tmp_path / site).mkdir()
        png(tmp_path / site / "1.png", noise(8, 8))
    assert names(discover([tmp_path])) == ["a/1.png#0", "b/1.png#0"]
    assert names(discover([str(tmp_path / "*" / "1.png")])) == ["a/1.png#0", "b/1.png#0"]
    assert names(discover([tmp_path / "a" / "1.png"])) == ["1.png#0"]
    with pytest.raises(UsageError, match="same name 1.png"):
        discover([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(BadInputError, match="no such file"):
        discover([tmp_path / "c"])
    with pytest.raises(UsageError, match="no file matches"):
        discover([str(tmp_path / "*.dcm")])


def test_a_glob_takes_files_folders_tars_and_manifests_as_a_shell_would_give_them(tmp_path):
    """Names are relative to the folder in front of the first wildcard; nothing that matches is dropped."""
    data = (tmp_path / "picture").with_suffix(".png")
    png(data, noise(8, 8))
    for site in ("a", "b"):
        (tmp_path / "in" / site).mkdir(parents=True)
        png(tmp_path / "in" / site / "1.png", noise(8, 8))
    tar(tmp_path / "in" / "t.tar", ("x/k.png", data.read_bytes()))
    (tmp_path / "in" / "list.csv").write_text("path,id\na/1.png,one\n")
    assert names(discover([f"{tmp_path}/in/*"])) == ["a/1.png#0", "b/1.png#0", "t.tar/x/k.png#0"]
    assert names(discover([f"{tmp_path}/in/*.tar"])) == ["t.tar/x/k.png#0"]
    assert names(discover([f"{tmp_path}/in/*.csv"])) == ["one#0"]
    assert names(discover([f"{tmp_path}/in/**/*.png"])) == ["a/1.png#0", "b/1.png#0"]
    assert names(discover([f"{tmp_path}/in/**"])) == ["a/1.png#0", "b/1.png#0", "t.tar/x/k.png#0"]


def test_a_folder_that_cannot_be_listed_is_a_failure(tmp_path):
    """Here because its path is longer than the system allows."""
    png(tmp_path / "a.png", noise(8, 8))
    before = os.getcwd()
    os.chdir(tmp_path)
    for _ in range(25):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    os.chdir(before)
    found = discover([tmp_path])
    assert names(found) == ["a.png#0"]
    ((path, error),) = found.failed
    assert isinstance(error, BadInputError) and "cannot be listed (File name too long)" in str(error)
    assert found.names[path].startswith("ddd")


def test_links_to_folders_and_packed_archives_are_left_out_with_a_warning(tmp_path):
    """They may hold pictures: links could lead round in a circle, and archives are only read as plain tars."""
    png(tmp_path / "a.png", noise(8, 8))
    os.symlink(tmp_path, tmp_path / "again")
    (tmp_path / "b.tar.gz").write_bytes(b"\x1f\x8b\x08")
    found = discover([tmp_path])
    assert names(found) == ["a.png#0"]
    assert sorted(reason for _, reason in found.ignored) == ["a compressed archive", "a link to a folder"]
    assert [warning.partition(": ")[0] for warning in found.warnings] == [f"{tmp_path}/again", f"{tmp_path}/b.tar.gz"]
    ((_, error),) = discover([tmp_path / "b.tar.gz"]).failed
    assert "make a plain .tar of it" in str(error)


def test_failures_carry_the_names_their_rows_would_have_had(tmp_path):
    """So that two of one basename are two in reports and lists of failures."""
    for site in ("a", "b"):
        (tmp_path / site).mkdir()
        (tmp_path / site / "1.png").write_bytes(b"")
        tar(tmp_path / site / "t.tar", ("../x.png", b""))
    (tmp_path / "list.csv").write_text("path\ngone.png\n")
    for given, expected in (
        ([tmp_path], ["a/1.png", "a/t.tar/../x.png", "b/1.png", "b/t.tar/../x.png"]),
        ([f"{tmp_path}/*/1.png"], ["a/1.png", "b/1.png"]),
        ([tmp_path / "a" / "t.tar"], ["t.tar/../x.png"]),
        ([tmp_path / "list.csv"], ["list.csv row 2"]),
    ):
        assert sorted(discover(given).names.values()) == expected


def test_a_manifest_gives_modality_columns_and_ids(tmp_path):
    """CSV and Parquet; `identifier` works for `path`; published modality names are understood."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    png(tmp_path / "a.png", noise(8, 8))
    png(tmp_path / "ct.png", np.full((8, 8), 1089, np.uint16))
    rows = [("a.png", "Ultrasound", "p1", "benign", ""), ("ct.png", "CT", "p2", "", "1024")]
    text = "identifier,modality,group,label,ct_bias\n" + "\n".join(",".join(row) for row in rows)
    (tmp_path / "list.csv").write_text(text)
    columns = dict(zip(["path", "modality", "group", "label", "ct_bias"], zip(*rows, strict=True), strict=True))
    columns["ct_bias"] = [None, 1024.0]
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    for manifest in ("list.csv", "list.parquet"):
        found = discover([tmp_path / manifest])
        images = {row.name: row for source in found.sources for row in source.rows()}
        assert images["a.png#0"].image.modality == "us" and images["a.png#0"].columns["group"] == "p1"
        assert images["ct.png#0"].image.unit == "HU" and images["ct.png#0"].image.pixels[0, 0, 0] == np.float32(0.065)
    (tmp_path / "ids.csv").write_text("path,id\na.png,one\n")
    assert names(discover([tmp_path / "ids.csv"])) == ["one#0"]


def test_a_folders_manifest_labels_its_files(tmp_path):
    """manifest.csv in a folder is no picture list but gives modality and label."""
    png(tmp_path / "a.png", noise(8, 8))
    (tmp_path / "manifest.csv").write_text("path,modality,label\na.png,fundus,healthy\n")
    (row,) = discover([tmp_path]).sources[0].rows()
    assert row.image.modality == "fundus" and row.columns["label"] == "healthy"


def test_bad_manifest_rows_are_listed_up_to_twenty(tmp_path):
    """The first failure lists them; every bad row is a failure of its own."""
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(f"missing{n}.png" for n in range(30)))
    found = discover([tmp_path / "list.csv"])
    assert len(found.failed) == 30 and "30 bad rows" in str(found.failed[0][1])
    assert str(found.failed[0][1]).count("missing") == 20 and "and 10 more" in str(found.failed[0][1])


def test_a_webdataset_tar_is_read_in_memory_with_its_sidecars(tmp_path):
    """KEY.png with KEY.json; values windowed before are taken as displayed; nothing is extracted."""
    buffer = io.BytesIO()
    Image.fromarray(noise(8, 8)).save(buffer, "PNG")
    shown = json.dumps({"modality": "CT", "intensity": "display 8-bit", "caption": "a slice"}).encode()
    path = tar(
        tmp_path / "t.tar",
        ("k1.png", buffer.getvalue()),
        ("k1.json", shown),
        ("k2.png", buffer.getvalue()),
        ("k2.json", json.dumps({"modality": "CT"}).encode()),
        ("note.txt", b"x"),
    )
    found = discover([path])
    rows = {row.name: row for source in found.sources for row in source.rows()}
    assert rows["t.tar/k1.png#0"].image.modality == "ct" and rows["t.tar/k1.png#0"].columns["caption"] == "a slice"
    assert isinstance(rows["t.tar/k2.png#0"].error, IntensityError)
    assert len(found.ignored) == 1 and sorted(item.name for item in tmp_path.iterdir()) == ["t.tar"]


def test_ct_windows_touch_ct_rows_only(tmp_path):
    """Among others a CT window leaves them alone; with no CT at all it is a usage error."""
    png(tmp_path / "a.png", noise(8, 8))
    png(tmp_path / "b.png", noise(9, 9))
    with pytest.raises(UsageError, match="for CT"):
        discover([tmp_path], ReadOptions(window="lung"))
    single = discover([tmp_path / "a.png"], ReadOptions(window="lung"))
    assert isinstance(single.failed[0][1], IntensityError) and not single.sources
    (tmp_path / "folder").mkdir()
    png(tmp_path / "folder" / "of_one.png", noise(8, 8))
    with pytest.raises(UsageError, match="for CT"):
        discover([tmp_path / "folder"], ReadOptions(window="lung"))
    (tmp_path / "folder" / "of_one.png").unlink()
    dicom.write(tmp_path / "c.dcm", dicom.dataset(noise(8, 8, dtype=np.uint16), "CT"))
    windows = {
        row.name: row.image.window
        for source in discover([tmp_path], ReadOptions(window="lung")).sources
        for row in source.rows()
    }
    assert windows == {"a.png#0": "full", "b.png#0": "full", "c.dcm#0": "lung"}


def test_probe_tells_what_a_run_would_do(tmp_path):
    """One record a file, with frames, window, steps and no pixels."""
    nifti(tmp_path / "v.nii.gz", np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    (record,) = discover([tmp_path], ReadOptions(modality="mr")).sources[0].probe()
    assert (record["frames"], record["height"], record["width"]) == (5, 4, 3) and record["error"] is None
    assert record["window"].startswith("percentile") and record["steps"]


def test_a_frame_that_a_source_lacks_is_a_failed_row(tmp_path):
    """Nothing disappears because --frame is out of range."""
    png(tmp_path / "a.png", noise(8, 8))
    (row,) = discover([tmp_path], ReadOptions(frame=3)).sources[0].rows()
    assert row.image is None and "0..0" in str(row.error)


def test_unknown_options_are_usage_errors():
    """With what would be right."""
    for wrong in (
        {"modality": "brain"},
        {"nonfinite": "drop"},
        {"plane": "oblique"},
        {"bits": 99},
        {"frame": -1},
    ):
        with pytest.raises(UsageError):
            ReadOptions(**wrong)


def test_a_missing_package_is_named_with_its_pip_command():
    """In one line; what is there is returned."""
    with pytest.raises(
        MissingPartError, match=r"^no_such_package is needed for dreams .* pip install no_such_package$"
    ):
        require("no_such_package", "dreams")
    assert require("json", "anything") is json


def test_importing_the_readers_loads_no_format_library():
    """Pillow, pydicom, nibabel and pyarrow come with the first file of their kind."""
    formats = ("PIL", "pydicom", "nibabel", "pyarrow")
    script = f"import sys, meditok.data; print([m for m in {formats!r} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
