"""Keyed names: what stands in an output in place of a path, a file name or a DICOM identifier."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sys
import warnings
from pathlib import Path

from ..errors import UsageError

VARIABLE = "MEDITOK_KEY_FILE"
_KEY_BYTES = 32


def key_path() -> Path:
    """Where the key lives: MEDITOK_KEY_FILE, else `key` in the user's config folder for meditok."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    if os.name == "nt":
        base = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "meditok" / "key"


def load_key() -> bytes:
    """The bytes of the key file; made once, readable by its owner only.

    UsageError where it is empty, or can be neither read nor made.
    """
    path = key_path()
    try:
        if not path.exists():
            _make(path)
        key = path.read_bytes()
        shared = os.name != "nt" and path.stat().st_mode & 0o077
    except OSError as error:
        raise UsageError(
            f"key file {path}: {error.strerror}; point {VARIABLE} at a file that can be read or made"
        ) from None
    if not key:
        raise UsageError(f"key file {path}: empty; remove it to have a new key made, or point {VARIABLE} at another")
    if shared:
        warnings.warn(
            f"key file {path} can be read by others, who can then guess names from hashes; chmod 600 it",
            stacklevel=2,
        )
    return key


def _make(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        os.link(draft, path)  # unlike a rename, this never replaces the key another process has just made
    except FileExistsError:
        pass
    except OSError:
        if not path.exists():  # a file system without hard links
            os.rename(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class Namer:
    """Turns names into what outputs may hold: keyed hashes, or with `keep_names` the names themselves."""

    def __init__(self, key: bytes | None = None, *, keep_names: bool = False):
        self.keep_names = keep_names
        self._key = load_key() if key is None else key

    def digest(self, text: str) -> str:
        """32 hex digits of HMAC-SHA256(key, text), whatever `keep_names` says."""
        return hmac.new(self._key, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:32]

    def name(self, text: str) -> str:
        """The keyed hash of `text`, or `text` itself with `keep_names`; "" stays ""."""
        return text if self.keep_names or not text else self.digest(text)

    def row_id(self, path: str, frame: int) -> str:
        """Id of one picture: of "<path>#<frame>", path relative to the input it came with.

        With `keep_names` the path, followed by "#<frame>" from the second frame on.
        """
        if self.keep_names:
            return f"{path}#{frame}" if frame else path
        return self.digest(f"{path}#{frame}")
