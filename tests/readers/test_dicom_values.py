"""The intensity order of DICOM: padding, rescale, VOI, inversion last and once."""

import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset

from meditok.data import frames, read
from meditok.data.windows import (
    CT_WINDOWS,
    Window,
    apply_window,
    parse_window,
    random_ct_window,
    to_display8,
    to_native,
)
from meditok.errors import HeaderMismatchError, IntensityError, UsageError
from tests.readers import make_dicom as dicom


def ct(path, hu, **tags):
    """A CT file whose values are `hu`."""
    return dicom.write(path, dicom.dataset((np.asarray(hu) + 1024).astype(np.uint16), "CT", **tags))


def mr(path, values, **tags):
    return dicom.write(path, dicom.dataset(np.asarray(values), "MR", **tags))


def test_a_window_of_400_at_40_maps_the_published_points(tmp_path):
    """dcm4che's points: with LINEAR, -129, 65 and 194 HU show as 20, 144 and 226 (not 23, 162, 255)."""
    path = ct(tmp_path / "a.dcm", [[-129, 65], [194, -2000 + 976]], WindowCenter=40, WindowWidth=400)
    shown = to_display8(read(path, window="file").pixels)[0]
    assert shown.flatten().tolist() == [20, 144, 226, 0]


@pytest.mark.parametrize(("window", "value"), [("default", 0.065), ("lung", 0.83125), ("soft-tissue", 0.075)])
def test_65_hu_has_its_pinned_value_in_a_dim_and_in_a_bright_slice(tmp_path, window, value):
    """The same HU gives the same float whatever surrounds it."""
    dim = read(ct(tmp_path / "dim.dcm", [[65, -1000], [-900, -1000]]), window=window)
    bright = read(ct(tmp_path / "bright.dcm", [[65, 3000], [2000, 1500]]), window=window)
    assert dim.pixels[0, 0, 0].item() == bright.pixels[0, 0, 0].item() == np.float32(value)
    assert dim.unit == "HU" and (dim.low, dim.high) == CT_WINDOWS[window] and dim.window == window


def test_ct_ignores_the_windows_of_the_file_unless_asked(tmp_path):
    """auto is the default window; file is the file's first pair, window_index the others."""
    path = ct(tmp_path / "a.dcm", [[0, 40], [80, 100]], WindowCenter=[40, -600], WindowWidth=[80, 1200])
    assert read(path).window == "default"
    first, second = read(path, window="file"), read(path, window="file", window_index=1)
    assert (first.low, first.high) == (0.0, 79.0) and (second.low, second.high) == (-1200.0, -1.0)


def test_monochrome1_is_monochrome2_inverted_exactly_and_once(tmp_path):
    """Also with PresentationLUTShape INVERSE beside it, and with that alone."""
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 900
    tags = {"WindowCenter": 20000, "WindowWidth": 30000}
    plain = read(mr(tmp_path / "2.dcm", values, **tags))
    one = read(mr(tmp_path / "1.dcm", values, PhotometricInterpretation="MONOCHROME1", **tags))
    both = read(
        mr(
            tmp_path / "b.dcm",
            values,
            PhotometricInterpretation="MONOCHROME1",
            PresentationLUTShape="INVERSE",
            **tags,
        )
    )
    shape = read(mr(tmp_path / "s.dcm", values, PresentationLUTShape="INVERSE", **tags))
    for inverted in (one, both, shape):
        assert torch.equal(inverted.pixels, -plain.pixels)
        assert inverted.steps[-1].startswith("invert") and sum(s.startswith("invert") for s in inverted.steps) == 1
        native = to_native(inverted.pixels[0], inverted.low, inverted.high, inverted.steps)
        inside = (values >= inverted.low) & (values <= inverted.high)
        assert np.allclose(native.numpy()[inside], values[inside], atol=0.01)


def test_linear_exact_and_sigmoid_follow_the_standard(tmp_path):
    """LINEAR_EXACT spans centre ± width/2; SIGMOID is 1 / (1 + exp(-4 (x - c) / w))."""
    values = np.array([[0, 50], [100, 150]], np.uint16)
    exact = read(mr(tmp_path / "e.dcm", values, WindowCenter=75, WindowWidth=150, VOILUTFunction="LINEAR_EXACT"))
    assert (exact.low, exact.high) == (0.0, 150.0)
    sigmoid = read(mr(tmp_path / "s.dcm", values, WindowCenter=75, WindowWidth=150, VOILUTFunction="SIGMOID"))
    expected = 2 / (1 + np.exp(-4 * (values - 75.0) / 150)) - 1
    assert np.allclose(sigmoid.pixels[0], expected, atol=1e-6) and sigmoid.unit == "display"


def test_the_voi_lut_comes_before_the_window(tmp_path):
    """A VOI LUT replaces the window beside it; values below and above it take its ends."""
    item = Dataset()
    item.add_new(0x00283002, "US", [4, 10, 8])
    item.add_new(0x00283006, "US", [0, 50, 200, 255])
    path = mr(tmp_path / "l.dcm", np.array([[0, 10], [12, 99]], np.uint16), WindowCenter=5, WindowWidth=2)
    import pydicom

    data = pydicom.dcmread(path)
    data.VOILUTSequence = [item]
    dicom.write(path, data)
    image = read(path)
    assert to_display8(image.pixels)[0].flatten().tolist() == [0, 0, 200, 255]
    assert any(step.startswith("voi lut") for step in image.steps)


def test_the_modality_lut_is_applied_before_anything_else(tmp_path):
    """Stored values become table entries; both ends are clamped."""
    item = Dataset()
    item.add_new(0x00283002, "US", [3, 1, 16])
    item.ModalityLUTType = "OD"
    item.add_new(0x00283006, "US", [100, 500, 900])
    path = mr(tmp_path / "m.dcm", np.array([[0, 1], [2, 9]], np.uint16), ModalityLUTSequence=[item])
    image = read(path, window="0:1000")
    assert np.allclose(image.pixels[0].flatten(), np.array([100, 100, 500, 900]) / 500 - 1, atol=1e-6)
    assert image.unit == "OD"


def test_padding_is_masked_before_rescale_and_shown_as_minus_one(tmp_path):
    """Also where it was written with the other sign, and in an inverted picture."""
    values = np.array([[-2000, 0], [1000, 2000]], np.int16)

    def padded(name, **tags):
        data = dicom.dataset(values, "MR", **tags)
        data.add_new(0x00280120, "US", 63536)  # -2000 in the other sign
        return read(dicom.write(tmp_path / name, data))

    image = padded("p.dcm", RescaleSlope=2, RescaleIntercept=5)
    assert image.pixels[0, 0, 0] == -1 and image.low > 0
    assert "mask padding -2000: 1 pixels shown as -1" in image.steps
    assert padded("q.dcm", PhotometricInterpretation="MONOCHROME1").pixels[0, 0, 0] == -1


def test_ct_without_rescale_is_taken_as_hu_with_a_warning_and_a_record(tmp_path):
    """Slope 1 and intercept 0 are assumed for a CT SOP class only."""
    values = np.array([[-1000, 0], [65, 900]], np.int16)
    path = dicom.write(tmp_path / "n.dcm", dicom.dataset(values, "CT", RescaleSlope=None, RescaleIntercept=None))
    image = read(path)
    assert image.pixels[0, 1, 0].item() == np.float32(0.065)
    assert any("assumed" in note for note in image.warnings) and any("assumed" in step for step in image.steps)


def test_rescale_beyond_16_bits_does_not_wrap(tmp_path):
    """Values of 65535 x 100 - 1024 stay what they are."""
    image = read(
        mr(tmp_path / "w.dcm", np.array([[0, 65535]], np.uint16), RescaleSlope=100, RescaleIntercept=-1024),
        window="full",
    )
    assert (image.low, image.high) == (-1024.0, 6552476.0)


def test_unused_high_bits_are_dropped_and_the_sign_extended(tmp_path):
    """12 bits stored in 16, with rubbish above them (an old overlay)."""
    raw = np.array([[0xF001, 0x0FFF], [0x8800, 0x07FF]], np.uint16).view(np.int16)
    path = mr(
        tmp_path / "u.dcm",
        raw,
        BitsStored=12,
        WindowCenter=0,
        WindowWidth=4096,
        VOILUTFunction="LINEAR_EXACT",
    )
    values = to_native(read(path).pixels[0], -2048, 2048)
    assert values.flatten().tolist() == pytest.approx([1, -1, -2048, 2047], abs=1e-3)


def test_two_frames_with_slopes_3_and_7_give_different_results(tmp_path):
    """Per-frame functional groups are applied by us (the values of pydicom#2353)."""
    pixels = np.full((2, 4, 4), 100, np.uint16)
    data = dicom.dataset(pixels, "CT", sop="ECT", RescaleSlope=None, RescaleIntercept=None)
    data.PerFrameFunctionalGroupsSequence = []
    for slope in (3, 7):
        inner, outer = Dataset(), Dataset()
        inner.RescaleSlope, inner.RescaleIntercept, inner.RescaleType = slope, -500, "HU"
        outer.PixelValueTransformationSequence = [inner]
        data.PerFrameFunctionalGroupsSequence.append(outer)
    first, second = frames(dicom.write(tmp_path / "e.dcm", data))
    assert [to_native(image.pixels, image.low, image.high).max().item() for image in (first, second)] == pytest.approx(
        [-200, 200]
    )


def test_radiographs_use_window_then_the_range_of_bits_stored(tmp_path):
    """In rescaled units, with the sign of the pixels."""
    values = np.array([[-100, 0], [100, 200]], np.int16)
    path = dicom.write(
        tmp_path / "c.dcm", dicom.dataset(values, "CR", BitsStored=12, RescaleSlope=2, RescaleIntercept=10)
    )
    assert (read(path).low, read(path).high) == (-4086.0, 4104.0)


def test_windows_and_modalities_that_contradict_the_file_are_refused(tmp_path):
    """A CT window on MR, a modality against the tag, a window index past the end, a text that is none."""
    path = mr(tmp_path / "a.dcm", np.zeros((4, 4), np.uint16), WindowCenter=1, WindowWidth=2)
    with pytest.raises(IntensityError, match="Hounsfield"):
        read(path, window="lung")
    with pytest.raises(HeaderMismatchError, match="Modality"):
        read(path, modality="ct")
    with pytest.raises(HeaderMismatchError, match="WindowCenter"):
        read(path, window_index=3)
    for text in ("lungs", "5:5", "9:1", "percentile:90:10", "nan:1"):
        with pytest.raises(UsageError):
            parse_window(text)


def test_a_window_of_no_width_is_a_threshold_and_a_constant_picture_is_minus_one():
    """Fixed windows and data-driven ones differ there."""
    values = np.array([1.0, 2.0, 3.0])
    assert apply_window(values, Window(2, 2, "file")).tolist() == [-1, -1, 1]
    assert apply_window(np.full(3, 7.0), Window(7, 7, "percentile", fixed=False)).tolist() == [-1, -1, -1]


def test_training_windows_are_drawn_with_the_stated_probabilities():
    """Half are drawn, of these 0.2 full, 0.3 default, 0.3 soft-tissue, 0.15 lung, 0.05 bone."""
    rng = np.random.default_rng(0)
    drawn = [random_ct_window(rng) for _ in range(20000)]
    share = {name: drawn.count(name) / len(drawn) for name in CT_WINDOWS}
    expected = {"full": 0.1, "default": 0.65, "soft-tissue": 0.15, "lung": 0.075, "bone": 0.025}
    assert all(abs(share[name] - expected[name]) < 0.01 for name in expected)


def test_no_text_of_a_tag_reaches_the_picture_or_a_message(tmp_path):
    """A marker in every free-text tag appears in no field and in no error."""
    marker = "ZZMARKER"
    texts = {
        "PatientName": marker, "PatientID": marker, "InstitutionName": marker, "StudyDescription": marker,
        "SeriesDescription": marker, "BodyPartExamined": marker, "RescaleType": marker,
        "ImageComments": marker,
        "ProtocolName": marker, "StationName": marker, "Units": marker, "SeriesNumber": None,
    }  # fmt: skip
    path = mr(
        tmp_path / "a.dcm",
        np.arange(16, dtype=np.uint16).reshape(4, 4),
        RescaleSlope=1,
        RescaleIntercept=0,
        **texts,
    )
    image = read(path)
    image.source = ""
    assert marker not in repr(image)
    for tags in (
        {"VOILUTFunction": marker, "WindowCenter": 1, "WindowWidth": 1},
        {"PhotometricInterpretation": marker},
    ):
        with pytest.raises(HeaderMismatchError) as caught:
            read(mr(tmp_path / "b.dcm", np.zeros((4, 4), np.uint16), **tags))
        assert marker not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint8, np.float32, np.int32])
def test_percentiles_taken_piece_by_piece_are_numpys(dtype):
    """Exact for every dtype while all values are kept; integers for any number of them."""
    from meditok.data.windows import ValueStatistics

    values = np.random.default_rng(3).normal(90, 30, 10001).clip(0, 200).astype(dtype)
    found = ValueStatistics(capacity=20000)
    for piece in np.array_split(values, 7):
        found.add(piece)
    for low, high in ((0.5, 99.5), (0, 100), (25, 75)):
        assert found.percentiles(low, high) == pytest.approx(tuple(np.percentile(values, [low, high])), abs=1e-4)
    thin = ValueStatistics(capacity=1000)
    thin.add(values.astype(np.float32))
    assert thin.thinned == 16 and thin.percentiles(25, 75) == pytest.approx(found.percentiles(25, 75), abs=6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_large_and_small_pictures_are_windowed_alike(dtype):
    """Whether values are mapped row by row or in blocks, the bits are the same."""
    values = np.random.default_rng(4).integers(0, 200, (300, 500)).astype(dtype)
    for window in (Window(-20, 150, "x"), Window(7, 7, "x"), Window(7, 7, "x", fixed=False)):
        whole = apply_window(values, window)
        rows = np.stack([apply_window(row[None], window)[0] for row in values])
        assert whole.dtype == np.float32 and np.array_equal(whole, rows)
    clipped = np.clip((values.astype(np.float64) + 20) * (2 / 170) - 1, -1, 1)
    assert np.array_equal(apply_window(values, Window(-20, 150, "x")), clipped.astype(np.float32))


def test_a_program_in_the_preamble_is_warned_about(tmp_path):
    """The picture reads; the note says what the file also is."""
    path = mr(tmp_path / "a.dcm", np.arange(16, dtype=np.uint16).reshape(4, 4))
    path.write_bytes(b"MZ" + path.read_bytes()[2:])
    assert any("program" in note for note in read(path).warnings)
