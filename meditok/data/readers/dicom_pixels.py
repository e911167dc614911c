"""One frame of DICOM pixel data: cut out, decoded, signed and turned into RGB exactly once.

Uncompressed frames are read here; compressed ones go through pydicom's decoders in a fixed order, so that
the same plugin answers on every machine that has it. Each frame is cut out before decoding and its code
stream's size is compared with the header before anything is allocated.
"""

from __future__ import annotations

import struct

import numpy as np

from meditok.data.readers.code_stream import check_scans, stream_size
from meditok.data.readers.dicom_header import PARSER_ERRORS, Header, quiet
from meditok.data.readers.dicom_walk import _NATIVE as NATIVE_SYNTAXES
from meditok.data.readers.rle import plane_sizes
from meditok.errors import CorruptImageError, HeaderMismatchError, MissingDecoderError, TruncatedDicomError

_RLE = "1.2.840.10008.1.2.5"
_PLUGIN_ORDER = ("pylibjpeg", "pyjpegls", "gdcm", "pydicom", "pillow")
_YBR_TO_RGB = np.array([[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]])  # ITU-T T.871, 7


class PixelReader:
    """Frames of one file as stored values: (H, W), or (H, W, 3) RGB. Made once per open file."""

    def __init__(self, header: Header):
        self.header, self.layout, self.where = header, header.layout, header.where
        self.native = str(header.syntax) in NATIVE_SYNTAXES
        self.notes: list[str] = []
        if self.native:
            self._check_native_length()
        else:
            self._decoder = self._find_decoder()
            self._ranges = self._frame_ranges()
            held = sum(size for _, size in self.layout.fragments)
            per_pixel = header.samples * (header.allocated // 8 or 1)
            claimed = header.frames * header.rows * header.columns * per_pixel
            header.options.limits.check_expansion(claimed, held, self.where)

    # -- uncompressed ---------------------------------------------------------------------------------------
    def _check_native_length(self) -> None:
        header, layout = self.header, self.layout
        if layout.encapsulated:
            raise CorruptImageError(
                f"{self.where}: PixelData (7FE0,0010) is encapsulated, but the transfer syntax is "
                f"{header.syntax.name}; "
                "repair TransferSyntaxUID (0002,0010)"
            )
        if header.photometric in ("YBR_RCT", "YBR_ICT", "YBR_PARTIAL_422", "YBR_PARTIAL_420"):
            raise header.mismatch("is not used with uncompressed pixels", "PhotometricInterpretation")
        per_pixel = 2 if header.photometric == "YBR_FULL_422" else header.samples
        self._frame_bits = header.rows * header.columns * per_pixel * header.allocated
        expected = (self._frame_bits * header.frames + 7) // 8
        if layout.available < min(layout.length, expected):
            raise TruncatedDicomError(
                f"{self.where}: pixel data has {layout.available} bytes of {expected} expected; get the file again"
            )
        if layout.length < expected:
            raise header.mismatch(
                f"ask for {expected} bytes of pixel data, {layout.length} are there",
                "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "NumberOfFrames",
            )  # fmt: skip
        excess = layout.length - expected + layout.trailing
        if excess * 8 >= self._frame_bits and any(self._slice(layout.value + expected, layout.available - expected)):
            raise header.mismatch(
                f"ask for {expected} bytes of pixel data, {layout.length} are there and are not padding",
                "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "NumberOfFrames",
            )  # fmt: skip
        if excess > 1:
            self.notes.append(f"{excess} bytes of excess padding after the pixel data ignored")

    def _slice(self, start: int, count: int) -> memoryview:
        return memoryview(self.layout.data)[start : start + count]

    def _native(self, index: int) -> np.ndarray:
        header, layout = self.header, self.layout
        first_bit = self._frame_bits * index
        start, stop = first_bit // 8, (first_bit + self._frame_bits + 7) // 8
        if header.allocated == 8 and not layout.little and layout.vr == "OW":
            start, shift = start - start % 2, start % 2
            raw = bytes(self._slice(layout.value + start, stop - start + (stop - start) % 2))
            raw = raw + b"\0" * (len(raw) % 2)
            raw = np.frombuffer(raw, "u2").byteswap().tobytes()[shift:][: stop - start - shift]
        else:
            raw = self._slice(layout.value + start, stop - start)
        if header.allocated == 1:
            bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
            return bits[first_bit % 8 :][: self._frame_bits].reshape(header.rows, header.columns)
        values = np.frombuffer(raw, self._dtype(layout.little))
        if header.photometric == "YBR_FULL_422":
            if header.columns % 2:
                raise header.mismatch("must be even for YBR_FULL_422", "Columns")
            pairs = values.reshape(header.rows, header.columns // 2, 4)  # Y1 Y2 Cb Cr
            frame = np.empty((header.rows, header.columns, 3), values.dtype)
            frame[..., 0] = pairs[..., :2].reshape(header.rows, header.columns)
            frame[..., 1:] = np.repeat(pairs[..., 2:], 2, axis=1)
            return frame
        if header.samples == 1:
            return values.reshape(header.rows, header.columns)
        if header.planar == 1:
            return values.reshape(header.samples, header.rows, header.columns).transpose(1, 2, 0)
        return values.reshape(header.rows, header.columns, header.samples)

    def _dtype(self, little: bool) -> np.dtype:
        if self.layout.keyword != "PixelData":
            kind = "f"
        else:
            kind = "i" if self.header.signed else "u"
        return np.dtype(f"{'<' if little else '>'}{kind}{self.header.allocated // 8}")

    # -- compressed -----------------------------------------------------------------------------------------
    def _find_decoder(self):
        from pydicom.pixels import get_decoder

        uid = self.header.syntax
        name = uid.name if uid.name != uid else "a private transfer syntax"
        try:
            decoder = get_decoder(uid)
        except NotImplementedError as error:
            raise MissingDecoderError(
                f"{self.where}: pixels are compressed as {name} ({uid}), for which no decoder is known; "
                "convert the file to an uncompressed transfer syntax"
            ) from error
        if not decoder.is_available:
            raise MissingDecoderError(
                f"{self.where}: pixels are compressed as {name} ({uid}) and no decoder for it is installed; "
                'run: pip install "meditok[dicom]"'
            )
        return decoder

    def _frame_ranges(self) -> list[list[tuple[int, int]]]:
        """Per frame, its fragments as (offset, length)."""
        header, fragments = self.header, self.layout.fragments
        if not self.layout.encapsulated:
            raise header.mismatch(f"is not encapsulated as {header.syntax.name} asks", "PixelData")
        frames = header.frames
        table = self._extended_table() or self.layout.table
        if len(fragments) < frames:
            raise TruncatedDicomError(
                f"{self.where}: pixel data holds {len(fragments)} frames of {frames} expected; get the file again"
            )
        if frames == 1:
            return [fragments]
        if len(fragments) == frames:
            return [[fragment] for fragment in fragments]
        base = fragments[0][0] - 8
        if len(table) == frames:
            starts = {offset + base for offset in table}
            groups = self._grouped(fragments, [offset - 8 in starts for offset, _ in fragments])
        else:  # no table: a JPEG frame ends with its end-of-image marker
            ends = [
                b"\xff\xd9" in bytes(self._slice(offset + max(0, size - 10), min(size, 10)))
                for offset, size in fragments
            ]
            groups = self._grouped(fragments, [True, *ends[:-1]])
        if len(groups) != frames:
            raise header.mismatch(f"says {frames}, the pixel data holds {len(groups)} frames", "NumberOfFrames")
        return groups

    def _extended_table(self) -> list[int]:
        value = self.header.value(self.header.dataset, "ExtendedOffsetTable")
        return (
            list(struct.unpack(f"<{len(value) // 8}Q", value[: len(value) // 8 * 8]))
            if isinstance(value, bytes)
            else []
        )

    @staticmethod
    def _grouped(fragments, begins) -> list[list[tuple[int, int]]]:
        groups: list[list[tuple[int, int]]] = []
        for fragment, begin in zip(fragments, begins, strict=True):
            if begin or not groups:
                groups.append([])
            groups[-1].append(fragment)
        return groups

    def _decoded(self, index: int) -> tuple[np.ndarray, str]:
        """(array, photometric interpretation after decoding)."""
        header = self.header
        stream = b"".join(bytes(self._slice(offset, size)) for offset, size in self._ranges[index])
        size = stream_size(stream)
        if size is not None and size != (header.rows, header.columns, header.samples):
            raise HeaderMismatchError(
                f"{self.where}: Rows (0028,0010), Columns (0028,0011), SamplesPerPixel (0028,0002) say "
                f"{header.rows} x {header.columns} x {header.samples}, the compressed frame {index} is "
                f"{size[0]} x {size[1]} x {size[2]}; repair the header"
            )
        check_scans(stream, self.where)
        item = struct.pack("<HHI", 0xFFFE, 0xE000, len(stream) + len(stream) % 2) + stream + b"\0" * (len(stream) % 2)
        source = struct.pack("<HHI", 0xFFFE, 0xE000, 0) + item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        options = {
            "rows": header.rows, "columns": header.columns, "samples_per_pixel": header.samples,
            "number_of_frames": 1,
            "bits_allocated": header.allocated, "bits_stored": header.stored_bits,
            "photometric_interpretation": header.photometric, "pixel_representation": header.signed,
            "pixel_keyword": "PixelData", "planar_configuration": header.planar,
        }  # fmt: skip
        failures = []
        plugins = sorted(self._decoder.available_plugins, key=_plugin_rank)
        if str(header.syntax) == _RLE:
            plugins = self._rle_plugins(stream, index, plugins)
        for plugin in plugins:
            try:
                with quiet():
                    array, after = self._decoder.as_array(source, index=0, raw=True, decoding_plugin=plugin, **options)
                return array, str(after["photometric_interpretation"])
            except PARSER_ERRORS as error:
                failures.append(error)
        raise CorruptImageError(
            f"{self.where}: frame {index} ({header.syntax.name}) cannot be decoded; get the file again"
        ) from failures[0]

    def _rle_plugins(self, stream: bytes, index: int, plugins: list[str]) -> list[str]:
        """The decoders this frame may be given to; CorruptImageError for planes that cannot be the picture's."""
        header = self.header
        size, planes = header.rows * header.columns, header.samples * header.allocated // 8
        found = plane_sizes(stream, 2 * size) or []
        if len(found) != planes or min(found) < size or max(found) > 2 * size:
            raise CorruptImageError(
                f"{self.where}: frame {index} ({header.syntax.name}) unpacks to planes of {found[:4]} bytes, "
                f"{planes} of {size} expected; get the file again"
            )
        return plugins if max(found) == size else ["pydicom"]  # which drops what is too much

    # -- both -----------------------------------------------------------------------------------------------
    def frame(self, index: int) -> tuple[np.ndarray, list[str]]:
        """Stored values of a frame, with the steps taken: (H, W), or (H, W, 3) RGB."""
        header, steps = self.header, []
        if self.native:
            values, photometric = self._native(index), header.photometric
            values = self._without_unused_bits(values)
        else:
            values, photometric = self._decoded(index)
            steps.append(f"decode {header.syntax.name}")
        if photometric == "PALETTE COLOR":
            steps.append("palette converted to RGB")
            return self._palette(values), steps
        if header.samples == 3:
            if photometric in ("YBR_FULL", "YBR_FULL_422"):
                values = ybr_to_rgb(values, header.stored_bits)
                steps.append(f"{photometric} converted to RGB")
            elif photometric not in ("RGB", "YBR_RCT", "YBR_ICT"):
                raise header.mismatch("is not a colour space meditok converts", "PhotometricInterpretation")
            elif header.photometric != "RGB":
                steps.append(f"{header.photometric} converted to RGB by the decoder")
        return values, steps

    def _without_unused_bits(self, values: np.ndarray) -> np.ndarray:
        unused = self.header.allocated - self.header.stored_bits
        if unused == 0 or self.header.allocated == 1 or values.dtype.kind == "f":
            return values
        return np.right_shift(np.left_shift(values.astype(values.dtype.newbyteorder("=")), unused), unused)

    def _palette(self, values: np.ndarray) -> np.ndarray:
        from pydicom.pixels.processing import apply_color_lut

        try:
            with quiet():
                colours = np.asarray(apply_color_lut(values, self.header.dataset))
        except PARSER_ERRORS as error:
            raise self.header.mismatch(
                "do not hold a usable palette",
                "RedPaletteColorLookupTableDescriptor",
                "RedPaletteColorLookupTableData",
            ) from error
        # Entries span their whole range (PS3.3 C.7.6.3.1.6); a display shows the high byte of 16 bits.
        return colours if colours.dtype == np.uint8 else (colours >> 8).astype(np.uint8)


def _plugin_rank(name: str) -> int:
    return _PLUGIN_ORDER.index(name) if name in _PLUGIN_ORDER else len(_PLUGIN_ORDER)


def ybr_to_rgb(values: np.ndarray, bits: int) -> np.ndarray:
    """(H, W, 3) full-range YCbCr -> RGB of the same dtype, rounded and clipped (ITU-T T.871)."""
    centred = values.astype(np.float32)
    centred[..., 1:] -= 2.0 ** (bits - 1)
    rgb = centred @ _YBR_TO_RGB.T.astype(np.float32)
    return np.clip(np.rint(rgb), 0, 2**bits - 1).astype(values.dtype.newbyteorder("="))
