"""The real files beside the repository: all read, or fail by name."""

import os
from pathlib import Path

import pytest

from meditok.data import ReadOptions, discover, frames
from meditok.errors import MeditokError


def shared() -> Path:
    """The folder of real data, or a skip naming what is absent."""
    folder = Path(os.environ.get("MEDITOK_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data and no MEDITOK_SHARED")
    return folder


def test_every_dicom_reads():
    """33 files of all modalities and codecs, secondary captures too; CT in HU, all pixels in range."""
    found = discover([shared() / "dicom"], ReadOptions(include_secondary=True))
    assert not found.failed and not found.ignored
    rows = [row for source in found.sources for row in source.rows()]
    assert not [row.error for row in rows if row.error] and len({row.name.partition("#")[0] for row in rows}) == 33
    for row in rows:
        assert row.image.pixels.abs().max() <= 1 and row.image.pixels.std() > 0 and row.image.steps
        assert (row.image.unit == "HU") == (row.image.modality == "ct")


def test_two_codecs_of_one_picture_agree():
    """CT2 and MR4 are there lossless and lossy."""
    folder = shared() / "dicom"
    for one, two, tolerance in (("CT2_RLE", "CT2_J2KI", 0.02), ("MR4_RLE", "MR4_JLSN", 0.05)):
        a, b = (next(frames(folder / f"wg04_{name}.dcm")) for name in (one, two))
        assert (a.pixels - b.pixels).abs().mean() < tolerance


def test_secondary_captures_are_ignored_in_a_folder_and_counted():
    """found = ok + failed + ignored."""
    found = discover([shared() / "dicom"])
    rows = sum(len({row.name.partition("#")[0] for row in source.rows()}) for source in found.sources)
    assert rows + len(found.ignored) == 33 and not found.failed and len(found.ignored) == 10


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_both_volumes_read_in_every_plane(plane):
    """CT by option, T1 by its sform; HU stay HU."""
    folder = shared() / "volumes"
    ct = list(frames(folder / "ct_head_hu_int16.nii.gz", plane=plane, modality="ct"))
    t1 = list(frames(folder / "mri_t1_head_float32.nii.gz", plane=plane, modality="mr"))
    assert len(ct) == {"axial": 108}.get(plane, 128) and ct[0].unit == "HU"
    assert len(t1) == {"axial": 91, "coronal": 109, "sagittal": 91}[plane]


@pytest.mark.parametrize("split", ["val-000", "train-000"])
def test_the_training_tars_read_in_full(split):
    """8-bit CT that was windowed before is taken as displayed, HU + 1024 as HU."""
    found = discover([shared() / "train" / f"meditok-{split}.tar"])
    assert not found.failed and len(found.sources) > 100
    units = set()
    for source in found.sources:
        for row in source.rows():
            assert row.error is None, row.error
            assert row.image.pixels.shape == (3, 256, 256)
            units.add((row.image.modality, row.image.unit))
    assert {("ct", "HU"), ("ct", "display"), ("mr", "display"), ("histology", "display")} <= units


def test_pydicoms_own_files_read_or_fail_by_name():
    """Nothing but our errors leaves the reader."""
    import pydicom

    counts = {"ok": 0, "named": 0}
    for path in sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")):
        try:
            for image in frames(path, include_secondary=True):
                assert image.pixels.abs().max() <= 1
            counts["ok"] += 1
        except MeditokError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            counts["named"] += 1
    assert counts["ok"] > 45


def test_scikit_images_pictures_read_or_fail_by_name():
    """The retina and the histology picture of the demo among them."""
    skimage = pytest.importorskip("skimage")
    read_names = set()
    for path in sorted((Path(skimage.__file__).parent / "data").glob("*.*")):
        try:
            list(frames(path))
            read_names.add(path.name)
        except MeditokError as error:
            assert str(path) in str(error)
    assert {"retina.jpg", "ihc.png"} & read_names
