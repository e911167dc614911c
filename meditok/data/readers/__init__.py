"""One file a format. `open_blob` looks at the content, never at the name, to choose the reader."""

from __future__ import annotations

from meditok.data.options import ReadOptions
from meditok.data.readers.blob import Blob
from meditok.errors import CorruptImageError, NotAnImageError

IMAGE_SUFFIXES = frozenset(
    (
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".tif",
        ".tiff",
        ".bmp",
        ".dcm",
        ".dicom",
        ".ima",
        ".nii",
        ".nii.gz",
        ".npy",
    )
)


def sniff(blob: Blob) -> str | None:
    """png | jpeg | tiff | bmp | npy | nifti | dicom from the first bytes; None for anything else.

    Raises CorruptImageError for a file whose name promises an image that its bytes do not hold.
    """
    from meditok.data.readers.dicom_walk import looks_like_dicom

    head = blob.read(0, 560)
    kind = _magic(head, blob)
    if kind == "nifti" and head[:2] != b"\x1f\x8b" and blob.name.lower().endswith(".gz"):
        raise CorruptImageError(f"{blob.label}: named .gz but not compressed; rename it to .nii")
    if kind is None and looks_like_dicom(head):
        kind = "dicom"
    if kind is None and blob.suffix in IMAGE_SUFFIXES:
        if blob.suffix in (".dcm", ".dicom", ".ima") and head:
            return "dicom"
        what = "empty" if not head else f"{blob.size} bytes that are no known image"
        raise CorruptImageError(
            f"{blob.label}: {what}, although named {blob.suffix}; 0 rows can be read; get the file again"
        )
    return kind


def _magic(head: bytes, blob: Blob) -> str | None:
    if head[128:132] == b"DICM":
        return "dicom"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if head[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if head[:2] == b"BM" and len(head) >= 26 and blob.suffix in (".bmp", ""):
        return "bmp"
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "nifti"
    if head[:2] == b"\x1f\x8b" and blob.name.lower().endswith(".nii.gz"):
        return "nifti"
    return None


def open_blob(blob: Blob, options: ReadOptions):
    """A reader with frames, height, width, modality, syntax and image(index); errors as the readers raise."""
    kind = sniff(blob)
    if kind == "dicom":
        from meditok.data.readers.dicom import DicomSeries

        return DicomSeries([blob], options)
    if kind == "nifti":
        from meditok.data.readers.nifti import NiftiFile

        return NiftiFile(blob, options)
    if kind == "npy":
        from meditok.data.readers.numpy import ArrayFile

        return ArrayFile(blob, options)
    if kind is not None:
        from meditok.data.readers.pillow import PictureFile

        return PictureFile(blob, options, kind)
    raise NotAnImageError(
        f"{blob.label}: not an image (PNG, JPEG, TIFF, BMP, DICOM, NIfTI and .npy are read); give a picture"
    )
