"""Bad pictures B1 to B5 of the requirements, made by script; see bad_inputs.py."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


def noise(*shape, dtype=np.uint8, top=255) -> np.ndarray:
    return np.random.default_rng(1).integers(0, top, shape).astype(dtype)


def png(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path, "PNG")
    return path


# -- pictures ----------------------------------------------------------------------
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
