"""Token stores in formats of others: npz, safetensors, WebDataset tars, Hugging Face datasets. Nothing is pickled.

Every format holds the ids in the smallest unsigned type that fits K, and of each row the description that the token
file has, as JSON. Rows pass through in batches, so that a store may be larger than memory. docs/formats.md has the
schema of each and how to read it without meditok.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ..atomic import atomic_folder, atomic_path
from ..errors import UsageError
from .format import TokenReader
from .schema import PRIVACY, Description
from .store import SHARD_SIZE, open_tokens

_BATCH = 512  # rows in memory
_ROWS = "rows"


def smallest_dtype(codebook_size: int) -> np.dtype:
    """The smallest unsigned little endian type that holds ids below `codebook_size`."""
    return np.dtype("u1" if codebook_size <= 2**8 else "<u2" if codebook_size <= 2**16 else "<u4")


def export(
    tokens: str | os.PathLike,
    out: str | os.PathLike,
    to: str | None = None,
    *,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write a token file or finished store as `to`: npz, safetensors, webdataset or hf. -> {"rows", "files", "bytes"}.

    npz and safetensors are one file; webdataset one file if `out` ends in .tar, else a folder of tars of `shard_size`
    rows; hf a folder of Parquet parts with a card. None: as `out` ends. It appears under its name when it is whole.
    UsageError: an unknown format, something in the way (a file may be replaced with `overwrite`, a folder must be new
    or empty), `out` is the input; errors of `Tokens.load` as rows are read.
    """
    out, source = Path(out), Path(tokens)
    by_suffix = {".npz": "npz", ".safetensors": "safetensors", ".tar": "webdataset"}
    to = to or by_suffix.get(out.suffix.lower())
    if to not in FORMATS:
        raise UsageError(f"{out}: in which format? choose one of {', '.join(FORMATS)} with --to")
    if shard_size < 1:
        raise UsageError(f"shard size {shard_size}: give at least 1 row a part")
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{out}: is the input, or in it; choose another output")
    folder = to == "hf" or (to == "webdataset" and out.suffix.lower() != ".tar")
    if (out.is_file() and (folder or not overwrite)) or (out.is_dir() and (not folder or any(out.iterdir()))):
        advice = "pass --overwrite to replace it, or " if out.is_file() and not folder else ""
        raise UsageError(f"{out}: something is there already; {advice}choose another output")
    with open_tokens(source) as reader:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(out) if folder else atomic_path(out) as draft:
            FORMATS[to](reader, draft, shard_size if folder else None)
    return _written(out, reader)


def _written(out: Path, reader: TokenReader) -> dict[str, int]:
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return {"rows": len(reader), "files": len(files), "bytes": sum(path.stat().st_size for path in files)}


# -- rows and ids as bytes ----------------------------------------------------------------------------------
def describe(row: Description) -> dict:
    """A row's description as plain values; what it does not say is left out."""
    record = {name: value for name, value in vars(row).items() if name != "extra" and value not in (None, "", ())}
    if row.geometry is not None:
        record["geometry"] = {k: v for k, v in row.geometry.to_dict().items() if v is not None}
    if row.tile is not None:
        record["tile"] = dict(zip("yxhw", row.tile, strict=True))
    return record | {name: value for name, value in row.extra.items() if value is not None}


def _spool(reader: TokenReader, file: IO[bytes]) -> int:
    """Write every row's description as a line of JSON; returns the bytes written."""
    for row in reader.descriptions():
        file.write(json.dumps(describe(row)).encode() + b"\n")
    return file.tell()


def _ids(reader: TokenReader) -> Iterator[bytes]:
    dtype = smallest_dtype(reader.info.codebook_size)
    for codes in reader.codes(_BATCH):
        yield codes.astype(dtype).tobytes()


def _shape(reader: TokenReader) -> tuple[int, int, int]:
    return len(reader), reader.info.num_codebooks, reader.info.positions


# -- one function a format ----------------------------------------------------------------------------------
def _npz(reader: TokenReader, path: Path, _) -> None:
    header = np.frombuffer(json.dumps(reader.info.to_metadata()).encode(), np.uint8)
    # bzip2 and not deflate: it finds the bits that 16-bit ids leave unused, deflate keeps a seventh more
    with tempfile.TemporaryFile(dir=path.parent) as rows, zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        size = _spool(reader, rows)
        rows.seek(0)
        _add_npy(archive, "tokens", smallest_dtype(reader.info.codebook_size), _shape(reader), _ids(reader))
        _add_npy(archive, _ROWS, np.dtype("u1"), (size,), iter(lambda: rows.read(2**20), b""))
        _add_npy(archive, "header", header.dtype, header.shape, [header.tobytes()])


def _add_npy(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple, pieces) -> None:
    info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that equal tokens give equal files
    info.compress_type = archive.compression
    with archive.open(info, "w", force_zip64=True) as file:
        fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, fields)
        for piece in pieces:
            file.write(piece)


def _safetensors(reader: TokenReader, path: Path, _) -> None:
    # Layout: 8 bytes of header length, a JSON header padded with spaces to a multiple of 8, the tensors.
    dtype, shape = smallest_dtype(reader.info.codebook_size), _shape(reader)
    with tempfile.TemporaryFile(dir=path.parent) as rows, open(path, "wb") as file:
        size, end = _spool(reader, rows), int(np.prod(shape)) * dtype.itemsize
        header = {
            "__metadata__": reader.info.to_metadata(),
            "tokens": {"dtype": f"U{8 * dtype.itemsize}", "shape": shape, "data_offsets": [0, end]},
            _ROWS: {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in _ids(reader):
            file.write(piece)
        rows.seek(0)
        shutil.copyfileobj(rows, file)


def _webdataset(reader: TokenReader, out: Path, shard_size: int | None) -> None:
    """`out` is a tar, or with a shard size a folder of them. Keys are row numbers: ids may hold dots and slashes."""
    dtype, header = smallest_dtype(reader.info.codebook_size), reader.info.to_metadata()
    header = {name: header[name] for name in ("model", "codebook_hash", "G", "K", "grid")}  # what decoding needs
    archive, number = None, 0
    try:
        for codes, rows in reader.batches(_BATCH):
            for ids, row in zip(codes, rows, strict=True):
                if archive is None or (shard_size and number % shard_size == 0):
                    if archive is not None:
                        archive.close()
                    path = out / f"tokens-{number // shard_size:06d}.tar" if shard_size else out
                    archive = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)
                buffer = io.BytesIO()
                np.save(buffer, ids.astype(dtype), allow_pickle=False)
                _add_member(archive, f"{number:09d}.npy", buffer.getvalue())
                _add_member(archive, f"{number:09d}.json", json.dumps(describe(row) | {"header": header}).encode())
                number += 1
        if archive is None and not shard_size:
            archive = tarfile.open(out, "w")
    finally:
        if archive is not None:
            archive.close()


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # without date and owner
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _hugging_face(reader: TokenReader, out: Path, _) -> None:
    """The parts as they are, named and described as `datasets.load_dataset(FOLDER)` and the hub expect them."""
    reader.check()
    data = out / "data"
    data.mkdir()
    for index, part in enumerate(reader.paths):
        shutil.copyfile(part, data / f"train-{index:05d}-of-{len(reader.paths):05d}.parquet")
    info = reader.info
    (out / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
        f"# Tokens of medical images\n\n{len(reader)} rows of {info.num_codebooks} x {info.grid[0]} x {info.grid[1]} "
        f"ids below {info.codebook_size}, made by meditok with the model {info.model} (hash {info.model_hash}, "
        f"codebook {info.codebook_hash}). Licence of the model: {info.licence}. For {info.intended_use}. Note: "
        f"{PRIVACY}.\n",
        encoding="utf-8",
    )


FORMATS = {"npz": _npz, "safetensors": _safetensors, "webdataset": _webdataset, "hf": _hugging_face}
