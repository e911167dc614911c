"""Every error meditok raises on purpose, with the exit code the command line gives it.

A message is one line: what was given, where, what is wrong, what to do. Exit codes are those of the
command line contract: 2 usage, 3 bad input, 4 missing optional part, 5 unsafe content.
"""

from __future__ import annotations


class MeditokError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what a command exits with."""

    exit_code = 1


class UsageError(MeditokError, ValueError):
    """Options that contradict each other or make no sense for the given inputs."""

    exit_code = 2


class BadInputError(MeditokError, ValueError):
    """An input that is broken, unreadable or contradictory."""

    exit_code = 3


class CorruptImageError(BadInputError):
    """An image or volume file that cannot be decoded in full."""


class TruncatedDicomError(CorruptImageError):
    """Pixel data shorter than the header says."""


class HeaderMismatchError(BadInputError):
    """Header fields that contradict each other or the data."""


class IntensityError(BadInputError):
    """Stored values that cannot have the meaning asked for (e.g. CT without Hounsfield units)."""


class NonFiniteError(BadInputError):
    """NaN or infinite voxels where none are allowed."""


class NotAnImageError(BadInputError):
    """A file that holds no picture (report, structure set, text, ...)."""


class GeometryError(BadInputError):
    """Orientation or spacing that is missing, singular or contradictory."""


class MultiFrameError(BadInputError):
    """One picture was asked of a file that holds several; `frames` is their number."""

    def __init__(self, message: str, frames: int):
        super().__init__(message)
        self.frames = frames

    def __reduce__(self):  # keeps the error picklable across worker processes
        return type(self), (self.args[0], self.frames)


class ShapeError(BadInputError):
    """An array of a rank or size that is not allowed here."""


class DtypeError(BadInputError, TypeError):
    """An array of a dtype or value range that is not allowed here."""


class TokenShapeError(ShapeError):
    """Token ids whose shape does not fit the model."""


class TokenRangeError(BadInputError):
    """Token ids outside 0..K-1."""


class CodebookMismatchError(BadInputError):
    """Tokens made with another codebook than the model's."""


class MissingPartError(MeditokError):
    """An optional part (package, weights, device feature) that this call needs and that is not here."""

    exit_code = 4


class MissingDecoderError(MissingPartError):
    """A compressed DICOM whose decoder is not installed."""


class UnsafeFileError(MeditokError):
    """Content that may run code, escape its folder or exhaust the machine."""

    exit_code = 5


class ImageTooLargeError(UnsafeFileError):
    """An image whose header claims more pixels or bytes than the limits allow."""


class WorkerError(MeditokError):
    """A worker process that died or failed while it read a file."""
