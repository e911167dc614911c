"""Files that carry a marker wherever a name, a text or a comment can stand, and a search for it in what was written."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin
from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataset import Dataset

from tests.readers import make_dicom as dicom
from tests.readers.bad_pictures import noise, png

MARKER = "ZQXMARKER"
_TEXT = {"AE": 16, "CS": 16, "LO": 64, "LT": 64, "PN": 64, "SH": 16, "ST": 64, "UC": 64, "UT": 64}
# What the reader must understand; a marker here is a failure, which the corpus has.
_NEEDED = {
    "Modality", "PhotometricInterpretation", "ImageType", "PresentationLUTShape", "LossyImageCompression",
    "BurnedInAnnotation", "SpecificCharacterSet", "VOILUTFunction", "PixelPresentation",
}  # fmt: skip


def marked_dicom(path: Path, z: float = 0.0) -> Path:
    """A CT slice with the marker in every text tag of the dictionary below group 7FE0, in private tags, in a nested
    item and, as far as their types let it, in unique identifiers and dates."""
    data = dicom.dataset(noise(32, 32, dtype=np.uint16, top=2000), "CT", **dicom.slice_tags(z, int(z) + 1))
    for keyword in keyword_dict:
        if keyword in _NEEDED or keyword.startswith(("FileSet", "Command", "Group")):
            continue
        tag, vr = keyword_dict[keyword], dictionary_VR(keyword)
        if vr in _TEXT and tag >> 16 >= 8 and tag >> 16 < 0x5000 and tag not in data:
            data.add_new(tag, vr, MARKER[: _TEXT[vr]])
    data.add_new(0x00080023, "DA", MARKER)
    data.add_new(0x00090010, "LO", MARKER)
    data.add_new(0x00091001, "UN", MARKER.encode())
    item = Dataset()
    item.PatientName = MARKER
    data.ReferencedImageSequence = [item]
    data.RescaleType = "HU"
    data.SeriesInstanceUID = "1.2.3." + "".join(str(ord(c)) for c in MARKER)
    return dicom.write(path, data)


def marked_files(folder: Path) -> None:
    """A folder of every kind of file, names included; the last one is broken."""
    folder.mkdir(parents=True)
    name = folder / MARKER
    for z in range(3):
        marked_dicom(folder / f"{MARKER}_ct" / f"{MARKER}{z}.dcm", float(z))
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", MARKER)
    text.add_itxt("Comment", MARKER, zip=True)
    exif = Image.Exif()
    exif[0x010E], exif[0x013B], exif[0x8298] = MARKER, MARKER, MARKER
    picture = Image.fromarray(noise(40, 40, 3))
    picture.save(name.with_suffix(".png"), pnginfo=text, exif=exif)
    picture.save(name.with_suffix(".jpg"), comment=MARKER, exif=exif)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270], tags[305], tags[315], tags[65000] = MARKER, MARKER, MARKER, MARKER
    picture.save(name.with_suffix(".tif"), tiffinfo=tags)
    volume = nib.Nifti1Image(np.random.default_rng(0).integers(0, 900, (32, 33, 3)).astype(np.int16), np.eye(4))
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        volume.header[field] = MARKER
    volume.header.extensions.append(nib.nifti1.Nifti1Extension("comment", MARKER.encode()))
    nib.save(volume, folder / f"{MARKER}.nii.gz")
    (folder / f"{MARKER}.nii.json").write_text(f'{{"PatientName": "{MARKER}"}}')
    np.save(name.with_suffix(".npy"), noise(20, 20))
    (folder / "manifest.csv").write_text(f"path,modality,label,caption\n{MARKER}.png,us,{MARKER},{MARKER}\n")
    (folder / f"{MARKER}_broken.png").write_bytes(name.with_suffix(".png").read_bytes()[:200])


def marked_manifest(folder: Path) -> Path:
    """A CSV list with the marker in its name, in ids and in columns."""
    folder.mkdir(parents=True)
    png(folder / f"{MARKER}.png", noise(20, 20))
    path = folder / f"{MARKER}.csv"
    path.write_text(f"path,id,label,group,{MARKER}\n{MARKER}.png,{MARKER}-1,{MARKER},{MARKER},x\n")
    return path


def holds(data: bytes | str) -> bool:
    data = data if isinstance(data, bytes) else data.encode("utf-8", "replace")
    return MARKER.encode() in data.upper() or "".join(str(ord(c)) for c in MARKER).encode() in data


def everything(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Names and contents of all files under a folder; gzip, zip and Parquet undone."""
    import pyarrow.parquet as pq

    for path in sorted(folder.rglob("*")):
        yield path, str(path.relative_to(folder)).encode()
        if not path.is_file():
            continue
        data = path.read_bytes()
        yield path, data
        if data[:2] == b"\x1f\x8b":
            yield path, gzip.decompress(data)
        elif data[:4] == b"PAR1":
            file = pq.ParquetFile(path)
            yield path, str(file.read().to_pylist()).encode() + str(file.metadata.metadata).encode()
        elif data[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                yield from ((path, archive.read(member)) for member in archive.namelist())
