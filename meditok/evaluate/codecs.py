"""What is compared: anything that turns a fitted picture into bytes and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ..bulk.reading import PATCH
from ..data.fit import unpadded_mask
from ..errors import UsageError

if TYPE_CHECKING:
    from ..data import MedicalImage
    from ..models.tokenizer import Tokenizer


@dataclass
class Coded:
    """A picture after its round trip: pixels (C, S, S) float32 in [-1, 1] on the CPU, C = 1 for a grey source."""

    pixels: torch.Tensor
    size: int  # bytes it took
    ids: torch.Tensor | None = None  # (G, n) of the positions that hold a pixel of the picture


class Codec(Protocol):
    """Has a `name` and a `side` (pixels of the fitted picture), and codes one fitted picture at a time."""

    name: str
    side: int

    def __call__(self, fitted: MedicalImage) -> Coded: ...

    def describe(self) -> dict: ...


class TokenizerCodec:
    """A tokenizer, given one picture at a time; its ids count as packed in as many bits as they need."""

    kind = "model"

    def __init__(self, model: Tokenizer, side: int | None = None):
        self.model, self.name, self.side = model, model.config.name, side or model.config.image_size
        self.codebooks, self.codes = model.codebook.shape[:2]
        self.counts = torch.zeros(self.codebooks, self.codes, dtype=torch.int64)

    def __call__(self, fitted: MedicalImage) -> Coded:
        height, width = fitted.pixels.shape[1:]
        grid = height // PATCH, width // PATCH
        ids = self.model.tokenize(fitted.pixels[None])
        pixels = self.model.detokenize(ids, grid)[0].cpu()
        inside = unpadded_mask(fitted.geometry, height, width, PATCH).flatten()
        used = ids[0].cpu()[:, inside]
        self.counts += torch.stack([torch.bincount(each, minlength=self.codes) for each in used])
        return Coded(grey_if(fitted, pixels), self.bytes_of(height, width), used)

    def bytes_of(self, height: int, width: int) -> int:
        """Bytes of the ids of a picture of that size, padding included."""
        bits = (self.codes - 1).bit_length() * self.codebooks * (height // PATCH) * (width // PATCH)
        return -(-bits // 8)

    def describe(self) -> dict:
        model = self.model
        return {
            "kind": self.kind,
            "model_hash": model.hash,
            "codebook_hash": model.codebook_hash,
            "precision": model.precision,
            "device_class": model.device.type,
            "parameters": sum(each.numel() for each in model.parameters()),
            "image_size": self.side,
        }


def grey_if(fitted: MedicalImage, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (3, H, W) as what is written of them: the mean of the channels where the source is grey."""
    return pixels.mean(0, keepdim=True) if fitted.channels == 1 else pixels


def name_apart(codecs: list) -> list:
    """The codecs, with the hash behind the name of models that share one. UsageError: the same model twice."""
    names = [codec.name for codec in codecs]
    for codec in codecs:
        if names.count(codec.name) > 1:
            codec.name = f"{codec.name}@{codec.model.hash[:8]}"
    if len({codec.name for codec in codecs}) < len(codecs):
        raise UsageError(f"--model: {codecs[-1].name} was given twice, under two names; give each model once")
    return codecs
