"""Small state dicts in the published layouts of DINOv2 and BiomedCLIP, with random values."""

from __future__ import annotations

import torch


def vit(
    patch: int = 14, grid: int = 3, width: int = 64, depth: int = 12, scaled: bool = True, prefix: str = ""
) -> dict:
    """A vision transformer of one head per 64 channels; `scaled` adds DINOv2's layer scales."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        norms = {"norm1": (width,), "norm2": (width,)}
        for name, shape in (linears | norms).items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
        if scaled:
            shapes |= {f"blocks.{i}.ls1.gamma": (width,), f"blocks.{i}.ls2.gamma": (width,)}
    return {prefix + key: _values(key, shape, g) for key, shape in shapes.items()}


def bert(vocabulary: int = 30, width: int = 64, depth: int = 2, prefix: str = "text.transformer.") -> dict:
    """A BERT encoder with the names of Hugging Face's BertModel."""
    g = torch.Generator().manual_seed(1)
    tables = {"word": vocabulary, "position": 40, "token_type": 2}
    shapes = {f"embeddings.{name}_embeddings.weight": (rows, width) for name, rows in tables.items()}
    linears = {"embeddings.LayerNorm": (width,)}
    for i in range(depth):
        layer = f"encoder.layer.{i}."
        linears |= {f"{layer}attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        linears |= {f"{layer}attention.output.dense": (width, width), f"{layer}attention.output.LayerNorm": (width,)}
        linears |= {f"{layer}intermediate.dense": (4 * width, width), f"{layer}output.dense": (width, 4 * width)}
        linears |= {f"{layer}output.LayerNorm": (width,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {prefix + key: _values(key, shape, g) for key, shape in shapes.items()}


def biomedclip() -> dict:
    """All of open_clip's file: both towers, both projections, and what the teachers leave alone."""
    g = torch.Generator().manual_seed(2)
    return {
        **vit(patch=16, grid=4, depth=3, scaled=False, prefix="visual.trunk."),
        "visual.head.proj.weight": torch.randn(32, 64, generator=g),
        **bert(),
        "text.transformer.embeddings.position_ids": torch.arange(40).unsqueeze(0),
        "text.proj.0.weight": torch.randn(48, 64, generator=g) / 8,
        "text.proj.2.weight": torch.randn(32, 48, generator=g) / 8,
        "logit_scale": torch.tensor(4.4),
    }


def _values(key: str, shape: tuple, generator: torch.Generator) -> torch.Tensor:
    """About what a trained network holds: norms and scales near 1, the rest small."""
    noise = torch.randn(shape, generator=generator)
    near_one = ("norm" in key or "LayerNorm" in key or "gamma" in key) and not key.endswith("bias")
    return 1 + 0.1 * noise if near_one else noise * (0.5 if "embed" in key else 0.1)
