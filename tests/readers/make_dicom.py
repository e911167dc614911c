"""Small DICOM files written by script from arrays; no patient data anywhere."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID

IMPLICIT, EXPLICIT, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
BIG = "1.2.840.10008.1.2.2"
SOP = {
    "CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "US": "1.2.840.10008.5.1.4.1.1.6.1",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "PT": "1.2.840.10008.5.1.4.1.1.128", "NM": "1.2.840.10008.5.1.4.1.1.20",
    "SC": "1.2.840.10008.5.1.4.1.1.7",
    "ECT": "1.2.840.10008.5.1.4.1.1.2.1", "USMF": "1.2.840.10008.5.1.4.1.1.3.1",
}  # fmt: skip
SERIES = "1.2.826.0.1.3680043.8.498.1"


def dataset(pixels: np.ndarray | None, modality: str = "MR", sop: str | None = None, **tags) -> Dataset:
    """A data set for (H, W), (F, H, W) or (H, W, 3) pixels; `tags` override, None removes."""
    data = Dataset()
    data.SOPClassUID = UID(SOP.get(sop or modality, sop or modality))
    data.SOPInstanceUID = UID("1.2.826.0.1.3680043.8.498.2." + str(tags.pop("instance", 1)))
    data.Modality, data.SeriesInstanceUID, data.SeriesNumber = modality, UID(SERIES), 1
    if pixels is not None:
        colour = pixels.ndim == 3 and pixels.shape[-1] == 3
        if pixels.ndim == 3 and not colour:
            data.NumberOfFrames = pixels.shape[0]
        shape = pixels.shape[:2] if colour else pixels.shape[-2:]
        data.Rows, data.Columns = shape
        data.SamplesPerPixel = 3 if colour else 1
        data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        if colour:
            data.PlanarConfiguration = 0
        data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
        data.HighBit = data.BitsStored - 1
        data.PixelRepresentation = int(pixels.dtype.kind == "i")
        raw = pixels.tobytes()
        data.add_new(0x7FE00010, "OB" if pixels.dtype.itemsize == 1 else "OW", raw + b"\0" * (len(raw) % 2))
    if modality == "CT" and "RescaleSlope" not in tags:
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
    for keyword, value in tags.items():
        if value is None:
            if keyword in data:
                delattr(data, keyword)
        else:
            setattr(data, keyword, value)
    if "BitsStored" in tags and "HighBit" not in tags:
        data.HighBit = tags["BitsStored"] - 1
    return data


def write(path: Path, data: Dataset, syntax: str = EXPLICIT, frames: list[bytes] | None = None) -> Path:
    """Write a Part 10 file; `frames` encapsulates already compressed frames."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = data.SOPClassUID, data.SOPInstanceUID
    meta.TransferSyntaxUID, meta.ImplementationClassUID = UID(syntax), UID("1.2.826.0.1.3680043.8.498.9")
    if frames is not None:
        data.PixelData = encapsulate(frames)
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    data.file_meta = meta
    path.parent.mkdir(parents=True, exist_ok=True)
    private = {} if UID(syntax).is_transfer_syntax else {"implicit_vr": False, "little_endian": True}
    pydicom.dcmwrite(path, data, enforce_file_format=True, **private)
    return path


def slice_tags(z: float, instance: int, spacing: float = 1.0, **tags) -> dict:
    """Tags that place an axial slice at height z."""
    return {
        "ImagePositionPatient": [-10.0, -20.0, z], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [spacing, spacing], "SliceThickness": 2.0, "InstanceNumber": instance,
        "instance": instance,
    } | tags  # fmt: skip


def patch_length(path: Path, tag: bytes, length: int) -> Path:
    """Overwrite the 32-bit length of an explicit VR element with a long length field."""
    raw = bytearray(path.read_bytes())
    at = raw.rindex(tag)
    raw[at + 8 : at + 12] = struct.pack("<I", length)
    path.write_bytes(raw)
    return path


def deflated_zeros(head: bytes, megabytes: int, wbits: int) -> bytes:
    """A deflate stream of `head` and then zeros: one flushed block of a mebibyte, repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * megabytes + packer.flush()


def deflated_bomb(path: Path, megabytes: int = 1024) -> Path:
    """A deflated DICOM whose data set inflates to `megabytes` of zeros from about a thousandth of that."""
    head = b"\x09\x00\x10\x10OB\0\0" + struct.pack("<I", megabytes << 20)
    body = deflated_zeros(head, megabytes, -15)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(SOP["MR"]), UID("1.2.3")
    meta.TransferSyntaxUID, meta.ImplementationClassUID = UID(DEFLATED), UID("1.2.3.4")
    meta.FileMetaInformationVersion = b"\0\1"
    buffer = io.BytesIO()
    write_file_meta_info(buffer, meta)
    path.write_bytes(bytes(128) + b"DICM" + buffer.getvalue() + body)
    return path
