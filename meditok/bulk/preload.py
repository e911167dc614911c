"""What the process that forks the workers imports once, so that each worker starts in milliseconds."""

from .. import data  # noqa: F401
from .._lazy import require
from ..data.readers import dicom, nifti, numpy, pillow  # noqa: F401
from ..errors import MissingPartError
from ..models import tokenizer  # noqa: F401
from . import encoding, reading  # noqa: F401

try:
    for plugin in ("Png", "Jpeg", "Tiff", "Bmp"):
        require(f"PIL.{plugin}ImagePlugin", "reading pictures")
except MissingPartError:  # who reads one is told
    pass
