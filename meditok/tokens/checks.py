"""What a row of a token file must be before anything is decoded or allocated for it."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from ..errors import BadInputError

if TYPE_CHECKING:
    import pyarrow as pa

    from ..data import Geometry
    from .schema import Description

FITS = ("none", "pad", "stretch", "crop", "tile")
PLANES = ("", "axial", "coronal", "sagittal", "native")
MAX_VOXELS = 2**31  # of one volume


@functools.cache
def known_types() -> dict[str, pa.DataType]:
    """Arrow type of every column but `tokens`."""
    from .schema import TokenInfo, arrow_schema

    schema = arrow_schema(TokenInfo("", "", "", 1, 1, (1, 1)))
    return {field.name: field.type for field in schema if field.name != "tokens"}


def check_row(cells: dict, fields: set[str], where: str) -> Description:
    """The Description of one row's cells. BadInputError names the row and what is wrong with it."""
    from .schema import Description

    name = cells.get("id")
    if not name:
        raise BadInputError(f"{where}: a row without id; write the file again with meditok tokenize")
    if cells.get("height") is None or cells.get("width") is None:
        raise BadInputError(f"{where}: row {name}: no height or width; write the file again with meditok tokenize")
    values = {key: value for key, value in cells.items() if key in fields and value is not None}
    if "geometry" in values:
        values["geometry"] = _geometry(values["geometry"], f"{where}: row {name}")
    if "tile" in values:
        values["tile"] = tuple(values["tile"][key] for key in "yxhw")
    values["steps"] = tuple(values.get("steps", ()))
    row = Description(**values, extra={key: value for key, value in cells.items() if key not in fields})
    problem = _problem(row)
    if problem:
        raise BadInputError(f"{where}: row {name}: {problem}; write the file again with meditok tokenize")
    return row


def _geometry(record: dict, where: str) -> Geometry:
    from ..data import Geometry, Limits

    lists = {"original_shape": None, "pad": 4, "spacing": 3, "affine": 16}
    filled = {key: value for key, value in record.items() if value is not None}
    geometry = Geometry.from_dict({"original_shape": ()} | filled)
    shape, needed = geometry.original_shape, 3 if geometry.axis >= 0 else 2
    problem = next(
        (
            f"{key} has {len(filled[key])} entries"
            for key, count in lists.items()
            if count and key in filled and (len(filled[key]) != count or None in filled[key])
        ),
        "",
    )
    if geometry.axis not in (-1, 0, 1, 2) or geometry.fit not in FITS or geometry.plane not in PLANES:
        problem = f"axis {geometry.axis}, fit {geometry.fit!r}, plane {geometry.plane!r} are unknown"
    elif len(shape) < needed or None in shape or min(shape) < 1:
        problem = f"original_shape {shape} does not fit axis {geometry.axis}"
    elif geometry.axis >= 0 and geometry.affine is None and geometry.plane != "native":
        problem = "a slice without affine"
    elif geometry.affine is not None and not all(map(math.isfinite, geometry.affine)):
        problem = "its affine is not finite"
    elif math.prod(shape[:3]) > MAX_VOXELS:
        problem = f"{math.prod(shape[:3])} voxels are over the limit of {MAX_VOXELS}"
    if problem:
        raise BadInputError(f"{where}: geometry: {problem}; write the file again with meditok tokenize")
    sides = sorted(shape[:needed])[-2:]
    Limits().check_pixels(*sides, where)
    return geometry


def _problem(row: Description) -> str:
    if row.channels not in (1, 3):
        return f"{row.channels} channels"
    if not (math.isfinite(row.low) and math.isfinite(row.high)):
        return f"low {row.low}, high {row.high}"
    if row.slice is not None and row.geometry is not None and row.geometry.axis >= 0:
        count = row.geometry.original_shape[row.geometry.axis]
        if not 0 <= row.slice < count:
            return f"slice {row.slice} of {count}"
    if row.tile is not None:
        y, x, height, width = row.tile
        if row.geometry is None or None in row.tile or min(y, x) < 0 or min(height, width) < 1:
            return f"tile {row.tile}"
        from ..data.geometry import displayed_size

        rows, columns = displayed_size(row.geometry)
        if y + height > rows or x + width > columns:
            return f"tile {row.tile} lies outside {rows} x {columns}"
    return ""
