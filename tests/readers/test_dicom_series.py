"""Folders of DICOM: grouped by series, sorted by position, gaps and duplicates named, nothing dropped."""

import pickle

import numpy as np
import pytest

from meditok.data import ReadOptions, discover, frames, geometry, read
from meditok.errors import MultiFrameError, NotAnImageError, UsageError
from tests.readers import make_dicom as dicom
from tests.readers.bad_pictures import noise


def write_slice(path, z, instance, pixels=None, **tags):
    pixels = np.full((16, 16), int(100 + z), np.uint16) if pixels is None else pixels
    return dicom.write(path, dicom.dataset(pixels, tags.pop("modality", "CT"), **dicom.slice_tags(z, instance, **tags)))


def series(folder, heights, **tags):
    for number, z in enumerate(heights):  # named so that the order of names is not the order of heights
        write_slice(folder / f"IM{(number * 7) % 100:03d}.dcm", z, number + 1, **tags)


def test_slices_are_sorted_by_position_not_by_name(tmp_path):
    """Every slice becomes a row, with its index, position and the shared affine."""
    series(tmp_path, [8.0, 2.0, 0.0, 6.0, 4.0])
    found = discover([tmp_path])
    assert len(found.sources) == 1 and not found.warnings
    images = [row.image for row in found.sources[0].rows()]
    assert [image.position for image in images] == [0, 2, 4, 6, 8] and [image.slice for image in images] == list(
        range(5)
    )
    assert len({image.geometry for image in images}) == 1 and len({image.volume for image in images}) == 1
    assert images[0].geometry.original_shape == (16, 16, 5) and images[0].geometry.spacing == (1.0, 1.0, 2.0)


def test_the_affine_places_voxels_in_ras_millimetres(tmp_path):
    """The first voxel is ImagePositionPatient with both first axes turned; columns run along i."""
    series(tmp_path, [0.0, 2.0, 4.0], PixelSpacing=[3.0, 0.5])
    image = next(frames(tmp_path))
    affine = geometry.affine_matrix(image.geometry)
    assert np.allclose(affine @ [0, 0, 0, 1], [10, 20, 0, 1])
    assert np.allclose(affine @ [1, 2, 1, 1], [9.5, 14, 2, 1])


def test_a_missing_slice_is_named_with_its_position_and_skips_a_slot(tmp_path):
    """The grid keeps an empty slot, so that the affine stays true."""
    series(tmp_path, [0.0, 2.0, 6.0, 8.0])
    found = discover([tmp_path])
    assert "1 slices missing, at 4.00 mm" in found.warnings[0]
    images = [row.image for row in found.sources[0].rows()]
    assert [image.slice for image in images] == [0, 1, 3, 4] and images[0].geometry.original_shape[2] == 5


def test_duplicates_are_kept_and_warned_about(tmp_path):
    """A repeated position becomes a volume of its own; no row is lost and none collides."""
    series(tmp_path, [0.0, 2.0, 2.0, 4.0])
    found = discover([tmp_path])
    rows = list(found.sources[0].rows())
    assert len(rows) == 4 and "repeat a position (at 2.00 mm)" in found.warnings[0]
    assert len({(row.image.volume, row.image.slice) for row in rows}) == 4


def test_two_series_two_sizes_and_a_localiser_are_kept_apart(tmp_path):
    """Two sources for the series, one for the other size; the localiser is ignored with a warning."""
    series(tmp_path / "a", [0.0, 2.0, 4.0])
    series(tmp_path / "b", [0.0, 2.0], SeriesInstanceUID="1.2.3.4", SeriesNumber=2)
    write_slice(tmp_path / "c.dcm", 9.0, 9, np.zeros((8, 8), np.uint16))
    write_slice(tmp_path / "scout.dcm", 1.0, 10, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    found = discover([tmp_path])
    assert sorted(len(source.slices) for source in found.sources) == [1, 2, 3]
    assert [reason for _, reason in found.ignored] == ["localiser (--include-secondary reads it)"]
    assert any("localiser" in note for note in found.warnings)
    assert any("2 orientations, sizes or spacings" in note for note in found.warnings)
    volumes = [{row.image.volume for row in source.rows()} for source in found.sources]
    assert all(len(keys) == 1 for keys in volumes) and len(set.union(*volumes)) == 3
    chosen = discover([tmp_path], ReadOptions(series="2"))
    assert len(chosen.sources) == 1 and len(chosen.sources[0].slices) == 2
    with pytest.raises(UsageError, match="--series"):
        discover([tmp_path], ReadOptions(series="99"))
    with pytest.raises(NotAnImageError, match="localiser"):
        read(tmp_path / "scout.dcm")


def test_without_pixel_spacing_slices_are_sorted_but_no_volume_is_claimed(tmp_path):
    """The rows come in order, with a warning and without an affine."""
    series(tmp_path, [4.0, 0.0, 2.0], PixelSpacing=None)
    found = discover([tmp_path])
    images = [row.image for row in found.sources[0].rows()]
    assert [image.position for image in images] == [0, 2, 4]
    assert "PixelSpacing" in found.warnings[0] and all(not i.volume and i.geometry.affine is None for i in images)


def test_mr_percentiles_hold_for_the_whole_series(tmp_path):
    """One window for all slices; the same window of all files wins over percentiles; unequal ones do not."""
    stack = noise(3, 16, 16, dtype=np.uint16, top=3000)
    for z, pixels in enumerate(stack):
        write_slice(tmp_path / "p" / f"{z}.dcm", float(z), z, pixels, modality="MR")
        write_slice(
            tmp_path / "w" / f"{z}.dcm",
            float(z),
            z,
            pixels,
            modality="MR",
            WindowCenter=500,
            WindowWidth=1000,
        )
        write_slice(
            tmp_path / "u" / f"{z}.dcm",
            float(z),
            z,
            pixels,
            modality="MR",
            WindowCenter=500 + z,
            WindowWidth=1000,
        )
    expected = np.percentile(stack.astype(np.float64), [0.5, 99.5])
    for folder in ("p", "u"):
        windows = {(image.low, image.high) for image in frames(tmp_path / folder)}
        assert windows == {tuple(expected)}
    assert {(image.low, image.high) for image in frames(tmp_path / "w")} == {(0.0, 999.0)}


def test_one_broken_slice_fails_alone(tmp_path):
    """The others keep their rows; found = ok + failed."""
    series(tmp_path, [0.0, 2.0, 4.0], modality="MR")
    broken = tmp_path / "IM007.dcm"
    broken.write_bytes(broken.read_bytes()[:-100])
    found = discover([tmp_path])
    rows = [row for source in found.sources for row in source.rows()]
    assert [type(row.error).__name__ for row in rows if row.error] == ["TruncatedDicomError"]
    assert sum(row.image is not None for row in rows) == 2 and len(found.failed) == 0


def test_an_enhanced_file_is_sorted_by_its_frame_positions(tmp_path):
    """Frame numbers stay those of the file; slices follow the position."""
    from pydicom.dataset import Dataset

    data = dicom.dataset(noise(3, 8, 8, dtype=np.uint16, top=500), "MR", sop="1.2.840.10008.5.1.4.1.1.4.1")
    shared, plane, pixel = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient, pixel.PixelSpacing, pixel.SliceThickness = [1, 0, 0, 0, 1, 0], [1, 1], 3
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [plane], [pixel]
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = [shared], []
    for z in (6.0, 0.0, 3.0):
        outer, inner = Dataset(), Dataset()
        inner.ImagePositionPatient = [0, 0, z]
        outer.PlanePositionSequence = [inner]
        data.PerFrameFunctionalGroupsSequence.append(outer)
    path = dicom.write(tmp_path / "e.dcm", data)
    images = list(frames(path))
    assert [(image.frame, image.slice, image.position) for image in images] == [
        (1, 0, 0),
        (2, 1, 3),
        (0, 2, 6),
    ]
    with pytest.raises(MultiFrameError) as caught:
        read(path)
    assert caught.value.frames == 3 and pickle.loads(pickle.dumps(caught.value)).frames == 3


def test_rows_are_named_by_relative_path_and_sources_travel_to_workers(tmp_path):
    """Equal file names in two folders do not collide; a Source can be pickled."""
    write_slice(tmp_path / "siteA" / "IM1.dcm", 0.0, 1)
    write_slice(tmp_path / "siteB" / "IM1.dcm", 0.0, 1, SeriesInstanceUID="1.2.3")
    found = pickle.loads(pickle.dumps(discover([tmp_path])))
    assert sorted(row.name for source in found.sources for row in source.rows()) == [
        "siteA/IM1.dcm#0",
        "siteB/IM1.dcm#0",
    ]
