"""`read` one picture, or `frames` of a file or of a folder, one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator

from meditok.data.image import MedicalImage
from meditok.data.options import ReadOptions, read_options
from meditok.data.readers import open_blob
from meditok.data.readers.blob import Blob
from meditok.errors import MultiFrameError, UsageError


def read(
    source: str | os.PathLike, frame: int | None = None, *, options: ReadOptions | None = None, **keywords
) -> MedicalImage:
    """The one picture of a file, or picture number `frame` of it.

    Keywords are those of ReadOptions (modality, window, plane, ...). Raises MultiFrameError with the number
    of frames if there are several and none was chosen, UsageError for a frame past the end, and the named
    errors of the readers for files that are broken, contradictory or unsafe.
    """
    options = read_options(options, **keywords)
    frame = options.frame if frame is None else frame
    reader = open_blob(Blob.of(source), options)
    if frame is None:
        if reader.frames != 1:
            raise MultiFrameError(
                f"{reader.where}: holds {reader.frames} frames or slices; choose one with "
                f"frame=0..{reader.frames - 1}, "
                "or go through them with frames()",
                reader.frames,
            )
        frame = 0
    return reader.image(check_frame(frame, reader.frames, reader.where))


def frames(
    source: str | os.PathLike, plane: str | None = None, *, options: ReadOptions | None = None, **keywords
) -> Iterator[MedicalImage]:
    """Every picture of a file, or of a folder's DICOM series and files, lazily and in order.

    Slices of a volume are cut along `plane`; frames of a DICOM series are sorted by position. Raises at the
    first picture that cannot be read.
    """
    if plane is not None:
        keywords["plane"] = plane
    options = read_options(options, **keywords)
    if os.path.isdir(source):
        from meditok.data.sources import discover

        found = discover([source], options)
        for _, error in found.failed:
            raise error
        for item in found.sources:
            for row in item.rows():
                if row.error is not None:
                    raise row.error
                yield row.image
        return
    reader = open_blob(Blob.of(source), options)
    chosen = (
        range(reader.frames) if options.frame is None else [check_frame(options.frame, reader.frames, reader.where)]
    )
    for index in chosen:
        yield reader.image(index)


def check_frame(frame: int, count: int, where: str) -> int:
    """`frame` if it is in 0..count-1, else UsageError."""
    if not 0 <= frame < count:
        raise UsageError(f"{where}: frame {frame} is not in 0..{count - 1}")
    return frame
