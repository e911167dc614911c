"""`meditok.tokenize` and `meditok.detokenize` from Python."""

import numpy as np
import pytest
import torch
from PIL import Image

import meditok
from meditok.errors import BadInputError, CorruptImageError, DtypeError, ShapeError, UsageError


@pytest.fixture(scope="module")
def model():
    return meditok.build("tiny", seed=0)


def test_arrays_paths_and_images_give_the_same_ids(model, make, tmp_path):
    array = make.noise((40, 64, 3))
    Image.fromarray(array).save(tmp_path / "x.png")
    image = meditok.read(tmp_path / "x.png")
    found = [
        meditok.tokenize(given, model, size=64).ids
        for given in (
            array,
            str(tmp_path / "x.png"),
            tmp_path / "x.png",
            [image],
            torch.from_numpy(array),
            [array],
        )
    ]
    assert found[0].shape == (1, 8, 16) and all(torch.equal(ids, found[0]) for ids in found)


def test_rows_stand_in_the_order_of_the_paths_given(model, make, tmp_path):
    (tmp_path / "folder").mkdir()
    for height, name in ((16, "b.png"), (32, "folder/z.png"), (48, "folder/y.png"), (64, "a.png")):
        Image.fromarray(make.noise((height, 64))).save(tmp_path / name)
    given = [str(tmp_path / "b.png"), f"{tmp_path}/folder/", tmp_path / "a.png"]
    tokens = meditok.tokenize(given, model, size=64)
    assert [row.geometry.original_shape[0] for row in tokens.rows] == [16, 48, 32, 64]


def test_the_slices_of_a_volume_can_be_passed_on_as_they_are_read(model, make, tmp_path):
    make.ct_series(tmp_path / "ct", make.noise((40, 30, 2), 1000, dtype=np.int16))
    found = meditok.tokenize(meditok.frames(tmp_path / "ct"), model, size=64)
    assert torch.equal(found.ids, meditok.tokenize(tmp_path / "ct", model, size=64).ids)


def test_ids_equal_those_of_the_model_on_the_fitted_pixels(model, make):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(meditok.tokenize(pixels, model, size=64).ids, model.tokenize(pixels, stable=True))


def test_detokenize_gives_images_at_native_size_and_unit(model, make, tmp_path):
    make.ct_series(tmp_path / "ct", make.noise((40, 30, 2), 1000, dtype=np.int16))
    tokens = meditok.tokenize(tmp_path / "ct", model, size=64)
    images = meditok.detokenize(tokens, model)
    assert [tuple(i.pixels.shape) for i in images] == [(3, 30, 40)] * 2
    assert images[0].unit == "HU" and images[0].low == -1000 and torch.equal(images[0].pixels[0], images[0].pixels[2])
    assert [i.slice for i in images] == [0, 1]
    tokens.save(tmp_path / "t.parquet")
    again = meditok.detokenize(tmp_path / "t.parquet", model)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(images, again, strict=True))


def test_a_generated_sequence_can_be_decoded(model, make):
    tokens = meditok.tokenize(make.noise((64, 64)), model, size=64)
    made = tokens.from_sequence(torch.randint(0, 4096, (2, 128)), offsets=False)
    assert [i.pixels.shape for i in meditok.detokenize(made, model)] == [(3, 64, 64)] * 2


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (np.zeros((4, 4, 2), np.uint8), ShapeError),
        (np.zeros((8, 8), np.int32), DtypeError),
        (np.full((8, 8), 3.0), DtypeError),
        ([np.zeros((8, 8), np.uint8), "x.png"], UsageError),
        ([], BadInputError),
    ],
)
def test_what_is_no_picture_is_refused_by_name(model, given, error):
    with pytest.raises(error):
        meditok.tokenize(given, model, size=64)


def test_a_broken_file_raises_or_is_left_out_with_a_warning(model, pictures):
    (pictures / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(CorruptImageError):
        meditok.tokenize(pictures, model, size=64)
    with pytest.warns(UserWarning, match=r"left out: .*bad\.png"):
        assert len(meditok.tokenize(pictures, model, size=64, on_error="skip")) == 3


def test_the_published_preset_stretches(model, make):
    tokens = meditok.tokenize(make.noise((40, 64)), model, size=64, preset="published")
    assert tokens.rows[0].geometry.fit == "stretch"


def test_an_unknown_option_lists_the_known_ones(model, make):
    with pytest.raises(UsageError, match="windw"):
        meditok.tokenize(make.noise((40, 64)), model, windw="lung")


def test_importing_meditok_imports_no_reader(process):
    code = (
        "import sys, meditok; meditok.Tokens; meditok.tokenize\n"
        "heavy = ('PIL', 'pydicom', 'nibabel', 'pyarrow', 'skimage', 'click', 'rich')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = process(code=code)
    assert done.stdout.decode().strip() == "[]", done.stderr
