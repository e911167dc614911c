"""Which sources make which part: a pure function of the inputs and settings, so that runs can share and resume it.

A part holds whole files and whole series, as many as have `shard_size` pictures together, or a single larger one. What
is in a part depends on its sources alone, not on who computes it or when.

Two digests guard a result. The plan's tells names, sizes and settings and is known before any file is read. Each part
keeps the digest of its files' bytes, taken while they are read, and a stamp of their sizes and modification times. A
later run trusts a part whose stamp still holds, as git and rsync do, and reads its files again where it does not: a
copied or touched data set is the same input, and a file that was changed is noticed unless someone also kept both its
size and its modification time to the nanosecond.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError
from .reading import contents_of, description_of, stamp_text, stamps_of
from .workers import cut

if TYPE_CHECKING:
    from ..data import Discovery, Source
    from ..tokens.keys import Namer


@dataclass(frozen=True)
class Shard:
    """The sources of one part."""

    index: int
    sources: Sequence[Source]
    pictures: list[int]  # that the headers of each source promise

    def stamp(self, namer: Namer) -> str:
        """Keyed digest of the sizes and modification times of its files, as they are now."""
        return digest_of((stamp_text(stamps_of(source)) for source in self.sources), namer)

    def contents(self, namer: Namer) -> str:
        """Keyed digest of the bytes of its files: reads them all."""
        return digest_of((contents_of(source) for source in self.sources), namer)


@dataclass(frozen=True)
class Plan:
    """The parts of a run, and the keyed digest of all that decides their contents but the files' bytes."""

    shards: list[Shard]
    digest: str

    @property
    def pictures(self) -> int:
        return sum(sum(shard.pictures) for shard in self.shards)


def make_plan(
    found: Discovery, settings: dict, namer: Namer, shard_size: int | None = None, tile: int | None = None
) -> Plan:
    """Divide what was found. `settings` are all that change the result; `tile` is the size of tiles, if cut in tiles.

    Without `shard_size` there is one shard. UsageError: a shard size below 1.
    """
    if shard_size is not None and shard_size < 1:
        raise UsageError(f"shard size {shard_size}: give at least 1 row a part")
    pictures = [source.count(tile) for source in found.sources]
    shards = [
        Shard(index, found.sources[start:stop], pictures[start:stop])
        for index, (start, stop) in enumerate(cut(pictures, shard_size) if shard_size else [(0, len(pictures))])
    ]
    settings = settings | {"shard_size": shard_size, "pictures": pictures}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for source in found.sources:
        digest.update(description_of(source).encode("utf-8", "surrogateescape"))
    for name, error in found.failed:
        digest.update(repr((name, type(error).__name__)).encode("utf-8", "surrogateescape"))
    return Plan(shards, namer.digest(digest.hexdigest()))


def digest_of(pieces, namer: Namer) -> str:
    """Keyed digest of texts in order."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode() + b"\n")
    return namer.digest(digest.hexdigest())
