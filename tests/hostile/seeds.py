"""Valid files of every kind meditok reads, made by script: what the fuzzer mutates."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset

from tests.readers import make_dicom as dicom
from tests.readers.bad_pictures import noise

SIDE = 16


def seeds(kind: str, folder: Path) -> list[bytes]:
    """Valid files of one kind as bytes; `folder` is scratch space."""
    return _MAKERS[kind](folder)


def _saved(image: Image.Image, fmt: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def _pictures() -> dict[str, Image.Image]:
    grey = Image.fromarray(noise(SIDE, SIDE))
    return {
        "L": grey,
        "1": grey.convert("1"),
        "I;16": Image.fromarray(noise(SIDE, SIDE, dtype=np.uint16, top=65535)),
        "RGB": Image.fromarray(noise(SIDE, SIDE, 3)),
        "RGBA": Image.fromarray(noise(SIDE, SIDE, 4)),
        "P": Image.fromarray(noise(SIDE, SIDE, 3)).quantize(16),
        "LA": grey.convert("LA"),
        "CMYK": Image.fromarray(noise(SIDE, SIDE, 3)).convert("CMYK"),
    }


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


def _png(_: Path) -> list[bytes]:
    pictures = _pictures()
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "words", zip=True)
    made = [_saved(pictures[mode], "PNG", pnginfo=text) for mode in ("L", "1", "I;16", "RGB", "RGBA", "P", "LA")]
    return [*made, _saved(pictures["RGB"], "PNG", exif=_exif())]


def _jpeg(_: Path) -> list[bytes]:
    pictures = _pictures()
    return [
        _saved(pictures["L"], "JPEG"),
        _saved(pictures["RGB"], "JPEG", exif=_exif()),
        _saved(pictures["RGB"], "JPEG", progressive=True),
        _saved(pictures["CMYK"], "JPEG"),
    ]


def _tiff(_: Path) -> list[bytes]:
    pictures = _pictures()
    made = [_saved(pictures[mode], "TIFF") for mode in ("L", "1", "I;16", "RGB", "RGBA", "P", "CMYK")]
    made += [_saved(pictures["RGB"], "TIFF", compression=way) for way in ("tiff_lzw", "tiff_deflate", "packbits")]
    made.append(_saved(pictures["1"], "TIFF", compression="group4"))
    made.append(_saved(pictures["L"], "TIFF", save_all=True, append_images=[pictures["L"], pictures["L"]]))
    return made


def _bmp(_: Path) -> list[bytes]:
    return [_saved(_pictures()[mode], "BMP") for mode in ("L", "1", "RGB", "P", "RGBA")]


def _npy(_: Path) -> list[bytes]:
    made = []
    for array in (
        noise(SIDE, SIDE),
        noise(SIDE, SIDE, 3, dtype=np.uint16, top=65535),
        np.linspace(-1, 1, 3 * SIDE * SIDE, dtype=np.float32).reshape(3, SIDE, SIDE),
        np.asfortranarray(noise(2, SIDE, SIDE, 3)),
    ):
        buffer = io.BytesIO()
        np.save(buffer, array)
        made.append(buffer.getvalue())
    return made


def _dicom(folder: Path) -> list[bytes]:
    deep = noise(SIDE, SIDE, dtype=np.uint16, top=4000)
    window = {"WindowCenter": [40, 50], "WindowWidth": [400, 300]}
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTData = [4096, 0, 16], np.arange(0, 65536, 16, dtype="<u2").tobytes()
    group = Dataset()
    value = Dataset()
    value.RescaleSlope, value.RescaleIntercept, value.RescaleType = 3, -1000, "HU"
    group.PixelValueTransformationSequence = [value]
    palette = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = np.arange(256, dtype="<u2").tobytes()
    sets = [
        (dicom.dataset(deep, "CT", **dicom.slice_tags(3.0, 1), **window), dicom.EXPLICIT),
        (dicom.dataset(deep, "MR", PixelPaddingValue=0), dicom.IMPLICIT),
        (dicom.dataset(deep, "CR", VOILUTSequence=[lut], PhotometricInterpretation="MONOCHROME1"), dicom.EXPLICIT),
        (dicom.dataset(noise(SIDE, SIDE, 3), "US"), dicom.DEFLATED),
        (dicom.dataset(noise(SIDE, SIDE), "US", **palette), dicom.EXPLICIT),
        (
            dicom.dataset(
                noise(2, SIDE, SIDE, dtype=np.uint16, top=4000),
                "CT",
                sop="ECT",
                RescaleSlope=None,
                PerFrameFunctionalGroupsSequence=[group, group],
            ),
            dicom.EXPLICIT,
        ),
    ]
    files = [dicom.write(folder / f"seed{i}.dcm", data, syntax) for i, (data, syntax) in enumerate(sets)]
    jpeg = _saved(_pictures()["L"], "JPEG")
    files.append(dicom.write(folder / "jpeg.dcm", dicom.dataset(noise(SIDE, SIDE), "US"), _JPEG, [jpeg]))
    j2k = _saved(_pictures()["L"], "JPEG2000")
    files.append(dicom.write(folder / "j2k.dcm", dicom.dataset(noise(SIDE, SIDE), "US"), _J2K, [j2k]))
    rle = pydicom.dcmread(files[0])
    rle.compress(_RLE)
    rle.save_as(folder / "rle.dcm")
    return [path.read_bytes() for path in [*files, folder / "rle.dcm"]]


_JPEG, _J2K, _RLE = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"


def _nifti(_: Path) -> list[bytes]:
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    volume = np.random.default_rng(0).integers(0, 900, (6, 7, 8)).astype(np.int16)
    images = [
        nib.Nifti1Image(volume, affine),
        nib.Nifti2Image(volume.astype(np.float32), affine),
        nib.Nifti1Image(volume[..., None].repeat(2, -1), affine),
        nib.Nifti1Image(np.zeros((5, 5, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")]), affine),
    ]
    return [image.to_bytes() for image in images]


def _nifti_gzip(folder: Path) -> list[bytes]:
    return [gzip.compress(data, mtime=0) for data in _nifti(folder)]


def _tar(_: Path) -> list[bytes]:
    buffer = io.BytesIO()
    members = {
        "a/k1.png": _png(_)[0],
        "a/k1.json": json.dumps({"modality": "us", "label": "x"}).encode(),
        "k2.npy": _npy(_)[0],
        "notes.txt": b"words",
    }
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return [buffer.getvalue()]


def _csv(_: Path) -> list[bytes]:
    return [
        b"path,modality,label,ct_bias\npicture.png,us,benign,\n",
        b'identifier,id,intensity\n"picture.png",one,"display 8-bit"\n',
        "\ufeffpath;modality\npicture.png;us\n".encode(),
    ]


def _parquet(_: Path) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({"path": ["picture.png"], "modality": ["us"], "ct_bias": [1024.0]}), sink)
    return [sink.getvalue()]


def _tokens(folder: Path) -> list[bytes]:
    tokens_of(3).save(folder / "seed.parquet")
    return [(folder / "seed.parquet").read_bytes()]


def tokens_of(rows: int):
    """Tokens of pictures that lie in a volume, with random ids."""
    from meditok.data import Geometry
    from meditok.tokens import Description, TokenInfo, Tokens

    info = TokenInfo("tiny", "a" * 64, "b" * 64, 2, 64, (2, 2))
    affine = tuple(np.diag([-1.0, -1.0, 2.5, 1.0]).ravel())
    place = Geometry((30, 20, 9), 2, "axial", spacing=(1.0, 1.0, 2.5), affine=affine)
    descriptions = [
        Description(f"{i:032x}", 32, 32, "ct", geometry=place, slice=i, position=2.5 * i, volume="v", steps=("a",))
        for i in range(rows)
    ]
    return Tokens(np.random.default_rng(0).integers(0, 64, (rows, 2, 4)), descriptions, info)


def _store_index(folder: Path) -> list[bytes]:
    from meditok.tokens.store import StoreWriter

    tokens = tokens_of(3)
    with StoreWriter(folder / "seed-store", tokens.info, shard_size=2) as writer:
        writer.write(tokens.codes, tokens.rows)
        writer.close("s")
    return [(folder / "seed-store" / "store.json").read_bytes()]


_MAKERS = {
    "png": _png,
    "jpeg": _jpeg,
    "tiff": _tiff,
    "bmp": _bmp,
    "npy": _npy,
    "dicom": _dicom,
    "nifti": _nifti,
    "nifti-gzip": _nifti_gzip,
    "tar": _tar,
    "csv": _csv,
    "parquet": _parquet,
    "tokens": _tokens,
    "store": _store_index,
}
KINDS = tuple(_MAKERS)
SUFFIX = {
    "png": ".png", "jpeg": ".jpg", "tiff": ".tif", "bmp": ".bmp", "npy": ".npy", "dicom": ".dcm", "nifti": ".nii",
    "nifti-gzip": ".nii.gz", "tar": ".tar", "csv": ".csv", "parquet": ".parquet", "tokens": ".parquet",
    "store": ".json",
}  # fmt: skip
