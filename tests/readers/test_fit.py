"""Fitting to the model's size and back; the processor that does it for batches."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meditok.data import Geometry, MedicalImage, Processor, fit, unfit
from meditok.data.fit import unpadded_mask
from meditok.errors import IntensityError, ShapeError, UsageError
from tests.readers.bad_pictures import noise, png


def picture(height, width, channels=1, seed=0):
    """A smooth random picture."""
    coarse = torch.rand(1, channels, 4, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    pixels = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
    return MedicalImage(
        pixels.expand(3, height, width).contiguous(),
        0,
        255,
        channels=channels,
        geometry=Geometry((height, width)),
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["pad", "stretch", "crop", "tile"]))
def test_every_size_fits_and_comes_back_at_its_size(height, width, mode):
    """Also 1 x 1 and very long pictures; the fitted sides are the size asked for."""
    image = picture(height, width)
    pieces = fit(image, 32, mode)
    for piece in pieces:
        assert piece.pixels.shape == (3, 32, 32) and piece.pixels.is_contiguous() and piece.geometry.fit == mode
        back = unfit(piece.pixels, piece.geometry)
        expected = (3, *piece.tile[2:]) if mode == "tile" else (3, height, width)
        assert back.shape == expected and back.abs().max() <= 1
    if mode == "tile":
        whole = torch.full((3, height, width), 9.0)
        for piece in pieces:
            y, x, rows, columns = piece.tile
            whole[:, y : y + rows, x : x + columns] = unfit(piece.pixels, piece.geometry)
        assert torch.equal(whole, image.pixels)


@pytest.mark.parametrize("shape", [(3, 4000), (4000, 3), (1, 1)])
def test_thin_pictures_are_padded_and_recorded(shape):
    """One row or column remains at least; the rest is -1."""
    (piece,) = fit(picture(*shape), 256)
    top, bottom, left, right = piece.geometry.pad
    inner = piece.pixels[:, top : 256 - bottom, left : 256 - right]
    assert min(inner.shape) >= 1 and piece.steps[-1].startswith("fit pad")
    outside = piece.pixels.clone()
    outside[:, top : 256 - bottom, left : 256 - right] = -1
    assert (outside == -1).all()


def test_a_picture_of_the_right_size_is_untouched_and_a_smooth_one_survives_the_round_trip():
    """Padding alone is exact; resizing loses little of a smooth picture."""
    same = picture(64, 64)
    assert torch.equal(fit(same, 64)[0].pixels, same.pixels)
    wide = picture(40, 64)
    piece = fit(wide, 64)[0]
    assert torch.equal(unfit(piece.pixels, piece.geometry), wide.pixels)
    large = picture(150, 200)
    piece = fit(large, 128)[0]
    assert (unfit(piece.pixels, piece.geometry) - large.pixels).abs().max() < 0.06


def test_resizing_is_antialiased_bilinear_and_grey_is_done_once():
    """Equal to torch's own, for grey as for colour."""
    for channels in (1, 3):
        image = picture(100, 100, channels)
        expected = F.interpolate(image.pixels[None], size=(32, 32), mode="bilinear", antialias=True)[0]
        assert torch.allclose(fit(image, 32, "stretch")[0].pixels, expected, atol=1e-6)


def test_illegal_sizes_name_the_nearest_legal_one():
    """Sizes are multiples of 16; so are pictures that are not fitted."""
    with pytest.raises(ShapeError, match="nearest is 256x256"):
        fit(picture(8, 8), 250)
    with pytest.raises(ShapeError, match="nearest is 32x16"):
        fit(picture(30, 18), 256, "none")
    assert fit(picture(32, 48), 256, "none")[0].geometry.fit == "none"
    with pytest.raises(UsageError):
        fit(picture(8, 8), 32, "squash")


def test_the_mask_of_unpadded_patches_covers_the_picture():
    """Patches with at least one pixel of the picture are True."""
    piece = fit(picture(40, 64), 64)[0]
    mask = unpadded_mask(piece.geometry, 64, 64)
    assert mask.shape == (4, 4) and mask.all()
    piece = fit(picture(16, 64), 64)[0]
    assert unpadded_mask(piece.geometry, 64, 64).sum() == 8


def test_the_processor_takes_files_arrays_and_pictures_and_undoes_itself(tmp_path):
    """Also after pickling, as a DataLoader worker needs it."""
    path = png(tmp_path / "a.png", noise(40, 60))
    processor = pickle.loads(pickle.dumps(Processor(64)))
    batch = processor([path, noise(30, 64, 3), picture(20, 20)])
    assert batch["pixel_values"].shape == (3, 3, 64, 64) and batch["pixel_values"].dtype == torch.float32
    assert batch["high"].tolist() == [255.0, 255.0, 255.0] and batch["low"].dtype == torch.float64
    sizes = [tuple(back.shape[-2:]) for back in processor.post_process(batch["pixel_values"], batch)]
    assert sizes == [(40, 60), (30, 64), (20, 20)]
    assert Processor.from_dict(processor.to_dict()) == processor
    assert processor([])["pixel_values"].shape == (0, 3, 64, 64)
    with pytest.raises(UsageError):
        processor(3.5)
    with pytest.raises(ShapeError):
        Processor(100)


@pytest.mark.parametrize(
    "array, options",
    [
        (np.arange(64, dtype=np.uint16).reshape(8, 8), {"window": "0:4095"}),
        (np.arange(64, dtype=">u2").reshape(8, 8), {}),
        (np.arange(64, dtype=np.int16).reshape(8, 8), {"modality": "ct", "window": "lung"}),
        (np.arange(192, dtype=np.uint8).reshape(3, 8, 8), {"layout": "DHW"}),
    ],
)
def test_an_array_is_read_as_its_npy_file_is(tmp_path, array, options):
    """Window, modality and layout count for both."""
    np.save(tmp_path / "a.npy", array)
    given, read = (Processor(16)(images, **options) for images in (array, tmp_path / "a.npy"))
    assert torch.equal(given.pop("pixel_values"), read.pop("pixel_values")) and str(given) == str(read)


def test_eight_bits_are_no_ct_in_an_array_either():
    """As in a file: Hounsfield units do not fit into eight bits."""
    with pytest.raises(IntensityError, match="HU"):
        Processor(16)(noise(8, 8), modality="ct")


def test_the_processor_works_in_dataloader_workers():
    """Spawned workers give the same batch."""
    pictures = [np.asarray(noise(20 + n, 30)) for n in range(4)]
    loader = torch.utils.data.DataLoader(pictures, batch_size=2, num_workers=1, collate_fn=Processor(32))
    batches = [batch["pixel_values"] for batch in loader]
    assert torch.equal(torch.cat(batches), Processor(32)(pictures)["pixel_values"])


def test_geometry_survives_its_dictionary():
    """Field by field, as the token file stores it."""
    place = Geometry(
        (4, 5, 6), 2, "axial", "pad", 0.5, 0.25, (1, 2, 3, 4), (1.0, 2.0, 3.0), tuple(map(float, range(16)))
    )
    record = place.to_dict()
    assert record["pad"] == [1, 2, 3, 4] and Geometry.from_dict(record) == place
