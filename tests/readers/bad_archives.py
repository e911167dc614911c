"""Tars and manifests that try to trick their reader; see bad_inputs.py."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

from tests.readers.bad_pictures import noise, png
from tests.readers.bad_volumes import _png_bytes, tar


def _member(folder: Path, name: str, **fields) -> Path:
    """A tar of one member without content whose header has these fields."""
    path = folder / f"{name}.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("x.png")
        for key, value in fields.items():
            setattr(info, key, value)
        archive.addfile(info)
    return path


def b30_hard_link(folder: Path) -> Path:
    return _member(folder, "hard", type=tarfile.LNKTYPE, linkname="/etc/passwd")


def b30_device(folder: Path) -> Path:
    return _member(folder, "device", type=tarfile.CHRTYPE, devmajor=1, devminor=5)


def b30_backslash(folder: Path) -> Path:
    return tar(folder / "backslash.tar", ("a\\..\\..\\x.png", _png_bytes()))


def b30_drive(folder: Path) -> Path:
    return tar(folder / "drive.tar", ("C:\\x.png", _png_bytes()))


def b30_pax_name(folder: Path) -> Path:
    """A harmless name in the header, another in the extended header before it."""
    path = folder / "pax.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("x.png")
        info.pax_headers = {"path": "../x.png"}
        info.size = len(_png_bytes())
        archive.addfile(info, io.BytesIO(_png_bytes()))
    return path


def b30_same_name(folder: Path) -> Path:
    return tar(folder / "dots.tar", ("a.png", _png_bytes()), ("./a.png", _png_bytes()))


def b30_gzip(folder: Path) -> Path:
    tar(folder / "x.tar", ("a.png", _png_bytes()))
    (folder / "x.tar").write_bytes(gzip.compress((folder / "x.tar").read_bytes()))
    return folder / "x.tar"


def b30_claimed_size(folder: Path) -> Path:
    """A member whose header claims a terabyte."""
    return _member(folder, "claim", size=2**40)


def b30_endless_size(folder: Path) -> Path:
    """A member whose header claims more bytes than a file offset can count."""
    return _member(folder, "endless", size=2**70)


def b30_sidecar_deep(folder: Path) -> Path:
    return tar(folder / "deep.tar", ("a.png", _png_bytes()), ("a.json", b"[" * 100000))


def b30_sidecar_large(folder: Path) -> Path:
    text = json.dumps({"caption": "x" * 2**20}).encode()
    return tar(folder / "large.tar", ("a.png", _png_bytes()), ("a.json", text))


def _csv(folder: Path, name: str, text: str | bytes) -> Path:
    png(folder / "a.png", noise(16, 16))
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name


def b30_csv_field(folder: Path) -> Path:
    return _csv(folder, "field.csv", "path,caption\na.png," + "x" * 200000 + "\n")


def b30_csv_latin(folder: Path) -> Path:
    return _csv(folder, "latin.csv", "path,caption\na.png,M\xfcller\n".encode("latin-1"))


def b30_csv_columns(folder: Path) -> Path:
    return _csv(folder, "columns.csv", "file,label\na.png,1\n")


def b30_csv_bias(folder: Path) -> Path:
    return _csv(folder, "bias.csv", "path,modality,ct_bias\na.png,ct,much\n")


def b30_csv_twice(folder: Path) -> Path:
    return _csv(folder, "twice.csv", "path,id\na.png,one\na.png,one\n")


def b30_csv_no_path(folder: Path) -> Path:
    return _csv(folder, "nopath.csv", "path,label\n,1\n")


def b30_csv_null(folder: Path) -> Path:
    return _csv(folder, "null.csv", b"path,label\na.png\0,1\n")


def b30_csv_folder(folder: Path) -> Path:
    (folder / "sub.png").mkdir()
    return _csv(folder, "folder.csv", "path\nsub.png\n")
