"""Published checkpoints to safetensors: the one place of the package that unpickles, and only plain tensors.

Three layouts are read (MedITok commit d5479ca, UniTok commit bb8012e8): a bare state dict, MedITok's training file
(`trainer.model`, keys prefixed `core.`) and UniTok's training file (`trainer.unitok`).
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from ..errors import BadInputError, MissingPartError, UnsafeFileError, UsageError
from .config import TokenizerConfig
from .files import abridged, model_from_state, write_model

MIN_TORCH = (2, 10)  # older ones have advisories on torch.load even with weights_only=True
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel's and torch.compile's
_MAGIC = (b"PK", b"\x80")  # zip archive, as torch.save writes now; pickle, as it did before
_TEACHER = ("text_encoder.", "text_fc_norm.", "text_projection.")
_KIND_ATTENTION = {"training": "causal", "unitok": "full", "bare": "causal"}


def convert(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    attention: str | None = None,
    name: str | None = None,
    licence: str = "unstated",
) -> Path:
    """Read a published checkpoint and write it as safetensors with the description in its header.

    attention: "causal" (MedITok) or "full" (UniTok); needed only where the file does not tell them apart, which is a
    bare state dict: there MedITok is assumed. UnsafeFileError: content other than plain tensors, or a damaged pickle;
    MissingPartError: torch below 2.10; BadInputError: not a tokenizer, or odd shapes; UsageError: `out` exists.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.suffix != ".safetensors":
        raise UsageError(f"{out}: the output must end in .safetensors")
    if out.exists():
        raise UsageError(f"{out}: exists already; name another file or remove it")
    kind, state, arguments = split_layout(read_checkpoint(checkpoint), checkpoint)
    config = infer_config(
        state,
        checkpoint,
        image_size=int(arguments.get("img_size", 256)),
        attention=attention or _KIND_ATTENTION[kind],
        name=name or checkpoint.stem,
        licence=licence,
    )
    return write_model(model_from_state(config, state, str(checkpoint)), out)


def read_checkpoint(path: Path) -> dict:
    """The pickled mapping in a .pth file, tensors on the CPU; only plain tensors and containers are let through."""
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH:
        raise MissingPartError(
            f"convert: torch {torch.__version__} has known holes in its checkpoint reader; "
            f"install torch >= {'.'.join(map(str, MIN_TORCH))}"
        )
    if not path.is_file():
        raise BadInputError(f"{path}: no such file; give the published .pth checkpoint")
    with path.open("rb") as file:
        if not file.read(2).startswith(_MAGIC):
            raise BadInputError(f"{path}: not a PyTorch checkpoint; give the published .pth file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on pickle protocols; what cannot be read raises
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise BadInputError(f"{path}: cannot be read ({what}), cut or damaged; get the file again") from None
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        text = str(error) or type(error).__name__
        found = re.search(r"GLOBAL (\S+)", text)
        what = f"it needs {found[1]}" if found else text.splitlines()[0][:120]
        raise UnsafeFileError(
            f"{path}: not a checkpoint of plain tensors ({what}); nothing was run or loaded, "
            "get the file again from its publisher"
        ) from None
    if not isinstance(content, dict):
        raise BadInputError(
            f"{path}: holds a {type(content).__name__}, not a state dict; give the tokenizer's checkpoint"
        )
    return content


def split_layout(content: dict, path: Path) -> tuple[str, dict[str, torch.Tensor], dict]:
    """(layout "bare" | "training" | "unitok", bare state dict, options the file records)."""
    arguments = content.get("args") or {}
    trainer = content.get("trainer")
    if not isinstance(trainer, dict):
        kind, state = "bare", content
    elif "unitok" in trainer:
        kind, state = "unitok", trainer["unitok"]
    elif "model" in trainer:
        kind, state = "training", trainer["model"]
    else:
        raise BadInputError(f"{path}: its 'trainer' holds {abridged(trainer)}; expected 'model' (MedITok) or 'unitok'")
    state = {_unwrapped(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if any(key.startswith("core.") for key in state):
        kind = "training" if kind == "bare" else kind
        state = {key.removeprefix("core."): value for key, value in state.items() if key.startswith("core.")}
    state = {key: value.float() for key, value in state.items() if not key.startswith(_TEACHER)}
    return kind, state, dict(arguments) if isinstance(arguments, dict) else {}


def _unwrapped(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def infer_config(state: dict[str, torch.Tensor], where, **known) -> TokenizerConfig:
    """The sizes of the model whose weights `state` holds; `known` are fields the weights cannot tell."""

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise BadInputError(
                f"{where}: no {key!r} among its {len(state)} tensors; not a MedITok or UniTok tokenizer"
            )
        return state[key].shape

    def count(pattern: str) -> int:
        return len({m[1] for m in (re.match(pattern, key) for key in state) if m})

    if "encoder.reg_token" in state:
        raise BadInputError(f"{where}: made with register tokens (num_query > 0), which this version does not support")
    stage = "encoder.patch_embed.backbone.stages.{}.0.conv3_1x1.weight".format
    size, dim = shape("quantizer.codebooks.0.codebook.weight")
    return TokenizerConfig(
        stem_width=shape("encoder.patch_embed.backbone.stem.conv1.weight")[0],
        stage_widths=(shape(stage(0))[0], shape(stage(1))[0]),
        stage_depths=(
            count(r"encoder\.patch_embed\.backbone\.stages\.0\.(\d+)\."),
            count(r"encoder\.patch_embed\.backbone\.stages\.1\.(\d+)\."),
        ),
        width=shape("encoder.norm.weight")[0],
        encoder_depth=count(r"encoder\.blocks\.(\d+)\."),
        decoder_depth=count(r"decoder\.blocks\.(\d+)\."),
        decoder_widths=(
            shape("decoder.up_conv1.conv.weight")[0],
            shape("decoder.up_conv4.conv1.conv.weight")[0],
        ),
        decoder_depths=(count(r"decoder\.up_conv2\.(\d+)\."), count(r"decoder\.up_conv3\.(\d+)\.")),
        expansion=shape(stage(0).replace("conv3_1x1", "conv1_1x1"))[0] // shape(stage(0))[0],
        num_codebooks=count(r"quantizer\.codebooks\.(\d+)\."),
        codebook_size=size,
        code_dim=dim,
        projection="linear" if "quant_proj.weight" in state else "attention",
        embed_dim=shape("projection.weight")[0] if "projection.weight" in state else 0,
        **known,
    )
