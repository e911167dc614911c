"""PNG, JPEG, TIFF, BMP and .npy: bit depth kept, every mode by a stated rule."""

import hashlib
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from meditok.data import frames, read
from meditok.data.windows import to_display8, to_native
from meditok.errors import IntensityError, MultiFrameError, UnsafeFileError
from tests.readers.bad_pictures import noise, png

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def with_chunk(path, kind: bytes, body: bytes):
    """Insert a chunk after IHDR."""
    raw = path.read_bytes()
    path.write_bytes(
        raw[:33] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) + raw[33:]
    )
    return path


def test_a_16_bit_ramp_keeps_its_levels_in_every_container(tmp_path):
    """PNG, little and big endian TIFF agree, and hold all 65,536 levels in float."""
    png(tmp_path / "a.png", RAMP)
    Image.fromarray(RAMP).save(tmp_path / "l.tif")
    big = tmp_path / "b.tif"
    entries = [
        (256, 4, 256),
        (257, 4, 256),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 122),
        (277, 3, 1),
        (278, 4, 256),
        (279, 4, 131072),
    ]
    body = b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries))
    for tag, kind, value in entries:
        body += struct.pack(">HHI", tag, kind, 1) + (
            struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
        )
    big.write_bytes((body + bytes(4)).ljust(122, b"\0") + RAMP.astype(">u2").tobytes())
    images = [read(tmp_path / name) for name in ("a.png", "l.tif", "b.tif")]
    assert len(torch.unique(images[0].pixels[0])) == 65536
    assert all(torch.equal(images[0].pixels, image.pixels) for image in images[1:])
    assert (images[0].low, images[0].high, images[0].unit) == (0.0, 65535.0, "stored")
    back = to_native(images[0].pixels[0], 0, 65535).round()
    assert np.array_equal(back.numpy(), RAMP)


def test_sbit_and_bits_narrow_the_range_and_a_dim_picture_is_warned_about(tmp_path):
    """12 significant bits in 16; more than they allow is an error for --bits, ignored for sBIT."""
    path = png(tmp_path / "a.png", (RAMP // 16).astype(np.uint16))
    assert read(path).high == 65535 and "under a quarter" in read(path).warnings[0]
    assert read(path, bits=12).high == 4095 and not read(path, bits=12).warnings
    assert read(with_chunk(path, b"sBIT", b"\x0c")).high == 4095
    with pytest.raises(IntensityError, match="bits=8"):
        read(path, bits=8)
    scaled = with_chunk(png(tmp_path / "b.png", RAMP), b"sBIT", b"\x0c")
    assert read(scaled).high == 65535


def test_modes_are_converted_by_the_stated_rule(tmp_path):
    """Palette, LA, RGBA, CMYK and 1 bit."""
    grey = noise(8, 8)
    Image.fromarray(grey).convert("P").save(tmp_path / "p.png")
    Image.fromarray(np.dstack([grey, np.full((8, 8), 255, np.uint8)])).save(tmp_path / "la.png")
    Image.fromarray(np.dstack([grey, grey, grey, np.full((8, 8), 128, np.uint8)])).save(tmp_path / "rgba.png")
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[0, 0, 3] = 255
    Image.frombytes("CMYK", (8, 8), ink.tobytes()).save(tmp_path / "cmyk.tif")
    Image.fromarray(grey > 100).save(tmp_path / "1.png")
    assert np.array_equal(to_display8(read(tmp_path / "p.png").pixels)[0], grey)
    opaque = read(tmp_path / "la.png")
    assert opaque.channels == 1 and np.array_equal(to_display8(opaque.pixels)[0], grey)
    half = read(tmp_path / "rgba.png")
    assert "laid over black" in half.warnings[0] and to_display8(half.pixels).max() <= 128
    printed = to_display8(read(tmp_path / "cmyk.tif").pixels)
    assert printed[:, 0, 0].max() == 0 and printed[:, 1:].min() == 255
    assert set(read(tmp_path / "1.png").pixels.unique().tolist()) == {-1.0, 1.0}


def test_every_page_of_a_tiff_is_a_frame(tmp_path):
    """None is lost; one picture asked of several says how many there are."""
    pages = [Image.fromarray(noise(6, 6) + page) for page in range(3)]
    pages[0].save(tmp_path / "m.tif", save_all=True, append_images=pages[1:])
    assert [image.frame for image in frames(tmp_path / "m.tif")] == [0, 1, 2]
    with pytest.raises(MultiFrameError) as caught:
        read(tmp_path / "m.tif")
    assert caught.value.frames == 3
    assert not torch.equal(read(tmp_path / "m.tif", 0).pixels, read(tmp_path / "m.tif", frame=2).pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_as_pillow_does_and_recorded(tmp_path, orientation):
    """For all eight orientations."""
    from PIL import ImageOps

    picture = Image.fromarray(np.kron(noise(4, 6), np.ones((16, 16), np.uint8)))
    exif = Image.Exif()
    exif[274] = orientation
    for name in ("r.jpg", "r.png", "r.tif"):
        picture.save(tmp_path / name, exif=exif, quality=95)
        if name != "r.tif":  # Pillow turns a TIFF by itself; it must look like the PNG
            expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / name)))
        image = read(tmp_path / name)
        assert np.array_equal(to_display8(image.pixels)[0], expected), name
        assert any("orientation" in step for step in image.steps) == (orientation > 1)
        assert image.geometry.original_shape == expected.shape


def test_a_white_is_zero_tiff_is_turned_over(tmp_path):
    """Photometric interpretation 0, 8 and 16 bit."""
    for name, values in (("8.tif", noise(8, 8)), ("16.tif", noise(8, 8, dtype=np.uint16, top=65535))):
        Image.fromarray(values).save(tmp_path / name, tiffinfo={262: 1})
        raw = (tmp_path / name).read_bytes()
        at = raw.index(struct.pack("<HHI", 262, 3, 1))
        (tmp_path / name).write_bytes(raw[: at + 8] + b"\0\0" + raw[at + 10 :])
        top = np.iinfo(values.dtype).max
        assert np.allclose(read(tmp_path / name).pixels[0], (top - values.astype(float)) / top * 2 - 1, atol=1e-4)


def test_shifted_hu_in_a_16_bit_png_need_the_bias(tmp_path):
    """--ct-bias 1024 makes 65 HU what it is; without it the picture is refused."""
    path = png(tmp_path / "ct.png", np.full((8, 8), 65 + 1024, np.uint16))
    assert read(path, modality="ct", ct_bias=1024).pixels[0, 0, 0].item() == np.float32(0.065)
    with pytest.raises(IntensityError, match="--ct-bias"):
        read(path, modality="ct")


def test_an_8_bit_ct_is_told_both_ways_to_name_another_modality(tmp_path):
    """`meditok train` has no option --modality: there it is a column of the manifest."""
    with pytest.raises(IntensityError, match=r"give the DICOM, or another modality \(option or column\)"):
        read(png(tmp_path / "ct.png", np.zeros((8, 8), np.uint8)), modality="ct")


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_picture_is_minus_one_and_its_value_is_kept(tmp_path, value):
    """Recorded as low = high, so that native values come back."""
    image = read(png(tmp_path / "c.png", np.full((8, 8), value, np.uint8)))
    assert (image.pixels == -1).all() and to_native(image.pixels, image.low, image.high).max() == value


def test_reading_changes_no_file(tmp_path):
    """A .jpg is byte-identical afterwards."""
    Image.fromarray(noise(32, 32)).save(tmp_path / "a.jpg")
    before = hashlib.sha256((tmp_path / "a.jpg").read_bytes()).hexdigest()
    read(tmp_path / "a.jpg")
    assert hashlib.sha256((tmp_path / "a.jpg").read_bytes()).hexdigest() == before


def test_pillows_limit_is_never_touched(tmp_path):
    """The global bomb limit is the same after any read, and ours is named in the error."""
    from PIL import Image as module

    before = module.MAX_IMAGE_PIXELS
    from tests.readers.bad_pictures import b2_huge_header

    with pytest.raises(UnsafeFileError, match=str(2**26)):
        read(b2_huge_header(tmp_path))
    assert module.MAX_IMAGE_PIXELS == before


def test_npy_files_follow_the_rules_of_arrays(tmp_path):
    """Grey, colour, batch, stack of slices, signed HU."""
    np.save(tmp_path / "g.npy", RAMP)
    assert len(torch.unique(read(tmp_path / "g.npy").pixels)) == 65536
    np.save(tmp_path / "b.npy", noise(4, 8, 8, 3))
    assert len(list(frames(tmp_path / "b.npy"))) == 4
    np.save(tmp_path / "s.npy", noise(5, 8, 8))
    assert len(list(frames(tmp_path / "s.npy", layout="DHW"))) == 5
    np.save(tmp_path / "h.npy", np.full((8, 8), 65, np.int16))
    assert read(tmp_path / "h.npy", modality="ct").pixels[0, 0, 0].item() == np.float32(0.065)
