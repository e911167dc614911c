"""Images in: readers, windows, geometry, fitting. Formats are imported when a file of theirs is opened."""

from meditok.data.arrays import to_pixels
from meditok.data.fit import fit, unfit
from meditok.data.geometry import from_display, to_display
from meditok.data.image import Geometry, MedicalImage
from meditok.data.options import MODALITIES, Limits, ReadOptions
from meditok.data.processor import Processor
from meditok.data.reading import frames, read
from meditok.data.sources import Row, Source, discover
from meditok.data.walk import Discovery

__all__ = [
    "MODALITIES",
    "Discovery",
    "Geometry",
    "Limits",
    "MedicalImage",
    "Processor",
    "ReadOptions",
    "Row",
    "Source",
    "discover",
    "fit",
    "frames",
    "from_display",
    "read",
    "to_display",
    "to_pixels",
    "unfit",
]
