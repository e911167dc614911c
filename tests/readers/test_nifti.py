"""NIfTI volumes: orientation, affines, scaling, lazy reading, non-finite values."""

import gzip
import itertools
import json
import subprocess
import sys
import textwrap

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meditok.data import ReadOptions, discover, fit, frames, from_display, geometry, read, to_display, unfit
from meditok.data.windows import to_native
from meditok.errors import GeometryError, HeaderMismatchError, IntensityError, NonFiniteError, UsageError
from tests.readers.bad_volumes import nifti
from tests.readers.memory import PEAK_GIB

CT = {"modality": "ct", "window": "-1000:1000"}
ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def oriented(path, order, signs, shape=(5, 6, 7)):
    """A volume whose voxel axes run along the world axes `order` with `signs`; one corner is marked.

    The mark lies at the world corner of largest R, A and S. Returns its world coordinates.
    """
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    sizes = [2.0, 3.0, 4.0]  # mm along R, A, S
    for voxel, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, voxel] = sign * sizes[world]
    affine[:3, 3] = [-7, 11, 13]
    data = np.full(shape, -1000, np.int16)
    corner = tuple(n - 1 if sign > 0 else 0 for n, sign in zip(shape, signs, strict=True))
    data[corner] = 1000
    nifti(path, data, affine)
    return affine @ [*corner, 1]


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_a_marked_corner_is_shown_where_radiologists_look_and_comes_back_to_its_world_point(tmp_path, order, signs):
    """In all 48 axis orders and all planes: right at the left, anterior or superior up, exact way back."""
    world = oriented(tmp_path / "v.nii", order, signs)
    # The corner is right-most, front-most, top-most: at the top left in every plane.
    for plane in ("axial", "coronal", "sagittal", "native"):
        images = list(frames(tmp_path / "v.nii", plane=plane, **CT))
        volume = np.empty(images[0].geometry.original_shape)
        for image in images:
            if plane != "native" and image.pixels.max() > 0:
                assert image.pixels[0, 0, 0] == 1
            fitted = fit(image, 32)[0]
            back = unfit(fitted.pixels, fitted.geometry)
            assert back.shape == image.pixels.shape
            stored = from_display(image.pixels[0], image.geometry)
            index = [slice(None)] * 3
            index[image.geometry.axis] = image.slice
            volume[tuple(index)] = stored.numpy()
        marked = np.argwhere(volume == 1)
        assert len(marked) == 1
        assert np.allclose(geometry.affine_matrix(images[0].geometry) @ [*marked[0], 1], world)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 47),
    st.sampled_from(["axial", "coronal", "sagittal", "native"]),
    st.tuples(*[st.integers(1, 6)] * 3),
)
def test_showing_and_unshowing_a_slice_are_inverse(which, plane, shape):
    """For any orientation, plane and shape, in numpy and in torch."""
    order, signs = ORIENTATIONS[which]
    affine = np.eye(4)
    affine[:3, :3] = 0
    for voxel, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, voxel] = sign
    place = geometry.volume_geometry(shape, affine, plane)
    sizes = [n for axis, n in enumerate(shape) if axis != place.axis]
    piece = np.arange(np.prod(sizes)).reshape(sizes)
    shown = to_display(piece, place)
    assert shown.shape == geometry.displayed_size(place)
    assert np.array_equal(from_display(shown, place), piece)
    assert np.array_equal(to_display(torch.from_numpy(piece), place).numpy(), shown)


def test_sform_wins_then_qform_and_disagreement_is_warned(tmp_path):
    """Which affine is used is recorded."""

    def shift(header):
        header["srow_x"][3] += 5

    data = np.zeros((4, 4, 4), np.int16)
    both = read(nifti(tmp_path / "b.nii", data, sform=2, qform=1, edit=shift), frame=0, modality="ct")
    assert both.steps[0] == "affine sform code 2" and "disagree by up to 5 mm" in both.warnings[0]
    only = read(nifti(tmp_path / "q.nii", data, sform=0, qform=1), frame=0, modality="ct")
    assert only.steps[0] == "affine qform code 1" and not only.warnings
    assumed = read(nifti(tmp_path / "n.nii", data, sform=0), frame=0, modality="ct", assume_affine=True)
    assert "not known" in assumed.warnings[0]
    with pytest.raises(GeometryError, match="--assume-affine"):
        read(tmp_path / "n.nii", frame=0, modality="ct")


def test_oblique_volumes_are_sliced_along_the_nearest_axis_with_a_note(tmp_path):
    """Nothing is resampled."""
    angle = np.deg2rad(20)
    affine = np.eye(4)
    affine[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image = read(nifti(tmp_path / "o.nii", np.zeros((4, 5, 6), np.int16), affine), frame=2, modality="ct")
    assert image.geometry.axis == 2 and any("oblique" in note for note in image.warnings)


def test_scaling_is_applied_in_float_and_slope_zero_or_nan_means_none(tmp_path):
    """scl_slope 0 is the standard's "unscaled"; a slope with an intercept of NaN is refused."""

    def scale(slope, inter):
        def edit(header):
            header["scl_slope"], header["scl_inter"] = slope, inter

        return edit

    data = np.full((3, 3, 3), 100, np.int16)
    value = {}
    for slope, inter in ((2.5, -7), (0, 0), (np.nan, np.nan), (0, 3)):
        path = nifti(tmp_path / "s.nii", data, edit=scale(slope, inter))
        image = read(path, frame=0, modality="mr", window="0:1000")
        value[slope, inter] = round(to_native(image.pixels, 0, 1000)[0, 0, 0].item(), 3)
    assert list(value.values()) == [243, 100, 100, 100]
    with pytest.raises(HeaderMismatchError, match="scl_inter"):
        read(nifti(tmp_path / "s.nii", data, edit=scale(2, np.nan)), frame=0)


def test_four_dimensions_need_a_time_index(tmp_path):
    """And give that volume; a fourth axis of length one needs none."""
    data = np.stack([np.full((4, 4, 4), value, np.int16) for value in (0, 10, 20)], -1)
    nifti(tmp_path / "t.nii.gz", data)
    image = read(tmp_path / "t.nii.gz", frame=1, time_index=2, modality="mr", window="0:20")
    assert image.pixels.min() == 1
    with pytest.raises(UsageError, match="0..2"):
        read(tmp_path / "t.nii.gz", frame=0, time_index=3)
    nifti(tmp_path / "one.nii.gz", data[..., :1])
    assert len(list(frames(tmp_path / "one.nii.gz", modality="mr"))) == 4


def test_rgb_volumes_are_shown_as_they_are(tmp_path):
    """NIfTI datatype RGB24."""
    data = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    data["R"] = 255
    image = read(nifti(tmp_path / "c.nii", data), frame=0)
    assert image.channels == 3 and image.pixels[0].min() == 1 and image.pixels[1].max() == -1


@pytest.mark.parametrize(("policy", "expected"), [("zero", 0.0), ("min", -50.0)])
def test_nonfinite_voxels_are_counted_or_replaced_as_asked(tmp_path, policy, expected):
    """One NaN, an infinity; all NaN has no minimum."""
    data = np.full((4, 4, 4), 100, np.float32)
    data[0, 0, 0], data[1, 1, 0], data[2, 2, 2] = np.nan, np.inf, -50
    path = nifti(tmp_path / "n.nii.gz", data)
    with pytest.raises(NonFiniteError, match="2 of 64"):
        read(path, frame=0)
    image = read(path, frame=0, nonfinite=policy, window="-100:100")
    values = to_native(from_display(image.pixels[0], image.geometry), -100, 100)
    assert values[0, 0].item() == pytest.approx(expected) and any("nonfinite" in step for step in image.steps)
    nifti(path, np.full((2, 2, 2), np.nan, np.float32))
    with pytest.raises(NonFiniteError, match="no minimum"):
        read(path, frame=0, nonfinite="min")


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_volume_is_minus_one_everywhere(tmp_path, value):
    """Not NaN; low = high = the constant, so that the way back is exact."""
    image = read(nifti(tmp_path / "k.nii", np.full((4, 4, 4), value, np.float32)), frame=0)
    assert (image.pixels == -1).all() and image.low == image.high == value
    assert (to_native(image.pixels, image.low, image.high) == value).all()


def test_modality_comes_from_the_option_or_a_bids_sidecar(tmp_path):
    """Unstated values that look like HU are refused; others are read as MR with a warning."""
    hu = nifti(tmp_path / "ct.nii.gz", np.linspace(-1000, 1000, 64).reshape(4, 4, 4).astype(np.int16))
    with pytest.raises(IntensityError, match="--modality ct"):
        read(hu, frame=0)
    (tmp_path / "ct.json").write_text(json.dumps({"Modality": "CT"}))
    assert read(hu, frame=0).unit == "HU"
    assert discover([hu]).sources[0].modality == "ct"
    image = read(nifti(tmp_path / "m.nii", np.arange(64, dtype=np.int16).reshape(4, 4, 4)), frame=0)
    assert image.modality == "mr" and any("modality not stated" in note for note in image.warnings)
    with pytest.raises(IntensityError, match="8-bit"):
        read(nifti(tmp_path / "8.nii", np.zeros((4, 4, 4), np.uint8)), frame=0, modality="ct")


def test_percentiles_are_those_of_the_whole_volume(tmp_path):
    """The same window for every slice, equal to numpy's percentiles."""
    data = np.random.default_rng(0).normal(100, 30, (9, 10, 11)).astype(np.float32)
    images = list(frames(nifti(tmp_path / "p.nii.gz", data), modality="mr"))
    assert {(image.low, image.high) for image in images} == {tuple(np.percentile(data.astype(np.float64), [0.5, 99.5]))}


def test_a_volume_is_read_slice_by_slice(tmp_path):
    """One slice of an uncompressed 400 MB volume costs far less memory than the volume."""
    path = tmp_path / "big.nii"
    nib.save(nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.eye(4)), path)
    header = nib.load(path).header.copy()
    header.set_data_shape((512, 512, 800))
    with open(path, "wb") as file:
        file.write(header.binaryblock + bytes(4))
        file.truncate(352 + 512 * 512 * 800 * 2)
    script = textwrap.dedent(f"""
        from meditok.data import read
        import nibabel
        read({str(path)!r}, frame=400, modality="ct", plane="axial")
        read({str(path)!r}, frame=401, modality="ct", plane="axial")
        print(peak_gib())
    """)
    command = [sys.executable, "-c", PEAK_GIB + script]
    assert float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 0.6


def test_two_gzip_members_are_one_stream(tmp_path):
    """As gzip allows."""
    raw = gzip.decompress(nifti(tmp_path / "a.nii.gz", np.arange(64, dtype=np.int16).reshape(4, 4, 4)).read_bytes())
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(raw[:400]) + gzip.compress(raw[400:]))
    one, two = (list(frames(tmp_path / name, modality="mr")) for name in ("a.nii.gz", "b.nii.gz"))
    assert all(torch.equal(x.pixels, y.pixels) for x, y in zip(one, two, strict=True))


def test_probe_finds_a_bad_checksum(tmp_path):
    """`inspect` reads the whole file, so that an error does not come hours later."""
    path = nifti(tmp_path / "c.nii.gz", np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes(raw)
    record = discover([path], ReadOptions(modality="mr")).sources[0].probe()[0]
    assert record["error_type"] == "CorruptImageError" and str(path) in record["error"]
