"""Deterministic weights, images and stored answers of the published implementation, for the parity tests.

A tensor depends only on (seed, key, shape): raw Philox words keyed by SHA-256, each turned into the centred sum of its
four 16-bit lanes. Only integer sums and single float32 roundings are used, so every machine makes the same bits.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch

from meditok.models.config import preset
from meditok.models.tokenizer import Tokenizer

SLIM = Path(__file__).parent.parent / "data" / "golden_xs_slim.npz"
SHARED = Path(os.environ.get("MEDITOK_SHARED", Path(__file__).parents[3] / "shared")) / "parity"
PRESETS = {"vitamin_small": "vitamin-small", "vitamin_base": "vitamin-base", "vitamin_large": "vitamin-large"}

_LANE_SUM_STD = 65536 / math.sqrt(3)
# Layers that feed a norm are small, so that a wrong eps shows in the answers.
_SMALL = re.compile(
    r"stem\.conv[12]\.|\.conv3_1x1\.|\.pool\.proj\.|\.attn\.proj\.|\.mlp\.w2\.|quant_proj\.proj\.|"
    r"up_conv1\.conv\.|\.norm2\.|^encoder\.norm\.|(\.shortcut|up_conv4\.conv1)\.(.+\.)?bias$"
)


def noise(name: str, shape: tuple[int, ...], std: float = 1.0, mean: float = 0.0) -> np.ndarray:
    """float32 array, bell-shaped around `mean`, from the random stream called `name`."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(math.prod(shape)).view(np.uint16).reshape(-1, 4)
    out = (words.sum(1, dtype=np.int32) - np.int32(131070)).astype(np.float32)
    out *= np.float32(std / _LANE_SUM_STD)
    if mean:
        out += np.float32(mean)
    return out.reshape(shape)


def weight(key: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The float32 tensor stored under `key`."""
    leaf, name, size = key.rsplit(".", 1)[-1], f"{seed}:{key}", 1 / 32 if _SMALL.search(key) else 1.0
    if leaf in ("zero_k_bias", "vocab_usage", "pos_embed"):
        return np.zeros(shape, np.float32)
    if leaf == "logit_scale":
        return np.full(shape, math.log(1 / 0.07), np.float32)
    if leaf.endswith("bias"):
        return noise(name, shape, 0.05 * size)
    if len(shape) == 1:
        return noise(name, shape, 0.1 * size, size)
    if key.endswith("codebook.weight"):
        return noise(name, shape)
    if key.endswith("attn.proj.weight"):
        size *= 0.3 if ".blocks." in key else 3.0
    elif key.endswith("mlp.w2.weight"):
        size *= 0.7
    return noise(name, shape, size / math.sqrt(math.prod(shape[1:])))


class Golden:
    """Stored answers of one size: arrays by name, each perhaps a slice of the full one, and the state-dict manifest."""

    def __init__(self, size: str):
        if size == "slim":
            self._npz = np.load(SLIM)
            self.manifest = json.loads(str(self._npz["manifest"]))
        else:
            self._npz = np.load(SHARED / f"golden_{size}.npz")
            self.manifest = json.loads((SHARED / f"manifest_{size}.json").read_text())
        self.meta = json.loads(str(self._npz["meta"]))

    @property
    def names(self) -> set[str]:
        return set(self._npz.files) - {"meta", "manifest"}

    def __contains__(self, name: str) -> bool:
        return name in self._npz.files

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self._npz[name]))

    def complete(self, name: str) -> bool:
        return all(step == 1 for step in self.meta["arrays"][name]["step"])

    def error(self, name: str, value: torch.Tensor) -> float:
        """Largest difference over the stored part, as a share of the full array's largest magnitude."""
        stats = self.meta["arrays"][name]
        assert list(value.shape) == stats["shape"], f"{name}: {tuple(value.shape)} instead of {stats['shape']}"
        part = value.detach().double()[tuple(slice(None, None, step) for step in stats["step"])]
        return float((part - self[name].double()).abs().max() / stats["absmax"])

    def model(self, attention: str = "causal") -> Tokenizer:
        """The tokenizer with the generated weights, in eval mode."""
        args = self.manifest["args"]
        config = preset(
            PRESETS[args["model"]],
            image_size=args["img_size"],
            embed_dim=args["embed_dim"],
            codebook_size=args["vocab_size"] // args["num_codebooks"],
            attention=attention,
        )
        with torch.device("meta"):
            model = Tokenizer(config)
        model = model.to_empty(device="cpu")
        model.load_state_dict(self.state, assign=True)  # models of one size share the generated tensors
        return model.eval()

    @functools.cached_property
    def state(self) -> dict[str, torch.Tensor]:
        return {t["key"]: torch.from_numpy(weight(t["key"], tuple(t["shape"]))) for t in self.manifest["tensors"]}
