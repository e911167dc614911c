"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it becomes `path` when the block ends well and is removed if not.

    The bytes are flushed to the disk before the rename, and the rename after it, so that a crash or a full
    disk leaves either the old file, the whole new one, or none. The folder must exist.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with open(temporary, "rb") as file:
            _try_lock(file)  # until the rename, see remove_leftovers
            yield temporary
            sync(temporary)
            temporary.chmod(0o666 & ~_umask())  # mkstemp gives 0600; an ordinary file follows the umask
            if os.name != "nt":
                os.replace(temporary, path)
        if os.name == "nt":  # where an open file cannot be renamed
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it becomes `path`, which must not be there or be empty, when the block ends
    well, and is removed if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
        os.replace(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(path.parent)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove the temporary files of `path` that killed processes left; those still being written stay."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), open(leftover, "rb") as file:
            if _try_lock(file):
                leftover.unlink()


def _try_lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed; False where another process holds it, and always on Windows."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
