"""The bad inputs of the requirements, made by script: `BAD_INPUTS` and one function a fixture.

Each entry is (id, make(folder) -> path, expected error class, exit code, options). Every one must fail with
that error, as one line that begins with what was given, and leave no output.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from meditok import errors as e
from tests.readers import make_dicom as dicom

RNG = np.random.default_rng(0)


def noise(*shape, dtype=np.uint8, top=255) -> np.ndarray:
    return np.random.default_rng(1).integers(0, top, shape).astype(dtype)


def png(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path, "PNG")
    return path


# -- pictures -------------------------------------------------------------------------------------------------
def b1_cut_png(folder: Path) -> Path:
    path = png(folder / "cut.png", noise(64, 64))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * 0.6)])
    return path


def b1_cut_jpeg(folder: Path) -> Path:
    path = folder / "cut.jpg"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    return path


def b1_empty(folder: Path) -> Path:
    (folder / "empty.png").write_bytes(b"")
    return folder / "empty.png"


def b1_text(folder: Path) -> Path:
    (folder / "text.png").write_text("this is not a picture\n" * 20)
    return folder / "text.png"


def b2_huge_header(folder: Path) -> Path:
    """IHDR of 60,000 x 60,000 with a right CRC over 10 KB of data."""
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(RNG.bytes(10000), 0)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (folder / "huge.png").write_bytes(chunks)
    return folder / "huge.png"


def b3_jpeg_as_ct(folder: Path) -> Path:
    Image.fromarray(noise(64, 64)).save(folder / "ct.jpg")
    return folder / "ct.jpg"


def b5_transparent(folder: Path) -> Path:
    return png(folder / "clear.png", np.zeros((32, 32, 4), np.uint8))


def b5_deep_colour(folder: Path) -> Path:
    """16-bit RGB PNG, which Pillow would cut to 8 bits."""
    rows = b"".join(b"\0" + noise(16, 6).tobytes() for _ in range(16))
    data = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (folder / "deep.png").write_bytes(data)
    return folder / "deep.png"


# -- DICOM ----------------------------------------------------------------------------------------------------
def _mr(folder: Path, name: str, pixels=None, syntax=dicom.EXPLICIT, **tags) -> Path:
    pixels = noise(32, 32, dtype=np.uint16, top=4000) if pixels is None else pixels
    return dicom.write(folder / name, dicom.dataset(pixels, "MR", **tags), syntax)


def b7_truncated(folder: Path) -> Path:
    path = _mr(folder, "cut.dcm")
    path.write_bytes(path.read_bytes()[:-500])
    return path


def b7_truncated_fragments(folder: Path) -> Path:
    data = dicom.dataset(noise(32, 32), "US")
    buffer = io.BytesIO()
    Image.fromarray(noise(32, 32)).save(buffer, "JPEG")
    path = dicom.write(folder / "cut_jpeg.dcm", data, "1.2.840.10008.1.2.4.50", [buffer.getvalue()])
    path.write_bytes(path.read_bytes()[:-300])
    return path


def b9_no_meta(folder: Path) -> Path:
    path = _mr(folder, "bare.dcm", syntax=dicom.IMPLICIT)
    raw = path.read_bytes()
    path.write_bytes(raw[raw.index(b"\x08\x00\x16\x00") :])
    return path


def b9_no_syntax(folder: Path) -> Path:
    path = _mr(folder, "nosyntax.dcm")
    raw = bytearray(path.read_bytes())
    at = raw.index(b"\x02\x00\x10\x00UI")
    raw[at + 2 : at + 4] = b"\x15\x00"  # another tag of the group in its place
    path.write_bytes(raw)
    return path


def b10_mpeg(folder: Path) -> Path:
    return dicom.write(folder / "mpeg.dcm", dicom.dataset(noise(32, 32), "US"), "1.2.840.10008.1.2.4.102", [b"\0" * 64])


def b10_private(folder: Path) -> Path:
    return dicom.write(folder / "private.dcm", dicom.dataset(noise(32, 32), "US"), "1.2.826.0.1.999.4.5", [b"\0" * 64])


def b11_deflated_bomb(folder: Path) -> Path:
    return dicom.deflated_bomb(folder / "bomb.dcm")


def b12_wrapping_length(folder: Path) -> Path:
    return dicom.patch_length(_mr(folder, "wrap.dcm", InstitutionName=None, EncapsulatedDocument=b"ab"), b"\x42\x00\x11\x00OB", 0xFFFFFFFE)


def b12_no_end(folder: Path) -> Path:
    path = _mr(folder, "noend.dcm", ReferencedImageSequence=[])
    raw = bytearray(path.read_bytes())
    at = raw.index(b"\x08\x00\x40\x11SQ")
    raw[at + 8 : at + 12] = b"\xff\xff\xff\xff"
    path.write_bytes(raw)
    return path


def b12_pixels_without_end(folder: Path) -> Path:
    path = dicom.write(folder / "nodelim.dcm", dicom.dataset(noise(32, 32), "US"), "1.2.840.10008.1.2.5", [b"\0" * 200])
    path.write_bytes(path.read_bytes()[:-8])
    return path


def b12_deep(folder: Path) -> Path:
    """Sequences of undefined length nested 5,000 deep."""
    path = _mr(folder, "deep.dcm")
    raw = path.read_bytes()
    at = raw.index(b"\x28\x00\x02\x00")  # before the image pixel module
    nest = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 5000
    path.write_bytes(raw[:at] + nest + raw[at:])
    return path


def b13_rows_doubled(folder: Path) -> Path:
    return _mr(folder, "rows.dcm", Rows=64)


def b13_rows_zero(folder: Path) -> Path:
    return _mr(folder, "rows0.dcm", Rows=0)


def b13_frames_zero(folder: Path) -> Path:
    return _mr(folder, "frames0.dcm", NumberOfFrames=0)


def b13_frames_negative(folder: Path) -> Path:
    return _mr(folder, "frames-1.dcm", NumberOfFrames=-1)


def b13_bits(folder: Path) -> Path:
    return _mr(folder, "bits.dcm", BitsStored=24, HighBit=23)


def b15_width_zero(folder: Path) -> Path:
    return _mr(folder, "width0.dcm", WindowCenter=40, WindowWidth=0)


def b15_width_negative(folder: Path) -> Path:
    return _mr(folder, "width-1.dcm", WindowCenter=40, WindowWidth=-5)


def b16_slope_zero(folder: Path) -> Path:
    data = dicom.dataset(noise(32, 32, dtype=np.uint16, top=4000), "CT", RescaleSlope=0, RescaleIntercept=-1024)
    return dicom.write(folder / "slope0.dcm", data)


def b16_ct_8bit(folder: Path) -> Path:
    return dicom.write(folder / "ct8.dcm", dicom.dataset(noise(32, 32), "CT"))


def b16_ct_without_rescale(folder: Path) -> Path:
    data = dicom.dataset(noise(32, 32, dtype=np.uint16, top=4000), "CT", sop="MR", RescaleSlope=None, RescaleIntercept=None)
    return dicom.write(folder / "norescale.dcm", data)


def b17_frame_count(folder: Path) -> Path:
    """Enhanced CT of three frames with functional groups for two."""
    from pydicom.dataset import Dataset

    data = dicom.dataset(noise(3, 16, 16, dtype=np.uint16, top=4000), "CT", sop="ECT", RescaleSlope=None)
    data.PerFrameFunctionalGroupsSequence = [Dataset(), Dataset()]
    return dicom.write(folder / "groups.dcm", data)


def b18_partial(folder: Path) -> Path:
    return dicom.write(folder / "partial.dcm", dicom.dataset(noise(16, 16, 3), "US", PhotometricInterpretation="YBR_PARTIAL_420"))


def _object(folder: Path, name: str, sop: str, **tags) -> Path:
    return dicom.write(folder / name, dicom.dataset(None, "OT", sop=sop, **tags))


def b19_rtstruct(folder: Path) -> Path:
    return _object(folder, "rtstruct.dcm", "1.2.840.10008.5.1.4.1.1.481.3")


def b19_sr(folder: Path) -> Path:
    return _object(folder, "sr.dcm", "1.2.840.10008.5.1.4.1.1.88.11")


def b19_pdf(folder: Path) -> Path:
    return _object(folder, "pdf.dcm", "1.2.840.10008.5.1.4.1.1.104.1", EncapsulatedDocument=b"%PDF-1.4")


def b19_presentation(folder: Path) -> Path:
    return _object(folder, "gsps.dcm", "1.2.840.10008.5.1.4.1.1.11.1")


def b19_dicomdir(folder: Path) -> Path:
    return _object(folder, "DICOMDIR", "1.2.840.10008.1.3.10", DirectoryRecordSequence=[])


def b19_secondary(folder: Path) -> Path:
    return dicom.write(folder / "sc.dcm", dicom.dataset(noise(16, 16), "OT", sop="SC"))


def b19_text(folder: Path) -> Path:
    (folder / "notes.md").write_text("# notes\n")
    return folder / "notes.md"


# -- NIfTI ----------------------------------------------------------------------------------------------------
def nifti(path: Path, data: np.ndarray, affine=None, sform: int = 1, qform: int = 0, edit=None) -> Path:
    """Write a NIfTI-1 file; `edit(header)` changes the header after nibabel filled it."""
    image = nib.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine)
    image.set_sform(image.affine, sform)
    image.set_qform(image.affine if affine is None else None, qform)
    nib.save(image, path)
    if edit is not None:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        header = nib.Nifti1Header.from_fileobj(io.BytesIO(raw), check=False)
        edit(header)
        raw = header.binaryblock + raw[348:]
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def _volume(dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 1000, (8, 9, 10)).astype(dtype)


def b21_cut(folder: Path) -> Path:
    path = nifti(folder / "cut.nii.gz", _volume())
    path.write_bytes(path.read_bytes()[:-200])
    return path


def b21_crc(folder: Path) -> Path:
    path = nifti(folder / "crc.nii.gz", _volume())
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 0xFF
    path.write_bytes(raw)
    return path


def b21_not_gzip(folder: Path) -> Path:
    nifti(folder / "plain.nii", _volume()).rename(folder / "plain.nii.gz")
    return folder / "plain.nii.gz"


def b21_gzip_bomb(folder: Path) -> Path:
    """A small header followed by 1 GiB of zeros."""
    head = nifti(folder / "seed.nii", _volume()).read_bytes()
    (folder / "seed.nii").unlink()
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    (folder / "bomb.nii.gz").write_bytes(packer.compress(head) + b"".join(packer.compress(zeros) for _ in range(1024)) + packer.flush())
    return folder / "bomb.nii.gz"


def b21_huge_header(folder: Path) -> Path:
    def claim(header):
        header["dim"][1:4] = 30000

    return nifti(folder / "huge.nii.gz", _volume(), edit=claim)


def b22_nan(folder: Path) -> Path:
    data = _volume(np.float32)
    data[1, 2, 3] = np.nan
    return nifti(folder / "nan.nii.gz", data)


def b22_infinite(folder: Path) -> Path:
    data = _volume(np.float32)
    data[1, 2, 3:5] = np.inf
    return nifti(folder / "inf.nii.gz", data)


def b23_no_codes(folder: Path) -> Path:
    return nifti(folder / "codes.nii.gz", _volume(), sform=0, qform=0)


def b23_singular(folder: Path) -> Path:
    def flatten(header):
        header["srow_z"][:] = 0

    return nifti(folder / "singular.nii.gz", _volume(), edit=flatten)


def b23_four_d(folder: Path) -> Path:
    return nifti(folder / "time.nii.gz", np.zeros((4, 4, 4, 3), np.int16))


def b23_unstated_hu(folder: Path) -> Path:
    return nifti(folder / "hu.nii.gz", _volume() - 1024)


# -- arrays, tars, manifests ------------------------------------------------------------------------------------
def b25_range(folder: Path) -> Path:
    np.save(folder / "range.npy", np.linspace(0, 255, 256).reshape(16, 16))
    return folder / "range.npy"


def b25_channels(folder: Path) -> Path:
    np.save(folder / "channels.npy", np.zeros((16, 16, 2), np.uint8))
    return folder / "channels.npy"


def b25_pickled(folder: Path) -> Path:
    np.save(folder / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return folder / "pickled.npy"


def tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """A tar of (name, bytes) or (name, "-> target") for a link."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content.removeprefix("-> ")
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def _png_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(buffer, "PNG")
    return buffer.getvalue()


def b30_climbing(folder: Path) -> Path:
    return tar(folder / "climb.tar", ("../x.png", _png_bytes()))


def b30_absolute(folder: Path) -> Path:
    return tar(folder / "absolute.tar", ("/tmp/x.png", _png_bytes()))


def b30_link(folder: Path) -> Path:
    return tar(folder / "link.tar", ("x.png", "-> /etc/passwd"))


def b30_code(folder: Path) -> Path:
    return tar(folder / "code.tar", ("x.pyd", b"MZ"))


def b30_cut(folder: Path) -> Path:
    path = tar(folder / "cut.tar", ("a.png", _png_bytes()), ("b.png", _png_bytes()))
    path.write_bytes(path.read_bytes()[:1600])
    return path


def b30_duplicate(folder: Path) -> Path:
    return tar(folder / "twice.tar", ("a.png", _png_bytes()), ("a.png", _png_bytes()))


def b30_manifest(folder: Path) -> Path:
    png(folder / "a.png", noise(16, 16))
    (folder / "list.csv").write_text("path,modality\na.png,us\nmissing.png,us\n")
    return folder / "list.csv"


def b30_manifest_climbs(folder: Path) -> Path:
    (folder / "climb.csv").write_text("path,modality\n../a.png,us\n")
    return folder / "climb.csv"


def b30_manifest_modality(folder: Path) -> Path:
    png(folder / "a.png", noise(16, 16))
    (folder / "nan.csv").write_text("path,modality\na.png,nan\n")
    return folder / "nan.csv"


_CT = {"modality": "ct"}
BAD_INPUTS = [
    ("B1-png", b1_cut_png, e.CorruptImageError, 3, {}),
    ("B1-jpeg", b1_cut_jpeg, e.CorruptImageError, 3, {}),
    ("B1-empty", b1_empty, e.CorruptImageError, 3, {}),
    ("B1-text", b1_text, e.CorruptImageError, 3, {}),
    ("B2", b2_huge_header, e.ImageTooLargeError, 5, {}),
    ("B3", b3_jpeg_as_ct, e.IntensityError, 3, _CT),
    ("B5-alpha", b5_transparent, e.IntensityError, 3, {}),
    ("B5-deep", b5_deep_colour, e.IntensityError, 3, {}),
    ("B7", b7_truncated, e.TruncatedDicomError, 3, {}),
    ("B7-fragments", b7_truncated_fragments, e.TruncatedDicomError, 3, {}),
    ("B9-meta", b9_no_meta, e.HeaderMismatchError, 3, {}),
    ("B9-syntax", b9_no_syntax, e.HeaderMismatchError, 3, {}),
    ("B10-mpeg", b10_mpeg, e.MissingDecoderError, 4, {}),
    ("B10-private", b10_private, e.MissingDecoderError, 4, {}),
    ("B11", b11_deflated_bomb, e.UnsafeFileError, 5, {}),
    ("B12-wrap", b12_wrapping_length, e.CorruptImageError, 3, {}),
    ("B12-end", b12_no_end, e.CorruptImageError, 3, {}),
    ("B12-pixels", b12_pixels_without_end, e.TruncatedDicomError, 3, {}),
    ("B12-deep", b12_deep, e.UnsafeFileError, 5, {}),
    ("B13-rows", b13_rows_doubled, e.HeaderMismatchError, 3, {}),
    ("B13-zero", b13_rows_zero, e.HeaderMismatchError, 3, {}),
    ("B13-frames", b13_frames_zero, e.HeaderMismatchError, 3, {}),
    ("B13-negative", b13_frames_negative, e.HeaderMismatchError, 3, {}),
    ("B13-bits", b13_bits, e.HeaderMismatchError, 3, {}),
    ("B15-zero", b15_width_zero, e.HeaderMismatchError, 3, {}),
    ("B15-negative", b15_width_negative, e.HeaderMismatchError, 3, {}),
    ("B16-slope", b16_slope_zero, e.HeaderMismatchError, 3, {}),
    ("B16-8bit", b16_ct_8bit, e.IntensityError, 3, {}),
    ("B16-rescale", b16_ct_without_rescale, e.IntensityError, 3, {}),
    ("B17", b17_frame_count, e.HeaderMismatchError, 3, {}),
    ("B18", b18_partial, e.HeaderMismatchError, 3, {}),
    ("B19-rtstruct", b19_rtstruct, e.NotAnImageError, 3, {}),
    ("B19-sr", b19_sr, e.NotAnImageError, 3, {}),
    ("B19-pdf", b19_pdf, e.NotAnImageError, 3, {}),
    ("B19-gsps", b19_presentation, e.NotAnImageError, 3, {}),
    ("B19-dicomdir", b19_dicomdir, e.NotAnImageError, 3, {}),
    ("B19-secondary", b19_secondary, e.NotAnImageError, 3, {}),
    ("B19-text", b19_text, e.NotAnImageError, 3, {}),
    ("B21-cut", b21_cut, e.CorruptImageError, 3, {}),
    ("B21-crc", b21_crc, e.CorruptImageError, 3, {}),
    ("B21-gzip", b21_not_gzip, e.CorruptImageError, 3, {}),
    ("B21-bomb", b21_gzip_bomb, e.UnsafeFileError, 5, {}),
    ("B21-huge", b21_huge_header, e.ImageTooLargeError, 5, {}),
    ("B22-nan", b22_nan, e.NonFiniteError, 3, {}),
    ("B22-inf", b22_infinite, e.NonFiniteError, 3, _CT),
    ("B23-codes", b23_no_codes, e.GeometryError, 3, {}),
    ("B23-singular", b23_singular, e.GeometryError, 3, {}),
    ("B23-4d", b23_four_d, e.ShapeError, 3, {}),
    ("B23-hu", b23_unstated_hu, e.IntensityError, 3, {}),
    ("B25-range", b25_range, e.DtypeError, 3, {}),
    ("B25-channels", b25_channels, e.ShapeError, 3, {}),
    ("B25-pickle", b25_pickled, e.UnsafeFileError, 5, {}),
    ("B30-climb", b30_climbing, e.UnsafeFileError, 5, {}),
    ("B30-absolute", b30_absolute, e.UnsafeFileError, 5, {}),
    ("B30-link", b30_link, e.UnsafeFileError, 5, {}),
    ("B30-code", b30_code, e.UnsafeFileError, 5, {}),
    ("B30-cut", b30_cut, e.CorruptImageError, 3, {}),
    ("B30-twice", b30_duplicate, e.BadInputError, 3, {}),
    ("B30-missing", b30_manifest, e.BadInputError, 3, {}),
    ("B30-csv-climb", b30_manifest_climbs, e.UnsafeFileError, 5, {}),
    ("B30-nan", b30_manifest_modality, e.BadInputError, 3, {}),
]
