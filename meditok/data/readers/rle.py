"""A look over an RLE Lossless frame of DICOM (PS3.5 annex G) before a decoder sees it."""

from __future__ import annotations

import struct

_HEADER = 64  # bytes: the number of byte planes, and fifteen offsets


def plane_sizes(frame: bytes, stop: int) -> list[int] | None:
    """Bytes that each plane of a frame unpacks to, counted up to the first run past `stop`; None without a header.

    Only run headers are followed. A decoder in compiled code may write what a plane holds beyond its pixels past the
    end of its buffer, and a few kilobytes of runs may stand for gigabytes.
    """
    if len(frame) < _HEADER:
        return None
    count, *offsets = struct.unpack_from("<16I", frame)
    if not 1 <= count <= 15 or any(not _HEADER <= offset <= len(frame) for offset in offsets[:count]):
        return None
    return [
        _unpacked(frame, start, end, stop)
        for start, end in zip(offsets[:count], [*offsets[1:count], len(frame)], strict=True)
    ]


def _unpacked(frame: bytes, at: int, end: int, stop: int) -> int:
    # Header n: 0..127 copies the next n + 1 bytes, 129..255 repeats the next byte 257 - n times, 128 is nothing.
    total = 0
    while at < end - 1 and total <= stop:  # one byte alone is padding to an even length
        head = frame[at]
        if head < 128:
            total += min(head + 1, end - at - 1)
            at += head + 2
        elif head > 128:
            total += 257 - head
            at += 2
        else:
            at += 1
    return total
