"""What compressed code streams announce, read before a decoder is given them: JPEG, JPEG-LS and JPEG 2000."""

from __future__ import annotations

import struct

from meditok.errors import UnsafeFileError

MAX_SCANS = 200  # a progressive JPEG has about ten; each costs a pass over the whole picture


def stream_size(stream: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, components) that a code stream announces; None if it cannot be told."""
    start = stream.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0 and len(stream) >= start + 42:
        right, bottom, left, top = struct.unpack_from(">4I", stream, start + 8)
        return bottom - top, right - left, struct.unpack_from(">H", stream, start + 40)[0]
    if stream[:2] != b"\xff\xd8":
        return None
    offset = 2
    while offset + 10 <= len(stream) and stream[offset] == 0xFF:
        marker = stream[offset + 1]
        if marker == 0xFF:
            offset += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
            return *struct.unpack_from(">HH", stream, offset + 5), stream[offset + 9]
        if marker == 0xDA:
            return None
        offset += 2 + struct.unpack_from(">H", stream, offset + 2)[0]
    return None


def check_scans(stream, where: str) -> None:
    """UnsafeFileError for a JPEG of so many scans that decoding a few kilobytes could take hours."""
    if bytes(stream[:2]) != b"\xff\xd8":
        return
    scans, at = 0, stream.find(b"\xff\xda")  # entropy-coded data never holds a bare marker
    while at >= 0 and scans <= MAX_SCANS:
        scans, at = scans + 1, stream.find(b"\xff\xda", at + 2)
    if scans > MAX_SCANS:
        raise UnsafeFileError(
            f"{where}: a JPEG of more than {MAX_SCANS} scans, which could take hours to decode; it was not read; "
            "save the picture again"
        )
