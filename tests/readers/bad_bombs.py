"""Small files that claim, or unpack to, far more than they hold; see bad_inputs.py."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.readers import make_dicom as dicom
from tests.readers.bad_pictures import noise

HUGE = 60000


def _saved(image: Image.Image, fmt: str, **options) -> bytearray:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return bytearray(buffer.getvalue())


def _patched_jpeg() -> bytearray:
    raw = _saved(Image.fromarray(noise(16, 16)), "JPEG")
    struct.pack_into(">HH", raw, raw.index(b"\xff\xc0") + 5, HUGE, HUGE)
    return raw


def b2_jpeg(folder: Path) -> Path:
    (folder / "huge.jpg").write_bytes(_patched_jpeg())
    return folder / "huge.jpg"


def b2_bmp(folder: Path) -> Path:
    raw = _saved(Image.fromarray(noise(16, 16)), "BMP")
    struct.pack_into("<ii", raw, 18, HUGE, HUGE)
    (folder / "huge.bmp").write_bytes(raw)
    return folder / "huge.bmp"


def b2_tiff(folder: Path) -> Path:
    raw = _saved(Image.fromarray(noise(16, 16)), "TIFF")
    at = struct.unpack_from("<I", raw, 4)[0] + 2
    for entry in range(at, at + 24, 12):  # width and length come first
        assert struct.unpack_from("<H", raw, entry)[0] in (256, 257)
        struct.pack_into("<HII", raw, entry + 2, 4, 1, HUGE)
    (folder / "huge.tif").write_bytes(raw)
    return folder / "huge.tif"


def b2_npy(folder: Path) -> Path:
    np.save(folder / "huge.npy", noise(16, 16))
    raw = (folder / "huge.npy").read_bytes()
    (folder / "huge.npy").write_bytes(raw.replace(b"(16, 16), }" + b" " * 6, b"(60000, 60000), }"))
    return folder / "huge.npy"


def b2_dicom(folder: Path) -> Path:
    data = dicom.dataset(noise(16, 16), "US", Rows=HUGE, Columns=HUGE)
    return dicom.write(folder / "huge.dcm", data, "1.2.840.10008.1.2.4.50", [bytes(_patched_jpeg())])


def b2_scans(folder: Path) -> Path:
    """A progressive JPEG whose last scan, a hundred bytes, is there a thousand times over."""
    raw = bytes(_saved(Image.new("L", (2000, 2000), 128), "JPEG", progressive=True))
    scan = raw[raw.rindex(b"\xff\xda") : -2]
    (folder / "scans.jpg").write_bytes(raw[:-2] + scan * 1000 + raw[-2:])
    return folder / "scans.jpg"


def b2_pages(folder: Path) -> Path:
    """A TIFF of a thousand pages that all show the same 64 million pixels, compressed to some kilobytes."""
    raw = _saved(Image.new("1", (8000, 8000)), "TIFF", compression="group4")
    start = struct.unpack_from("<I", raw, 4)[0]
    size = 2 + 12 * struct.unpack_from("<H", raw, start)[0]
    directory, last = bytes(raw[start : start + size]), start + size
    for _ in range(1000):
        raw += b"\0" * (len(raw) % 2)
        struct.pack_into("<I", raw, last, len(raw))
        last = len(raw) + size
        raw += directory + b"\0" * 4
    (folder / "pages.tif").write_bytes(raw)
    return folder / "pages.tif"


def b2_frames(folder: Path) -> Path:
    """A multi-frame DICOM whose frames are one tiny code stream each, of 64 million pixels as they say."""
    stream = _saved(Image.new("L", (16, 16)), "JPEG2000", no_jp2=True)
    struct.pack_into(">4I", stream, stream.index(b"\xff\x51") + 6, 8000, 8000, 0, 0)
    data = dicom.dataset(noise(16, 16), "US", Rows=8000, Columns=8000, NumberOfFrames=500)
    return dicom.write(folder / "frames.dcm", data, "1.2.840.10008.1.2.4.90", [bytes(stream)] * 500)


def b10_rle_overrun(folder: Path) -> Path:
    """RLE runs that stand for far more bytes than the frame has pixels."""
    frame = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x07" * 5000
    return dicom.write(folder / "runs.dcm", dicom.dataset(noise(16, 16), "US"), "1.2.840.10008.1.2.5", [frame])


def b10_rle_short(folder: Path) -> Path:
    frame = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x07"
    return dicom.write(folder / "short.dcm", dicom.dataset(noise(16, 16), "US"), "1.2.840.10008.1.2.5", [frame])


def b18_components(folder: Path) -> Path:
    """A grey header over a code stream in colour."""
    stream = bytes(_saved(Image.fromarray(noise(16, 16, 3)), "JPEG"))
    return dicom.write(folder / "parts.dcm", dicom.dataset(noise(16, 16), "US"), "1.2.840.10008.1.2.4.50", [stream])


def b30_parquet_bomb(folder: Path) -> Path:
    """Ten thousand rows that repeat one text of a million letters, stored once."""
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10000, np.int32)), pa.array(["x" * 10**6]))
    pq.write_table(pa.table({"path": text}), folder / "bomb.parquet", store_schema=False)
    return folder / "bomb.parquet"
