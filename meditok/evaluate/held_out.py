"""What may be evaluated: the pictures of a split that no model has been trained on, each with its group.

Pictures of one patient, volume or cine look alike, so a group is what is resampled and what stays whole in every
division of the pictures. It is the manifest's column `group`, else the volume or series, else the file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..data import Discovery, Row, Source
from ..errors import BadInputError, MeditokError, UsageError

SPLIT = "val"
TRAINING = "train"
FINGERPRINT_DIGITS = 16


@dataclass
class HeldOut:
    """The sources to evaluate, and those a baseline may be fitted on."""

    sources: list[Source]
    training: list[Source]
    splits: tuple[str, ...]  # that were chosen; empty where no source states one
    left_out: int = 0  # files of other splits, those of `training` included
    warnings: list[str] = field(default_factory=list)


def choose(found: Discovery, split: str | None = None) -> HeldOut:
    """The sources of `split` (names joined by commas; None: "val" where splits are stated, else everything).

    UsageError: the training split was asked for, or no source is of a split that was.
    """
    wanted = tuple(name.strip() for name in (split or SPLIT).split(",") if name.strip())
    if TRAINING in wanted:
        raise UsageError(
            f"split {TRAINING}: is what models are trained on and says nothing of new images; name another"
        )
    stated = {id(source): split_of(source) for source in found.sources}
    counts = Counter(stated.values())
    if set(counts) <= {""}:
        if split:
            raise UsageError(f"--split {split}: no input states a split; give a manifest that does, or leave it out")
        note = "no input states a split: nothing tells whether a model was trained on these images"
        return HeldOut(list(found.sources), [], (), warnings=[note] if found.sources else [])
    sources = [source for source in found.sources if stated[id(source)] in wanted]
    if not sources:
        there = ", ".join(f"{name or 'none stated'} ({count})" for name, count in sorted(counts.items()))
        raise UsageError(f"--split {','.join(wanted)}: no input is of it; there are: {there}")
    held = HeldOut(sources, [s for s in found.sources if stated[id(s)] == TRAINING], wanted)
    held.left_out = sum(len(files(s)) for s in found.sources) - sum(len(files(s)) for s in sources)
    return held


def split_of(source: Source) -> str:
    """The split its manifest states, "" for none. BadInputError for a series whose files are of several."""
    stated = {str(columns.get("split") or "") for columns in source.row_columns.values()}
    stated |= {str(source.columns.get("split") or "")} if not stated else set()
    if len(stated) > 1:
        raise BadInputError(f"{source.path}: its series is spread over splits {', '.join(sorted(stated))}; repair them")
    return stated.pop()


def files(source: Source) -> list[str]:
    """Names of the files of a source."""
    return list(source.names.values()) or [source.name]


def group_of(row: Row, column: str = "group") -> str:
    """What a picture belongs to: the manifest's group, else its volume, else its file."""
    stated = row.columns.get(column)
    if stated is not None:
        return f"stated {stated}"
    return f"volume {row.image.volume}" if row.image.volume else f"file {row.name.rpartition('#')[0]}"


def shared_groups(held: HeldOut, column: str = "group") -> tuple[list[Source], int]:
    """(training sources of a group that is evaluated too, number of such groups), by what manifests state."""

    def stated(source: Source) -> set[str]:
        rows = (source.columns, *source.row_columns.values())
        return {str(columns[column]) for columns in rows if columns.get(column) is not None}

    evaluated = set().union(*(stated(source) for source in held.sources))
    both = [(source, stated(source) & evaluated) for source in held.training]
    shared = [source for source, groups in both if groups]
    return shared, len(set().union(*(groups for _, groups in both)))


def fingerprints(source: Source) -> list[str]:
    """The first 16 hex digits of the SHA-256 of each of its files: what a model's data.json lists as `files`."""
    return [hashlib.sha256(blob.read()).hexdigest()[:FINGERPRINT_DIGITS] for blob in source.blobs]


def refuse_seen(sources: Iterable[Source], seen: dict[str, frozenset[str]]) -> Iterator[tuple[Source, MeditokError]]:
    """Sources with a file that a model was trained on, as its data.json says, with the error to give.

    seen: name of a model -> fingerprints of the files it was trained on.
    """
    if not any(seen.values()):
        return
    for source in sources:
        try:
            prints = fingerprints(source)
        except MeditokError:
            continue  # reading it reports that
        known = [name for name, theirs in seen.items() if theirs.intersection(prints)]
        if known:
            names = " and ".join(known)
            yield (
                source,
                BadInputError(
                    f"{source.path}: {names} was trained on this very file, as its data.json says; evaluate on others "
                    "(a manifest with a column split, or --on-error skip)"
                ),
            )


def digest_of(prints: Sequence[str]) -> str:
    """SHA-256 over the sorted fingerprints of all files: equal for two runs over the same images."""
    return hashlib.sha256("\n".join(sorted(prints)).encode()).hexdigest()
