"""Bad volumes, arrays, tars and manifests B21 to B30 of the requirements; see bad_inputs.py."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from tests.readers import make_dicom as dicom
from tests.readers.bad_pictures import noise, png


def nifti(path: Path, data: np.ndarray, affine=None, sform: int = 1, qform: int = 0, edit=None) -> Path:
    """Write a NIfTI-1 file; `edit(header)` changes the header after nibabel filled it."""
    image = nib.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine)
    image.set_sform(image.affine, sform)
    image.set_qform(image.affine if affine is None else None, qform)
    nib.save(image, path)
    if edit is not None:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        header = nib.Nifti1Header.from_fileobj(io.BytesIO(raw), check=False)
        edit(header)
        raw = header.binaryblock + raw[348:]
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def _volume(dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 1000, (8, 9, 10)).astype(dtype)


def b21_cut(folder: Path) -> Path:
    path = nifti(folder / "cut.nii.gz", _volume())
    path.write_bytes(path.read_bytes()[:-200])
    return path


def b21_crc(folder: Path) -> Path:
    path = nifti(folder / "crc.nii.gz", _volume())
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 0xFF
    path.write_bytes(raw)
    return path


def b21_not_gzip(folder: Path) -> Path:
    nifti(folder / "plain.nii", _volume()).rename(folder / "plain.nii.gz")
    return folder / "plain.nii.gz"


def b21_gzip_bomb(folder: Path) -> Path:
    """A small header followed by 1 GiB of zeros."""
    head = nifti(folder / "seed.nii", _volume()).read_bytes()
    (folder / "seed.nii").unlink()
    (folder / "bomb.nii.gz").write_bytes(dicom.deflated_zeros(head, 1024, 31))
    return folder / "bomb.nii.gz"


def b21_huge_header(folder: Path) -> Path:
    def claim(header):
        header["dim"][1:4] = 30000

    return nifti(folder / "huge.nii.gz", _volume(), edit=claim)


def b22_nan(folder: Path) -> Path:
    data = _volume(np.float32)
    data[1, 2, 3] = np.nan
    return nifti(folder / "nan.nii.gz", data)


def b22_infinite(folder: Path) -> Path:
    data = _volume(np.float32)
    data[1, 2, 3:5] = np.inf
    return nifti(folder / "inf.nii.gz", data)


def b23_no_codes(folder: Path) -> Path:
    return nifti(folder / "codes.nii.gz", _volume(), sform=0, qform=0)


def b23_singular(folder: Path) -> Path:
    def flatten(header):
        header["srow_z"][:] = 0

    return nifti(folder / "singular.nii.gz", _volume(), edit=flatten)


def b23_four_d(folder: Path) -> Path:
    return nifti(folder / "time.nii.gz", np.zeros((4, 4, 4, 3), np.int16))


def b23_unstated_hu(folder: Path) -> Path:
    return nifti(folder / "hu.nii.gz", _volume() - 1024)


# -- arrays, tars, manifests ----------------------------------------------------------------------
def b25_range(folder: Path) -> Path:
    np.save(folder / "range.npy", np.linspace(0, 255, 256).reshape(16, 16))
    return folder / "range.npy"


def b25_channels(folder: Path) -> Path:
    np.save(folder / "channels.npy", np.zeros((16, 16, 2), np.uint8))
    return folder / "channels.npy"


def b25_pickled(folder: Path) -> Path:
    np.save(folder / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return folder / "pickled.npy"


def tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """A tar of (name, bytes) or (name, "-> target") for a link."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content.removeprefix("-> ")
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def _png_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(buffer, "PNG")
    return buffer.getvalue()


def b30_climbing(folder: Path) -> Path:
    return tar(folder / "climb.tar", ("../x.png", _png_bytes()))


def b30_absolute(folder: Path) -> Path:
    return tar(folder / "absolute.tar", ("/tmp/x.png", _png_bytes()))


def b30_link(folder: Path) -> Path:
    return tar(folder / "link.tar", ("x.png", "-> /etc/passwd"))


def b30_code(folder: Path) -> Path:
    return tar(folder / "code.tar", ("x.pyd", b"MZ"))


def b30_cut(folder: Path) -> Path:
    path = tar(folder / "cut.tar", ("a.png", _png_bytes()), ("b.png", _png_bytes()))
    path.write_bytes(path.read_bytes()[:1600])
    return path


def b30_duplicate(folder: Path) -> Path:
    return tar(folder / "twice.tar", ("a.png", _png_bytes()), ("a.png", _png_bytes()))


def b30_manifest(folder: Path) -> Path:
    png(folder / "a.png", noise(16, 16))
    (folder / "list.csv").write_text("path,modality\na.png,us\nmissing.png,us\n")
    return folder / "list.csv"


def b30_manifest_climbs(folder: Path) -> Path:
    (folder / "climb.csv").write_text("path,modality\n../a.png,us\n")
    return folder / "climb.csv"


def b30_manifest_modality(folder: Path) -> Path:
    png(folder / "a.png", noise(16, 16))
    (folder / "nan.csv").write_text("path,modality\na.png,nan\n")
    return folder / "nan.csv"


# -- more volumes and arrays ------------------------------------------------------------------------
def b22_all_nan(folder: Path) -> Path:
    return nifti(folder / "allnan.nii.gz", np.full((4, 4, 4), np.nan, np.float32))


def b23_pair(folder: Path) -> Path:
    def claim(header):
        header["magic"] = b"ni1\0"

    return nifti(folder / "pair.nii", _volume(), edit=claim)


def b23_complex(folder: Path) -> Path:
    return nifti(folder / "complex.nii.gz", np.zeros((4, 4, 4), np.complex64))


def b23_rgba(folder: Path) -> Path:
    return nifti(folder / "rgba.nii.gz", np.zeros((4, 4, 4), [(name, "u1") for name in "RGBA"]))


def b23_intercept(folder: Path) -> Path:
    def spoil(header):
        header["scl_slope"], header["scl_inter"] = 2.0, np.inf

    return nifti(folder / "inter.nii.gz", _volume(), edit=spoil)


def b23_offset(folder: Path) -> Path:
    def spoil(header):
        header["vox_offset"] = 100

    return nifti(folder / "offset.nii", _volume(), edit=spoil)


def b21_short(folder: Path) -> Path:
    path = nifti(folder / "short.nii", _volume())
    path.write_bytes(path.read_bytes()[:-100])
    return path


def _array(folder: Path, name: str, array: np.ndarray) -> Path:
    np.save(folder / name, array)
    return folder / name


def b25_integers(folder: Path) -> Path:
    return _array(folder, "int.npy", np.zeros((16, 16), np.int64))


def b25_complex(folder: Path) -> Path:
    return _array(folder, "complex.npy", np.zeros((16, 16), np.complex64))


def b25_truth(folder: Path) -> Path:
    return _array(folder, "bool.npy", np.zeros((16, 16), bool))


def b25_vector(folder: Path) -> Path:
    return _array(folder, "vector.npy", np.zeros(16, np.uint8))


def b25_empty(folder: Path) -> Path:
    return _array(folder, "empty.npy", np.zeros((0, 16), np.uint8))


def b25_nan(folder: Path) -> Path:
    return _array(folder, "nan.npy", np.full((16, 16), np.nan, np.float32))


def b25_header(folder: Path) -> Path:
    """A header that is no dictionary: unbalanced brackets, which Python's tokenizer trips over."""
    path = _array(folder, "header.npy", np.zeros((16, 16), np.uint8))
    path.write_bytes(path.read_bytes().replace(b"'shape': (16, 16)", b"'shape': ((((((((("))
    return path


def b25_negative(folder: Path) -> Path:
    path = _array(folder, "negative.npy", np.zeros((16, 16), np.uint8))
    path.write_bytes(path.read_bytes().replace(b"(16, 16), }  ", b"(-16, -16), }"))
    return path
