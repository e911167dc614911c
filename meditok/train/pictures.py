"""Training pictures held in memory: WebDataset tars filtered by a manifest that states licences and splits."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.windows import CT_WINDOWS, random_ct_window
from ..errors import BadInputError

HU_OFFSET = 1024  # 16-bit CT pictures store HU + 1024


@dataclass(frozen=True)
class Picture:
    """One image; pixels uint8 (H, W, 3) or, for CT in Hounsfield units, int16 (H, W)."""

    key: str
    modality: str
    pixels: np.ndarray

    def values(self, window: tuple[float, float] = CT_WINDOWS["default"]) -> torch.Tensor:
        """float32 (3, H, W) in [-1, 1]; `window` (low, high) applies to pictures in Hounsfield units only."""
        if self.pixels.ndim == 2:
            low, high = window
            grey = torch.from_numpy(self.pixels).float().clamp(low, high).sub(low).mul(2 / (high - low)).sub(1)
            return grey.expand(3, -1, -1)
        return torch.from_numpy(self.pixels).permute(2, 0, 1).float() / 127.5 - 1


def manifest_rows(manifest: Path, split: str, *, publishable: bool) -> list[dict]:
    """Rows of a manifest's tar members in `split`, in file order; `publishable` keeps those whose licence lets weights
    made from them be published (weights_ok = yes).
    """
    with open(manifest, newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["split"] == split and "#" in r["path"]]
    rows = [r for r in rows if r["weights_ok"] == "yes" or not publishable]
    if not rows:
        raise BadInputError(f"{manifest}: no usable row of split {split!r}; check split and manifest")
    return rows


def list_hash(rows: list[dict]) -> str:
    """SHA-256 over the sorted paths: names exactly which images a model has seen."""
    return hashlib.sha256("\n".join(sorted(r["path"] for r in rows)).encode()).hexdigest()


def read_pictures(root: Path, rows: list[dict]) -> list[Picture]:
    """The pictures the rows name, in their order; BadInputError for a member that is not there."""
    from PIL import Image

    wanted: dict[str, set[str]] = {}
    for row in rows:
        archive, member = row["path"].split("#")
        wanted.setdefault(archive, set()).add(member)
    found = {}
    for archive, members in wanted.items():
        with tarfile.open(root / archive) as tar:
            for member in tar:
                if member.name in members:
                    image = Image.open(io.BytesIO(tar.extractfile(member).read()))
                    found[f"{archive}#{member.name}"] = (
                        (np.asarray(image).astype(np.int32) - HU_OFFSET).astype(np.int16)
                        if image.mode.startswith("I")
                        else np.array(image.convert("RGB"))
                    )
    missing = [row["path"] for row in rows if row["path"] not in found]
    if missing:
        raise BadInputError(
            f"{root}: {len(missing)} images of the manifest are missing, first {missing[0]}; get the whole set"
        )
    return [Picture(row["path"], row["modality"], found[row["path"]]) for row in rows]


class Sampler:
    """Random crops with flips and quarter turns; modalities are drawn by the square root of their size."""

    def __init__(self, pictures: list[Picture], crop: int, seed: int):
        self.pictures, self.crop, self.random = pictures, crop, np.random.default_rng(seed)
        counts = Counter(p.modality for p in pictures)
        weights = np.array([1 / math.sqrt(counts[p.modality]) for p in pictures])
        self.weights = weights / weights.sum()

    def draw(self, batch: int) -> torch.Tensor:
        """float32 (batch, 3, crop, crop) in [-1, 1]"""
        chosen = self.random.choice(len(self.pictures), batch, p=self.weights)
        return torch.stack([self._view(self.pictures[i]) for i in chosen])

    def _view(self, picture: Picture) -> torch.Tensor:
        x = picture.values(CT_WINDOWS[random_ct_window(self.random)])
        height, width = x.shape[1:]
        top, left = (int(self.random.integers(0, s - self.crop + 1)) for s in (height, width))
        x = x[:, top : top + self.crop, left : left + self.crop]
        if self.random.random() < 0.5:
            x = x.flip(-1)
        return torch.rot90(x, int(self.random.integers(4)), (1, 2))


def fingerprints(root: Path, rows: list[dict]) -> list[str]:
    """Of every image's file, sorted, as evaluate.held_out has them; `meditok evaluate` refuses these."""
    from ..data import discover
    from ..evaluate import held_out

    wanted = {row["path"].replace("#", "/") for row in rows}
    sources = discover([str(root / archive) for archive in sorted({row["path"].split("#")[0] for row in rows})]).sources
    named = [source for source in sources if Path(source.path).relative_to(root).as_posix() in wanted]
    return sorted(each for source in named for each in held_out.fingerprints(source))


def describe(rows: list[dict], files: list[str]) -> str:
    """JSON of what a model was trained on: count and hash of the list, images per source with its licence, and the
    fingerprints of their files."""
    sources = Counter((r["modality"], r["source"], r["licence"], r["licence_stated"]) for r in rows)
    return json.dumps(
        {
            "images": len(rows),
            "list_sha256": list_hash(rows),
            "sources": [
                dict(zip(("modality", "source", "licence", "licence_stated", "images"), (*key, n), strict=True))
                for key, n in sorted(sources.items())
            ],
            "files": files,
        },
        indent=1,
    )
