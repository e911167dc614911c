"""The text side of an aligned model: its own, or the teacher and the trained head in the folder it was trained in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import BadInputError, MissingPartError
from ..models.files import weights_path
from ..models.frozen import Frozen
from ..models.teachers import TextTeacher, load_text
from ..models.tokenizer import Tokenizer
from ..train.checkpoint import existing
from .text import Embed

HEAD = ("text_fc_norm.weight", "text_fc_norm.bias", "text_projection.weight", "text_projection.bias")


class TextTower(Frozen):
    """A frozen text teacher and the head that stage 2 trained on it: B texts to (B, E) unit vectors."""

    def __init__(self, teacher: TextTeacher, head: dict[str, torch.Tensor]):
        super().__init__()
        width, out = head["text_projection.weight"].shape[::-1]
        self.teacher = teacher
        self.text_fc_norm, self.text_projection = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, out)
        for name, value in head.items():
            self.get_parameter(name).data.copy_(value)
        self.freeze()

    @torch.no_grad()
    def forward(self, texts: list[str]) -> torch.Tensor:
        return F.normalize(self.text_projection(self.text_fc_norm(self.teacher(texts))), dim=-1)


def text_side(model: Tokenizer, name: str) -> Embed:
    """What embeds texts for the model of that name: model.embed_text, else the last checkpoint beside its weights.

    MissingPartError: the model has no aligned space, or there is neither; BadInputError: a damaged checkpoint.
    """
    if not model.config.embed_dim:
        raise MissingPartError(
            f"model {model.config.name}: has no text-aligned space (embed_dim 0); zero-shot and retrieval need a model "
            "whose stage 2 was trained"
        )
    try:
        model.embed_text([""])
        return model.embed_text
    except MissingPartError as missing:
        folders = existing(weights_path(name).parent)
        if not folders:
            raise MissingPartError(
                f"model {model.config.name}: holds no text tower, and no checkpoints/ of its training lie beside its "
                "weights; give the folder that meditok train wrote"
            ) from missing
    return tower_of(folders[-1]).to(model.device)


def tower_of(checkpoint: Path) -> TextTower:
    """The text tower in a training checkpoint. MissingPartError: trained against images, or its teacher is not here."""
    try:
        config = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["config"]
        target, teacher, weights = (config[key] for key in ("target", "teacher", "teacher_weights"))
        with safe_open(checkpoint / "state.safetensors", framework="pt") as file:
            keys = set(file.keys())
            # The exported weights are the average where one was kept.
            prefix = "average." if f"average.{HEAD[0]}" in keys else "module.generator."
            head = {key: file.get_tensor(prefix + key).float() for key in HEAD if prefix + key in keys}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadInputError(
            f"{checkpoint}: the checkpoint cannot be read ({type(error).__name__}); train again, or use another"
        ) from None
    if target != "text" or set(head) != set(HEAD):
        raise MissingPartError(f"{checkpoint}: was not aligned with texts (target {target!r}); stage 2 is needed")
    return TextTower(load_text(teacher, weights), head)
