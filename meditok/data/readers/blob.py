"""Where bytes come from: a file, a piece of a tar, or memory. Nothing is ever written or extracted."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from meditok.errors import BadInputError, CorruptImageError

_IN_MEMORY = 64 * 2**20  # larger files are mapped


@dataclass(frozen=True)
class Blob:
    """Readable bytes with the label that messages show. Picklable."""

    label: str  # what the user gave
    path: str = ""  # file on disk that holds the bytes
    offset: int = 0
    length: int | None = None  # None: to the end of the file
    data: bytes | None = None

    @classmethod
    def of(cls, source: str | os.PathLike | Blob) -> Blob:
        return source if isinstance(source, Blob) else cls(label=os.fspath(source), path=os.fspath(source))

    @property
    def name(self) -> str:
        return Path(self.label.replace("\\", "/")).name

    @property
    def suffix(self) -> str:
        name = self.name.lower()
        return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix

    @property
    def is_file(self) -> bool:
        """True if the whole of a file on disk is meant, so that it may be mapped."""
        return self.data is None and self.offset == 0 and self.length is None

    @property
    def size(self) -> int:
        if self.data is not None:
            return len(self.data)
        if self.length is not None:
            return self.length
        try:
            return os.stat(self.path).st_size - self.offset
        except OSError as error:
            raise self._unreadable(error) from error

    def read(self, start: int = 0, count: int | None = None) -> bytes:
        """Up to `count` bytes from `start`."""
        if self.data is not None:
            return self.data[start:] if count is None else self.data[start : start + count]
        left = self.size - start
        count = left if count is None else min(count, left)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset + start)
                return file.read(max(0, count))
        except OSError as error:
            raise self._unreadable(error) from error

    def buffer(self) -> bytes | mmap.mmap:
        """All bytes: in memory when small, mapped when large."""
        if self.data is not None or self.size <= _IN_MEMORY or not self.is_file:
            data = self.read()
            if len(data) != self.size:
                raise CorruptImageError(
                    f"{self.label}: {len(data)} bytes read of {self.size}; the file shrank or is cut"
                )
            return data
        try:
            with open(self.path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> BadInputError:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return BadInputError(f"{self.label}: cannot be opened ({reason}); check the path and its permissions")
