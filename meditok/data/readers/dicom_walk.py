"""Finding the pixel data of a DICOM file, element by element, with every length checked against the file.

This walk comes before any parser sees the bytes: lengths that wrap, sequences without an end and deflated
bombs stop here. It reads tags, VRs and lengths only, never values, so nothing personal can reach a message.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field

from meditok.data.options import Limits
from meditok.data.readers.blob import Blob
from meditok.errors import CorruptImageError, HeaderMismatchError, TruncatedDicomError, UnsafeFileError

IMPLICIT_LE = "1.2.840.10008.1.2"
EXPLICIT_LE = "1.2.840.10008.1.2.1"
DEFLATED_LE = "1.2.840.10008.1.2.1.99"
EXPLICIT_BE = "1.2.840.10008.1.2.2"
_NATIVE = {IMPLICIT_LE, EXPLICIT_LE, DEFLATED_LE, EXPLICIT_BE}

PIXEL_TAGS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
_LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_MAX_DEPTH = 64


@dataclass
class Layout:
    """Where things lie. Offsets count from the start of `data`: the file, or its inflated data set."""

    data: object  # bytes or mmap
    syntax: str  # transfer syntax UID
    implicit: bool
    little: bool
    start: int  # of the data set
    header_end: int  # where the pixel element starts, or the end of the data set
    keyword: str | None = None  # PixelData | FloatPixelData | DoubleFloatPixelData | None
    vr: str = "OW"
    value: int = 0  # offset of the pixel value
    length: int = 0  # its declared length, when defined
    available: int = 0  # bytes of it that are in the file
    encapsulated: bool = False
    table: list[int] = field(default_factory=list)  # basic offset table
    fragments: list[tuple[int, int]] = field(default_factory=list)  # (offset, length)
    trailing: int = 0  # bytes after the pixel data that are no element
    notes: list[str] = field(default_factory=list)


def has_preamble(head: bytes) -> bool:
    return head[128:132] == b"DICM"


def looks_like_dicom(head: bytes) -> bool:
    """True with a preamble, or if the first element is one a bare data set begins with."""
    if has_preamble(head):
        return True
    if len(head) < 12:
        return False
    group, element, length = struct.unpack_from("<HHI", head)
    if group in (2, 8) and element < 0x70:
        return head[4:6].isalpha() and head[4:6].isupper() or (length < 256 and length % 2 == 0)
    return head[:4] in (b"\x00\x08\x00\x05", b"\x00\x08\x00\x08", b"\x00\x08\x00\x16")


def locate(blob: Blob, limits: Limits, assume_syntax: str | None = None) -> Layout:
    """Walk the file up to and over its pixel data.

    Raises HeaderMismatchError without preamble, meta header or transfer syntax (unless assume_syntax),
    CorruptImageError for lengths past the end, TruncatedDicomError for a cut pixel element and
    UnsafeFileError for a deflated bomb or runaway nesting.
    """
    data = blob.buffer()
    program = data[:2] == b"MZ" or data[:4] == b"\x7fELF"
    syntax, start = _meta(data, blob.label, assume_syntax)
    if syntax == DEFLATED_LE:
        data, start = _inflate(data, start, blob, limits), 0
    little, implicit = syntax != EXPLICIT_BE, syntax == IMPLICIT_LE
    layout = Layout(data, syntax, implicit, little, start, len(data))
    if program:
        layout.notes.append("the preamble begins like a program; do not run this file")
    if start + 8 <= len(data):
        vr = bytes(data[start + 4 : start + 6])
        explicit = bool(re.fullmatch(rb"[A-Z]{2}", vr))
        if explicit == implicit and little:
            layout.implicit = not explicit
            layout.notes.append(
                f"data set is {'explicit' if explicit else 'implicit'} VR although its transfer syntax says otherwise"
            )
    _Walker(layout, blob.label, limits).run()
    return layout


def _meta(data, where: str, assume_syntax: str | None) -> tuple[str, int]:
    """(transfer syntax, offset of the data set) from group 0002, which is always explicit little endian."""
    offset = 132 if has_preamble(bytes(data[:132])) else 0
    first = offset
    syntax = None
    while offset + 8 <= len(data):
        group, element, vr, length = struct.unpack_from("<HH2sH", data, offset)
        if group != 2:
            break
        value = offset + 8
        if vr in _LONG_VRS:
            if offset + 12 > len(data):
                break
            length, value = struct.unpack_from("<I", data, offset + 8)[0], offset + 12
        if value + length > len(data):
            raise CorruptImageError(
                f"{where}: element ({group:04X},{element:04X}) claims {length} bytes, "
                f"{len(data) - value} are left; "
                "the file is cut or damaged"
            )
        if element == 0x0010:
            syntax = bytes(data[value : value + length]).decode("ascii", "replace").strip("\0 ")
        offset = value + length
    if syntax is None or first == 0:
        missing = "DICOM preamble" if first == 0 else "transfer syntax in its file meta information"
        if assume_syntax is None:
            raise HeaderMismatchError(
                f"{where}: no {missing}; if this is DICOM, pass --assume-syntax UID (often {IMPLICIT_LE})"
            )
        syntax = syntax or assume_syntax
    if not re.fullmatch(r"[0-9.]{1,64}", syntax):
        raise HeaderMismatchError(f"{where}: TransferSyntaxUID (0002,0010) is not a UID; repair the header")
    return syntax, offset


def _inflate(data, start: int, blob: Blob, limits: Limits) -> bytes:
    """The deflated data set, under the caps on bytes, ratio and time."""
    deadline = limits.deadline(blob.label)
    inflater, out = zlib.decompressobj(-15), bytearray()
    compressed = len(data) - start
    piece = bytes(data[start:])
    try:
        while piece and not inflater.eof:
            out += inflater.decompress(piece, 2**22)
            piece = inflater.unconsumed_tail
            limits.check_bytes(len(out), blob.label, compressed)
            deadline.check()
    except zlib.error as error:
        raise CorruptImageError(f"{blob.label}: the deflated data set is damaged after {len(out)} bytes") from error
    if not inflater.eof:
        raise TruncatedDicomError(
            f"{blob.label}: the deflated data set ends early, {len(out)} bytes from {compressed} "
            "compressed ones; get it again"
        )
    return bytes(out)


class _Walker:
    def __init__(self, layout: Layout, where: str, limits: Limits):
        self.layout, self.where = layout, where
        self.data, self.end = layout.data, len(layout.data)
        self.order = "<" if layout.little else ">"
        self.deadline = limits.deadline(where)
        self.steps = 0

    def run(self) -> None:
        layout, offset, last = self.layout, self.layout.start, -1
        while offset + 8 <= self.end:
            tag, vr, length, value = self._element(offset, layout.implicit)
            if tag <= last and tag >> 16 < 0x0008 and self._only_zeros(offset):
                layout.header_end, layout.trailing = offset, self.end - offset
                return
            last = tag
            if tag in PIXEL_TAGS:
                layout.header_end, layout.value = offset, value
                layout.keyword, layout.vr = PIXEL_TAGS[tag], vr.decode("ascii", "replace") if vr else "OW"
                self._pixels(length)
                return
            offset = self._skip(tag, vr, length, value, layout.implicit, 0)
        if offset < self.end and not self._only_zeros(offset):
            raise CorruptImageError(
                f"{self.where}: ends inside an element at byte {offset} of {self.end}; get it again"
            )
        layout.header_end = min(offset, self.end)

    def _element(self, offset: int, implicit: bool) -> tuple[int, bytes, int, int]:
        """(tag, VR or b"", length, offset of the value)."""
        group, element = struct.unpack_from(self.order + "HH", self.data, offset)
        tag = group << 16 | element
        if implicit or group == 0xFFFE:
            return tag, b"", struct.unpack_from(self.order + "I", self.data, offset + 4)[0], offset + 8
        vr = bytes(self.data[offset + 4 : offset + 6])
        if vr in _LONG_VRS:
            if offset + 12 > self.end:
                raise CorruptImageError(
                    f"{self.where}: ends inside an element at byte {offset} of {self.end}; get it again"
                )
            return tag, vr, struct.unpack_from(self.order + "I", self.data, offset + 8)[0], offset + 12
        return tag, vr, struct.unpack_from(self.order + "H", self.data, offset + 6)[0], offset + 8

    def _skip(self, tag: int, vr: bytes, length: int, value: int, implicit: bool, depth: int) -> int:
        """Offset after an element, its items walked if its length is undefined."""
        self._tick(depth)
        if length != _UNDEFINED:
            if value + length > self.end:
                raise CorruptImageError(
                    f"{self.where}: element {_name(tag)} claims {length} bytes, {self.end - value} are left; "
                    "the file is cut or its length field is damaged"
                )
            return value + length
        implicit = implicit or vr == b"UN"
        offset = value
        while offset + 8 <= self.end:
            item, _, item_length, item_value = self._element(offset, True)
            if item == _SEQUENCE_END:
                return item_value
            if item != _ITEM:
                break
            if item_length == _UNDEFINED:
                offset = self._item(item_value, implicit, depth + 1)
            else:
                offset = self._skip(item, b"", item_length, item_value, implicit, depth + 1)
        raise CorruptImageError(
            f"{self.where}: element {_name(tag)} of undefined length has no end; the file is cut or damaged"
        )

    def _item(self, offset: int, implicit: bool, depth: int) -> int:
        while offset + 8 <= self.end:
            tag, vr, length, value = self._element(offset, implicit)
            if tag == _ITEM_END:
                return value
            offset = self._skip(tag, vr, length, value, implicit, depth)
        raise CorruptImageError(
            f"{self.where}: a sequence item of undefined length has no end; the file is cut or damaged"
        )

    def _tick(self, depth: int) -> None:
        self.steps += 1
        if depth > _MAX_DEPTH:
            raise UnsafeFileError(
                f"{self.where}: sequences are nested more than {_MAX_DEPTH} deep; the file is not read"
            )
        if self.steps % 4096 == 0:
            self.deadline.check()

    def _pixels(self, length: int) -> None:
        layout = self.layout
        if length != _UNDEFINED:
            layout.length = length
            layout.available = min(length, self.end - layout.value)
            after = layout.value + layout.available
            if self.end - after >= 8:
                tag = self._element(after, True)[0]
                layout.trailing = 0 if tag > 0x7FE00010 and tag >> 16 >= 0x7FE0 else self.end - after
            else:
                layout.trailing = self.end - after
            if layout.syntax not in _NATIVE and layout.available < length:
                raise TruncatedDicomError(
                    f"{self.where}: PixelData (7FE0,0010) has {layout.available} bytes of {length}; get the file again"
                )
            return
        layout.encapsulated = True
        offset, first = layout.value, True
        while offset + 8 <= self.end:
            self._tick(0)
            tag, _, size, value = self._element(offset, True)
            if tag == _SEQUENCE_END:
                return
            if tag != _ITEM or size == _UNDEFINED:
                raise CorruptImageError(
                    f"{self.where}: PixelData (7FE0,0010) holds no item at byte {offset}; it is damaged"
                )
            if value + size > self.end:
                raise TruncatedDicomError(
                    f"{self.where}: PixelData (7FE0,0010) is cut, {self.end - value} bytes of {size} "
                    "in fragment "
                    f"{len(layout.fragments) + 1}; get the file again"
                )
            if first:
                layout.table = list(struct.unpack_from(f"{self.order}{size // 4}I", self.data, value))
            else:
                layout.fragments.append((value, size))
            offset, first = value + size, False
        raise TruncatedDicomError(
            f"{self.where}: PixelData (7FE0,0010) of undefined length has no end after "
            f"{len(layout.fragments)} fragments "
            f"and {self.end - layout.value} bytes; get the file again"
        )

    def _only_zeros(self, offset: int) -> bool:
        return not any(self.data[offset : self.end])


def _name(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
