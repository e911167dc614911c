"""Bad DICOM files B7 to B19 of the requirements, made by script; see bad_inputs.py."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.readers import make_dicom as dicom
from tests.readers.bad_pictures import noise


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
    return dicom.patch_length(
        _mr(folder, "wrap.dcm", InstitutionName=None, EncapsulatedDocument=b"ab"),
        b"\x42\x00\x11\x00OB",
        0xFFFFFFFE,
    )


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
    data = dicom.dataset(
        noise(32, 32, dtype=np.uint16, top=4000), "CT", sop="MR", RescaleSlope=None, RescaleIntercept=None
    )
    return dicom.write(folder / "norescale.dcm", data)


def b17_frame_count(folder: Path) -> Path:
    """Enhanced CT of three frames with functional groups for two."""
    from pydicom.dataset import Dataset

    data = dicom.dataset(noise(3, 16, 16, dtype=np.uint16, top=4000), "CT", sop="ECT", RescaleSlope=None)
    data.PerFrameFunctionalGroupsSequence = [Dataset(), Dataset()]
    return dicom.write(folder / "groups.dcm", data)


def b18_partial(folder: Path) -> Path:
    return dicom.write(
        folder / "partial.dcm",
        dicom.dataset(noise(16, 16, 3), "US", PhotometricInterpretation="YBR_PARTIAL_420"),
    )


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
