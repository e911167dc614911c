"""Compressed DICOM with and without its decoder, and colour that is converted exactly once."""

import io
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.pixels import get_decoder

from meditok.data import frames, read
from meditok.data.windows import to_display8
from meditok.errors import MissingDecoderError
from tests.readers import make_dicom as dicom

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
# One file of each syntax, and an uncompressed twin where the package has one.
SYNTAXES = {
    "JPEGBaseline": ("SC_rgb_dcmtk_+eb+cr.dcm", None, 0),
    "JPEGExtended": ("JPGExtended.dcm", None, 0),
    "JPEGLossless": ("SC_rgb_jpeg_gdcm.dcm", None, 0),
    "JPEGLSLossless": ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm", 0),
    "JPEGLSNearLossless": ("JPEGLSNearLossless_16.dcm", None, 0),
    "JPEG2000Lossless": ("MR_small_jp2klossless.dcm", "MR_small.dcm", 0),
    "JPEG2000": ("JPEG2000.dcm", None, 0),
    "RLE": ("MR_small_RLE.dcm", "MR_small.dcm", 0),
}


@pytest.mark.parametrize("name", SYNTAXES)
def test_each_compressed_syntax_reads_and_equals_its_uncompressed_twin(name):
    """With the dicom extra installed."""
    for module in ("libjpeg", "openjpeg", "rle"):
        pytest.importorskip(module)
    file, twin, _ = SYNTAXES[name]
    image = read(FILES / file, include_secondary=True)
    assert image.steps[0].startswith("decode") and image.pixels.std() > 0
    if twin:
        assert (image.pixels == read(FILES / twin).pixels).all()


def test_without_the_decoder_the_error_names_syntax_uid_and_extra():
    """In a process where no decoding package can be imported; RLE needs none, pydicom decodes it."""
    script = textwrap.dedent(f"""
        import sys
        class Hidden:
            def find_spec(self, name, path=None, target=None):
                hidden = ("libjpeg", "openjpeg", "rle", "pylibjpeg", "PIL", "gdcm", "jpeg_ls")
                if name.partition(".")[0] in hidden:
                    raise ModuleNotFoundError(name=name)
        sys.meta_path.insert(0, Hidden())
        from pathlib import Path
        from meditok.data import read
        from meditok.errors import MissingDecoderError
        files = {[entry[0] for entry in SYNTAXES.values()]!r}
        for file in files:
            try:
                read(Path({str(FILES)!r}) / file, include_secondary=True)
                print(file, "read")
            except MissingDecoderError as error:
                print(file, error.exit_code, error)
    """)
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(out) == len(SYNTAXES)
    for line in out:
        file = line.split()[0]
        if file == "MR_small_RLE.dcm":
            assert line.endswith("read")
            continue
        syntax = pydicom.dcmread(FILES / file, stop_before_pixels=True).file_meta.TransferSyntaxUID
        assert line.split()[1] == "4" and syntax.name in line and f"({syntax})" in line and "meditok[dicom]" in line


@pytest.mark.parametrize("uid", ["1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.102", "1.2.840.10008.1.2.4.80"])
def test_htj2k_mpeg_and_jpeg_ls_are_named_when_nothing_decodes_them(tmp_path, monkeypatch, uid):
    """Also for syntaxes that pydicom itself does not know."""
    path = dicom.write(tmp_path / "a.dcm", dicom.dataset(np.zeros((8, 8), np.uint8), "US"), uid, [b"\0" * 32])
    try:
        decoder = get_decoder(pydicom.uid.UID(uid))
        monkeypatch.setattr(decoder, "_available", {})
    except NotImplementedError:
        pass
    with pytest.raises(MissingDecoderError, match=uid.replace(".", r"\.")):
        read(path)


# -- colour ----------------------------------------------------------------------
BARS = np.array(
    [
        [255, 255, 255],
        [255, 255, 0],
        [0, 255, 255],
        [0, 255, 0],
        [255, 0, 255],
        [255, 0, 0],
        [0, 0, 255],
        [0, 0, 0],
    ],
    np.uint8,
)
PICTURE = np.repeat(np.repeat(BARS[None], 32, 0), 8, 1)  # (32, 64, 3): bars eight pixels wide


def ybr(rgb: np.ndarray) -> np.ndarray:
    """Full-range YCbCr of RGB (ITU-T T.871), rounded."""
    r, g, b = np.moveaxis(rgb.astype(np.float64), -1, 0)
    parts = (
        0.299 * r + 0.587 * g + 0.114 * b,
        -0.168736 * r - 0.331264 * g + 0.5 * b + 128,
        0.5 * r - 0.418688 * g - 0.081312 * b + 128,
    )
    return np.clip(np.rint(np.stack(parts, -1)), 0, 255).astype(np.uint8)


def bars(kind: str) -> tuple[pydicom.Dataset, str, list[bytes] | None]:
    """(data set, transfer syntax, encoded frames) of the colour bars."""
    data = dicom.dataset(PICTURE, "US")
    if kind == "RGB":
        return data, dicom.EXPLICIT, None
    if kind == "RGB planar":
        data.PlanarConfiguration, data.PixelData = 1, PICTURE.transpose(2, 0, 1).tobytes()
        return data, dicom.EXPLICIT, None
    if kind in ("YBR_FULL", "YBR_FULL planar"):
        data.PhotometricInterpretation = "YBR_FULL"
        data.PlanarConfiguration = int("planar" in kind)
        pixels = ybr(PICTURE)
        data.PixelData = (pixels.transpose(2, 0, 1) if "planar" in kind else pixels).tobytes()
        return data, dicom.EXPLICIT, None
    if kind == "YBR_FULL_422":
        data.PhotometricInterpretation = kind
        pixels = ybr(PICTURE)
        packed = np.concatenate([pixels[:, 0::2, :1], pixels[:, 1::2, :1], pixels[:, 0::2, 1:]], -1)
        data.PixelData = packed.tobytes()
        return data, dicom.EXPLICIT, None
    if kind == "PALETTE COLOR":
        indices = np.repeat(np.repeat(np.arange(8, dtype=np.uint8)[None], 32, 0), 8, 1)
        data = dicom.dataset(indices, "US", PhotometricInterpretation=kind)
        for channel, name in enumerate(("Red", "Green", "Blue")):
            setattr(data, f"{name}PaletteColorLookupTableDescriptor", [8, 0, 16])
            table = BARS[:, channel].astype("<u2") * 257
            setattr(data, f"{name}PaletteColorLookupTableData", table.tobytes())
        return data, dicom.EXPLICIT, None
    if kind in ("JPEG YBR_FULL_422", "JPEG RGB"):
        buffer = io.BytesIO()
        if kind == "JPEG RGB":
            Image.fromarray(PICTURE).save(buffer, "JPEG", quality=95, subsampling=0, keep_rgb=True)
            data.PhotometricInterpretation = "RGB"
        else:
            Image.fromarray(PICTURE).save(buffer, "JPEG", quality=95, subsampling=1)
            data.PhotometricInterpretation = "YBR_FULL_422"
        return data, "1.2.840.10008.1.2.4.50", [buffer.getvalue()]
    lossless = kind == "J2K YBR_RCT"
    buffer = io.BytesIO()
    extra = {"irreversible": False} if lossless else {"irreversible": True, "quality_layers": [2]}
    Image.fromarray(PICTURE).save(buffer, "JPEG2000", no_jp2=True, mct=1, **extra)
    data.PhotometricInterpretation = kind.removeprefix("J2K ")
    return data, f"1.2.840.10008.1.2.4.9{0 if lossless else 1}", [buffer.getvalue()]


KINDS = [
    "RGB", "RGB planar", "YBR_FULL", "YBR_FULL planar", "YBR_FULL_422", "PALETTE COLOR", "JPEG YBR_FULL_422",
    "JPEG RGB", "J2K YBR_RCT", "J2K YBR_ICT",
]  # fmt: skip


CASES = [(kind, "default") for kind in KINDS]
CASES += [(kind, plugin) for kind in KINDS if kind[0] == "J" for plugin in ("pylibjpeg", "pillow")]


@pytest.mark.parametrize(("kind", "plugin"), CASES)
def test_colour_bars_come_back_as_rgb_whichever_decoder_is_present(tmp_path, monkeypatch, kind, plugin):
    """Within the loss of the codec, measured in the middle of each bar."""
    data, syntax, encoded = bars(kind)
    path = dicom.write(tmp_path / "bars.dcm", data, syntax, encoded)
    if plugin != "default":
        decoder = get_decoder(pydicom.uid.UID(syntax))
        if plugin not in decoder.available_plugins:
            pytest.skip(f"{plugin} does not decode this syntax here")
        monkeypatch.setattr(decoder, "_available", {plugin: decoder._available[plugin]})
    image = read(path)
    middles = to_display8(image.pixels).permute(1, 2, 0)[16, 4::8].numpy().astype(int)
    loss = 0 if kind in ("RGB", "RGB planar", "PALETTE COLOR", "J2K YBR_RCT") else 3 if encoded is None else 12
    assert np.abs(middles - BARS.astype(int)).max() <= loss, middles
    assert (image.channels, image.low, image.high, image.unit) == (3, 0.0, 255.0, "display")


def test_colour_of_sixteen_bits_is_in_display_units_too(tmp_path):
    """0..255 as displayed, without rounding to 8 bits."""
    image = read(FILES / "SC_rgb_rle_16bit.dcm", include_secondary=True)
    stored = pydicom.dcmread(FILES / "SC_rgb_rle_16bit.dcm").pixel_array
    assert (image.low, image.high, image.unit) == (0.0, 255.0, "display")
    expected = torch.from_numpy(stored.astype(np.float64) / 65535 * 2 - 1).permute(2, 0, 1)
    assert torch.allclose(image.pixels.double(), expected, atol=1e-6)


def test_a_cine_gives_every_frame_in_order():
    """30 JPEG frames of an ultrasound cine; neighbours differ little but differ."""
    images = list(frames(FILES / "examples_ybr_color.dcm"))
    assert [image.frame for image in images] == list(range(30)) and all(not image.volume for image in images)
    steps = [(a.pixels - b.pixels).abs().mean().item() for a, b in zip(images, images[1:], strict=False)]
    assert sum(step > 0 for step in steps) >= 25 and max(steps) < 0.2
