"""Token files made by hand: no model and no picture is needed to test the format."""

import numpy as np
import pytest

from meditok.data import Geometry
from meditok.tokens import Description, TokenInfo, Tokens

INFO = TokenInfo(
    model="tiny",
    model_hash="a" * 64,
    codebook_hash="b" * 64,
    num_codebooks=8,
    codebook_size=4096,
    grid=(4, 4),
    licence="CC-BY-4.0",
)


@pytest.fixture
def make_tokens():
    """make(rows, info=INFO, **fields): Tokens with random ids and full descriptions."""

    def make(rows=5, info=INFO, seed=0, **fields):
        ids = np.random.default_rng(seed).integers(0, info.codebook_size, (rows, info.num_codebooks, info.positions))
        geometry = Geometry((40, 64), fit="pad", scale_y=1.6, scale_x=1.0, pad=(0, 0, 2, 2))
        placed = Geometry(
            (40, 64, 9), 2, "axial", spacing=(1.0, 1.0, 2.5), affine=tuple(np.diag([-1, -1, 2.5, 1]).ravel())
        )
        descriptions = [
            Description(
                f"{i:032x}",
                64,
                64,
                "ct",
                "CHEST",
                "default",
                "HU",
                -1000.0,
                1000.0,
                1,
                "c" * 32,
                "d" * 32,
                i % 9,
                0,
                2.5 * i,
                (0, 0, 40, 40) if i % 2 else None,
                placed if i % 2 else geometry,
                ("rescale slope=1 intercept=-1024", "window default -1000 1000"),
                dict(fields),
            )
            for i in range(rows)
        ]
        return Tokens(ids, descriptions, info)

    return make
