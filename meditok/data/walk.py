"""From inputs to files: folders, globs, manifests and tars taken apart. Opens nothing but manifests and tars."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from meditok.data import archives, manifest
from meditok.data.readers.blob import Blob
from meditok.errors import BadInputError, MeditokError, UsageError

if TYPE_CHECKING:
    from meditok.data.sources import Source

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar")


@dataclass
class Discovery:
    """Everything the inputs hold. found = len(sources' files) + len(ignored) + len(failed)."""

    sources: list[Source] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    failed: list[tuple[str, MeditokError]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # path of what failed -> its name, relative to its input

    def fail(self, path: str, name: str, error: MeditokError) -> None:
        self.failed.append((path, error))
        self.names[path] = name


@dataclass
class Found:
    """A file to look at."""

    blob: Blob
    name: str  # relative to its input
    named: bool  # given explicitly, so that ignoring it is an error
    columns: dict = field(default_factory=dict)


def expand(item: str, discovery: Discovery) -> list[Found]:
    """Files of one input argument; what is left out or cannot be listed goes into `discovery`.

    A glob means what a shell would make of it, but names are relative to the folder in front of its first wildcard.
    """
    if os.path.isdir(item):
        return _folder(item, item, discovery)
    if os.path.isfile(item):
        return _file(item, os.path.basename(item), discovery, named=True, listing=True)
    if not glob.has_magic(item):
        raise BadInputError(f"{item}: no such file or folder; correct the path")
    root, found = _root_of(item), []
    matches = sorted(glob.glob(item, recursive=True))
    if "**" in item:  # it matches what is in the folders, too
        matches = [path for path in matches if not os.path.isdir(path)]
    if not matches:
        raise UsageError(f"{item}: no file matches; correct the pattern")
    listing = item.lower().endswith(manifest.SUFFIXES)
    for path in matches:
        if os.path.isdir(path):
            found += _folder(path, root, discovery)
        else:
            name = manifest.relative_name(path, root)
            found += _file(path, name, discovery, named=False, listing=listing)
    return found


def _root_of(pattern: str) -> str:
    """The folder in front of the first wildcard."""
    parts: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return str(Path(*parts))


def _folder(folder: str, root: str, discovery: Discovery) -> list[Found]:
    """Everything below a folder, in the order of names. Its manifest.csv labels the files."""
    labels, found = manifest.label_columns(folder), []

    def unlistable(error: OSError) -> None:
        problem = f"{error.filename}: this folder cannot be listed ({error.strerror})"
        name = manifest.relative_name(error.filename, root)
        discovery.fail(error.filename, name, BadInputError(f"{problem}; check its permissions"))

    for here, folders, files in os.walk(folder, onerror=unlistable):
        folders.sort()
        inside, outside = manifest.relative_name(here, folder), manifest.relative_name(here, root)
        for name in folders:
            path = os.path.join(here, name)
            if os.path.islink(path):
                discovery.ignored.append((path, "a link to a folder"))
                discovery.warnings.append(f"{path}: a link to a folder, left out; name it as an input of its own")
        for file in sorted(files):
            path, key, name = os.path.join(here, file), _joined(inside, file), _joined(outside, file)
            if file.startswith("."):
                discovery.ignored.append((path, "hidden file"))
            elif key == manifest.LABEL_FILE:
                discovery.ignored.append((path, "labels of this folder"))
            elif os.path.exists(path) and not os.path.isfile(path):
                discovery.ignored.append((path, "a pipe or device"))  # opening a pipe would wait for ever
            elif file.lower().endswith(".tar"):
                found += _tar(path, name, discovery, labels, key)
            else:
                found.append(Found(Blob.of(path), name, False, labels.get(key, {})))
    return found


def _joined(folder: str, file: str) -> str:
    return file if folder == "." else f"{folder}/{file}"


def _file(path: str, name: str, discovery: Discovery, *, named: bool, listing: bool) -> list[Found]:
    """A file outside any folder that is walked: a tar, a manifest where `listing` says so, or one file."""
    if listing and path.lower().endswith(manifest.SUFFIXES):
        entries, failed = manifest.read_manifest(path)
        for label, error in failed:
            discovery.fail(label, os.path.basename(label), error)
        return [Found(Blob.of(entry.file), entry.name, True, entry.columns) for entry in entries]
    if path.lower().endswith(".tar"):
        return _tar(path, name, discovery)
    return [Found(Blob.of(path), name, named)]


def _tar(path: str, name: str, discovery: Discovery, labels: dict | None = None, key: str = "") -> list[Found]:
    """Members of a tar; the manifest of its folder labels them as "<key>#<member>"."""
    members, ignored, failed = archives.read_tar(path)
    discovery.ignored += ignored
    for label, error in failed:  # the tar itself, or a member as "<path>/<member>"
        discovery.fail(label, name + label.removeprefix(path), error)
    found = []
    for member in members:
        columns = (labels or {}).get(f"{key}#{member.name}", {}) | member.columns
        found.append(Found(member.blob, f"{name}/{member.name}", False, columns))
    return found
