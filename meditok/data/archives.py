"""WebDataset tars, read in place: members are never extracted and never executed."""

from __future__ import annotations

import json
import os
import tarfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from meditok.data.readers import IMAGE_SUFFIXES
from meditok.data.readers.blob import Blob
from meditok.errors import BadInputError, CorruptImageError, MeditokError, UnsafeFileError

_CODE = (".pkl", ".pickle", ".pyd", ".pt", ".pth", ".so", ".dll", ".exe", ".py", ".pyc")
_MAX_SIDECAR = 2**20


@dataclass
class Member:
    """An image inside a tar, with the columns of its KEY.json and KEY.txt, its caption."""

    blob: Blob
    name: str  # posix path inside the tar
    columns: dict = field(default_factory=dict)


def read_tar(path: str) -> tuple[list[Member], list[tuple[str, str]], list[tuple[str, MeditokError]]]:
    """(images, ignored, failed). Unsafe members, duplicates and a cut tail fail one by one, by name."""
    members: list[Member] = []
    sidecars: dict[str, list[Blob]] = defaultdict(list)
    ignored: list[tuple[str, str]] = []
    failed: list[tuple[str, MeditokError]] = []
    seen: set[str] = set()
    size = os.path.getsize(path)
    try:
        with tarfile.open(path, mode="r:") as archive:
            for info in archive:
                label = f"{path}/{info.name}"
                reason = _unsafe(info)
                if reason:
                    failed.append(
                        (
                            label,
                            UnsafeFileError(f"{label}: {reason}; it was not read; make the tar again without it"),
                        )
                    )
                    continue
                if info.isdir():
                    continue
                name = PurePosixPath(info.name).as_posix()
                if name in seen:
                    failed.append(
                        (
                            label,
                            BadInputError(f"{label}: occurs twice in the tar; give members different keys"),
                        )
                    )
                    continue
                seen.add(name)
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError("member past the end")
                blob = Blob(label, path, info.offset_data, info.size)
                suffix = blob.suffix
                if suffix in (".json", ".txt"):
                    sidecars[_key(name)].append(blob)
                elif suffix in IMAGE_SUFFIXES:
                    members.append(Member(blob, name))
                else:
                    ignored.append((label, "not an image"))
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError):  # the last two: sizes beyond any file
        failed.append(
            (
                path,
                CorruptImageError(f"{path}: the tar is cut or damaged after {len(seen)} members; get it again"),
            )
        )
    keys = {_key(member.name) for member in members}
    stray = [blob for key, blobs in sidecars.items() if key not in keys for blob in blobs]
    ignored += [(blob.label, "not an image") for blob in stray if blob.suffix == ".txt"]
    good = []
    for member in members:
        try:
            for sidecar in sorted(sidecars.get(_key(member.name), ()), key=lambda blob: blob.suffix, reverse=True):
                member.columns.update(_columns(sidecar))  # what JSON states comes last and counts
            good.append(member)
        except MeditokError as error:
            failed.append((member.blob.label, error))
    return good, ignored, failed


def _unsafe(info: tarfile.TarInfo) -> str | None:
    """Why a member is refused, or None."""
    parts = PurePosixPath(info.name.replace("\\", "/")).parts
    if info.name.startswith(("/", "\\")) or (len(info.name) > 1 and info.name[1] == ":"):
        return "absolute member name"
    if ".." in parts:
        return "member name climbs out with .."
    if info.issym() or info.islnk():
        return "member is a link"
    if not (info.isfile() or info.isdir()):
        return "member is a device or special file"
    if info.name.lower().endswith(_CODE):
        return "member of a type that may run code"
    return None


def _key(name: str) -> str:
    """The WebDataset key: folder and file name up to its first dot."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _columns(blob: Blob) -> dict:
    if blob.size > _MAX_SIDECAR:
        raise UnsafeFileError(
            f"{blob.label}: a sidecar of {blob.size} bytes, over the limit of {_MAX_SIDECAR}; make it smaller"
        )
    text = blob.suffix == ".txt"
    try:
        content = blob.read().decode("utf-8")
        record = {"caption": content.strip() or None} if text else json.loads(content)
    except (ValueError, RecursionError) as error:
        kind = "UTF-8 text" if text else "valid JSON"
        raise CorruptImageError(f"{blob.label}: the sidecar is not {kind}; repair it") from error
    if not isinstance(record, dict):
        raise CorruptImageError(f"{blob.label}: the sidecar is not a JSON object; repair it")
    return {key: value for key, value in record.items() if value is not None}
