"""From tokens back to pictures at the size and place of their source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import TokenShapeError
from .schema import Description, TokenInfo

if TYPE_CHECKING:
    from ..data import MedicalImage
    from ..models.tokenizer import Tokenizer


@dataclass
class Restored:
    """A decoded picture, and the row it came from (the first one, where tiles were joined)."""

    image: MedicalImage  # (3, H, W) in [-1, 1] at native size; equal channels where the source was grey
    row: Description


def restore(
    batches: Iterable[tuple[np.ndarray, list[Description]]],
    info: TokenInfo,
    rows: Iterable[Description],
    model: Tokenizer,
    where: str,
) -> Iterator[Restored]:
    """Decode batches of ids (R, G, N) and undo the fitting; `rows` are the descriptions of all of them.

    Decoding is independent of the batch. The tiles of one picture are joined; it comes out with its last
    tile. CodebookMismatchError: the tokens were made with another codebook; TokenShapeError: tiles are
    missing.
    """
    info.check_model(model, where)
    tiles = Counter(row.id for row in rows if row.tile is not None)
    canvases: dict[str, _Canvas] = {}
    for ids, descriptions in batches:
        tokens = torch.from_numpy(ids.astype(np.int64))
        pixels = model.detokenize(tokens, info.grid, stable=True).cpu()
        for picture, row in zip(pixels, descriptions, strict=True):
            if row.channels == 1:
                picture = picture.mean(0, keepdim=True)
            if row.tile is None:
                yield Restored(_image(_native(picture, row), row), row)
                continue
            canvas = canvases.setdefault(row.id, _Canvas(row))
            canvas.add(_native(picture, row), row)
            if canvas.count == tiles[row.id]:
                yield Restored(_image(canvas.finish(where), canvas.row), canvas.row)
                del canvases[row.id]


class _Canvas:
    """A picture being put together from tiles."""

    def __init__(self, row: Description):
        self.row, self.count, self.covered = row, 0, 0
        self.pixels: torch.Tensor | None = None

    def add(self, tile: torch.Tensor, row: Description) -> None:
        from ..data.geometry import displayed_size

        if self.pixels is None:
            self.pixels = torch.full((len(tile), *displayed_size(row.geometry)), -1.0)
        y, x, height, width = row.tile
        self.pixels[:, y : y + height, x : x + width] = tile
        self.count += 1
        self.covered += height * width

    def finish(self, where: str) -> torch.Tensor:
        height, width = self.pixels.shape[-2:]
        if self.covered != height * width:
            raise TokenShapeError(
                f"{where}: the {self.count} tiles of {self.row.id} cover {self.covered} of {height * width} "
                "pixels; decode all tiles of a picture together"
            )
        return self.pixels


def _native(pixels: torch.Tensor, row: Description) -> torch.Tensor:
    from ..data.fit import unfit

    if row.geometry is None:
        return pixels
    return unfit(pixels, row.geometry, row.tile[2:] if row.tile else None)


def _image(pixels: torch.Tensor, row: Description) -> MedicalImage:
    from ..data import Geometry, MedicalImage

    geometry = row.geometry or Geometry(tuple(pixels.shape[-2:]))
    geometry = replace(geometry, fit="none", scale_y=1.0, scale_x=1.0, pad=(0, 0, 0, 0))
    return MedicalImage(
        pixels.expand(3, *pixels.shape[-2:]).contiguous(),
        low=row.low,
        high=row.high,
        unit=row.unit,
        modality=row.modality,
        geometry=geometry,
        steps=list(row.steps),
        window=row.window,
        channels=row.channels,
        body_part=row.body_part,
        volume=row.volume,
        slice=row.slice,
        frame=row.frame,
        position=row.position,
    )
