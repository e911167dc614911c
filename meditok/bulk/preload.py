"""What the process that forks the workers imports once, so that each worker starts in milliseconds."""

from .. import data  # noqa: F401
from ..data.readers import dicom, nifti, numpy, pillow  # noqa: F401
from . import reading  # noqa: F401
