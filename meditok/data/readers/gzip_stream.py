"""Gzip streams inflated under a cap, to their end, so that a wrong checksum cannot go unseen."""

from __future__ import annotations

import zlib

from meditok.data.options import Limits
from meditok.data.readers.blob import Blob
from meditok.errors import CorruptImageError, UnsafeFileError

_CHUNK = 2**22


def inflate(blob: Blob, expected: int, limits: Limits) -> bytearray:
    """The gzip stream of `blob` up to `expected` bytes, read to its end so that its checksum is verified.

    Raises CorruptImageError for a cut stream or a bad checksum, UnsafeFileError when far more comes out
    than the header announced.
    """
    out, total, position = bytearray(), 0, 0
    deadline = limits.deadline(blob.label)
    inflater = zlib.decompressobj(31)
    try:
        while True:
            piece = blob.read(position, _CHUNK)
            position += len(piece)
            if not piece:
                break
            while piece:
                got = inflater.decompress(piece, _CHUNK)
                total += len(got)
                if len(out) < expected:
                    out += got[: expected - len(out)]
                if total > expected + limits.ratio_from:
                    raise UnsafeFileError(
                        f"{blob.label}: inflates past {total} bytes, its header announces {expected}; it was "
                        "not read; get the file again"
                    )
                deadline.check()
                piece = inflater.unconsumed_tail
                if inflater.eof and inflater.unused_data:
                    if inflater.unused_data[:2] != b"\x1f\x8b":
                        return out  # bytes after the stream, which gzip allows
                    piece, inflater = inflater.unused_data, zlib.decompressobj(31)
        if not inflater.eof:
            raise zlib.error("stream not finished")
    except zlib.error as error:
        raise CorruptImageError(
            f"{blob.label}: the gzip stream is cut or its checksum is wrong after {total} inflated bytes "
            f"of {expected} expected; get the file again"
        ) from error
    return out
