"""CSV and Parquet manifests, the labels of a folder: rows that name files and say what they are.

A manifest has `path` (or the published `identifier`), and may have id, modality, group, split, caption,
label, ct_bias and intensity ("display ..." for values windowed before, "HU + 1024 ..." for shifted HU).
Paths are relative to the manifest; ".." is refused.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from meditok._lazy import require
from meditok.data.options import ReadOptions, modality_code
from meditok.errors import BadInputError, CorruptImageError, MeditokError, UnsafeFileError

SUFFIXES = (".csv", ".parquet", ".pq")
LABEL_FILE = "manifest.csv"  # gives labels to the files of the folder it lies in
KNOWN_COLUMNS = ("id", "modality", "group", "split", "caption", "label")
_SHOWN = 20
_MAX_TEXT = 2**28  # characters of a whole manifest: a million rows have about a tenth of it


@dataclass
class Entry:
    """One usable row: where the file is, its name in outputs, what is known of it."""

    path: str  # as the manifest writes it, posix
    file: str  # to open
    name: str
    columns: dict = field(default_factory=dict)


def read_manifest(path: str) -> tuple[list[Entry], list[tuple[str, MeditokError]]]:
    """(usable rows, failed rows); the first failure's message lists up to 20 of them."""
    rows = _rows(path)
    folder = os.path.dirname(path)
    entries, bad, seen = [], [], {}
    for number, row in enumerate(rows, start=2):
        try:
            entry = _entry(row, folder)
        except MeditokError as error:
            bad.append((number, error))
            continue
        if entry.name in seen:
            bad.append((number, BadInputError(f"the same name as row {seen[entry.name]}; give different ids")))
            continue
        seen[entry.name] = number
        entries.append(entry)
    failed = []
    if bad:
        shown = "; ".join(f"row {number}: {error}" for number, error in bad[:_SHOWN])
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        for index, (number, error) in enumerate(bad):
            detail = f"{len(bad)} bad rows: {shown}{more}" if index == 0 else f"row {number}: {error}"
            failed.append((f"{path} row {number}", type(error)(f"{path}: {detail}")))
    return entries, failed


def label_columns(folder: str) -> dict[str, dict]:
    """Columns of a folder's manifest.csv by relative posix path; empty without one."""
    path = os.path.join(folder, LABEL_FILE)
    if not os.path.isfile(path):
        return {}
    labels = {}
    for row in _rows(path):
        key = row.get("path") or row.get("identifier")
        if key:
            labels[PurePosixPath(str(key).replace("\\", "/")).as_posix()] = _columns(row)
    return labels


def _rows(path: str) -> list[dict]:
    try:
        if path.lower().endswith(".csv"):
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = _within_limits(path, csv.DictReader(file))
        else:
            rows = _within_limits(path, _parquet_rows(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        kind = "UTF-8 CSV" if path.lower().endswith(".csv") else "Parquet"
        raise CorruptImageError(f"{path}: the manifest cannot be read as {kind}; save it again") from error
    if rows and not {"path", "identifier"} & set(rows[0]):
        there = ", ".join(repr(str(name)) for name in list(rows[0])[:_SHOWN])
        raise BadInputError(f"{path}: the manifest has no column path or identifier, but {there}; name one so")
    return rows


def _within_limits(path: str, rows: Iterable[dict]) -> list[dict]:
    """All rows, as long as their text stays within _MAX_TEXT characters: Parquet repeats a value at no cost."""
    kept, text = [], 0
    for row in rows:
        text += sum(len(value) for value in row.values() if isinstance(value, (str, bytes, list))) + len(row)
        if text > _MAX_TEXT:
            raise UnsafeFileError(
                f"{path}: a manifest of more than {_MAX_TEXT} characters, in row {len(kept) + 2}; it was not read; "
                "divide it"
            )
        kept.append(row)
    return kept


def _parquet_rows(path: str) -> Iterator[dict]:
    parquet = require("pyarrow.parquet", "reading Parquet manifests")
    arrow = require("pyarrow", "reading Parquet manifests")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except arrow.ArrowException as error:
        raise CorruptImageError(f"{path}: the manifest cannot be read as Parquet; save it again") from error


def _entry(row: dict, folder: str) -> Entry:
    written = row.get("path") or row.get("identifier")
    if not isinstance(written, str) or not written.strip():
        raise BadInputError("no path; fill it in or remove the row")
    posix = PurePosixPath(written.strip().replace("\\", "/"))
    if ".." in posix.parts:
        raise UnsafeFileError("path climbs out of the manifest's folder with ..; write it relative to the manifest")
    file = str(posix) if posix.is_absolute() else os.path.join(folder, *posix.parts)
    if not os.path.isfile(file):
        raise BadInputError("file is missing; correct the path")
    columns = _columns(row)
    modality = columns.get("modality")
    if modality is not None and modality_code(modality) is None:
        raise BadInputError("modality is not known; use a code such as ct, mr, us, xr or leave it empty")
    name = str(columns["id"]) if columns.get("id") is not None else str(posix).lstrip("/")
    return Entry(str(posix), file, name, columns)


def _columns(row: dict) -> dict:
    """The columns with a value; empty strings and missing ones are left out."""
    columns = {}
    for key, value in row.items():
        if key is None or value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            continue
        columns[key] = value
    return columns


def options_for(options: ReadOptions, columns: dict, where: str) -> ReadOptions:
    """Reading options with what a manifest row or sidecar states: modality, intensity, ct_bias."""
    modality = modality_code(columns["modality"]) if columns.get("modality") is not None else None
    if modality is not None:
        options = replace(options, modality=modality)
    intensity = columns.get("intensity")
    if isinstance(intensity, str):
        shifted = re.match(r"\s*HU\s*\+\s*(\d+(?:\.\d+)?)", intensity)
        if shifted and options.ct_bias is None:
            options = replace(options, ct_bias=float(shifted.group(1)))
        elif intensity.lower().startswith("display"):
            options = replace(options, display=True)
    if columns.get("ct_bias") is not None and options.ct_bias is None:
        try:
            options = replace(options, ct_bias=float(columns["ct_bias"]))
        except (TypeError, ValueError) as error:
            raise BadInputError(f"{where}: its ct_bias is not a number; correct the manifest or sidecar") from error
    return options


def relative_name(path: str | os.PathLike, root: str | os.PathLike) -> str:
    """Posix path of a file relative to the folder an input named."""
    return Path(os.path.relpath(path, root)).as_posix()
