"""BERT encoder (Devlin et al. 2019) with the parameter names of Hugging Face's `BertModel`, and its tokenizer.

Sizes are read off the weights: MiniLM-L6 and PubMedBERT are the same network.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from .._lazy import require
from ..errors import BadInputError, MissingPartError
from .frozen import Frozen, load_exactly

EPS = 1e-12
UNUSED = ("pooler.", "embeddings.position_ids")  # of published files: the pooler is not used here


class Attention(nn.Module):
    """Self-attention, output projection, residual and norm: (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=EPS)})

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # mask (B, 1, 1, N), True = attend
        q, k, v = (self.self[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in self.self)
        y = ops.attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.output["LayerNorm"](x + self.output["dense"](y))


class Layer(nn.Module):
    """Post-norm block, (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width), "LayerNorm": nn.LayerNorm(width, eps=EPS)})

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, mask)
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + y)


class Bert(Frozen):
    """Token ids (B, N) int64 and their mask (B, N) bool to hidden states (B, N, width)."""

    def __init__(self, vocabulary: int, positions: int, kinds: int, width: int, heads: int, depth: int, hidden: int):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, width),
                "position_embeddings": nn.Embedding(positions, width),
                "token_type_embeddings": nn.Embedding(kinds, width),
                "LayerNorm": nn.LayerNorm(width, eps=EPS),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(width, heads, hidden) for _ in range(depth))})

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tables = self.embeddings
        x = tables["word_embeddings"](ids) + tables["position_embeddings"].weight[: ids.shape[1]]
        x = tables["LayerNorm"](x + tables["token_type_embeddings"].weight[0])
        for layer in self.encoder["layer"]:
            x = layer(x, mask[:, None, None])
        return x


def bert_from_state(state: dict[str, torch.Tensor], where, what: str, head_width: int = 64) -> Bert:
    """The frozen encoder whose weights `state` holds; BadInputError where they are not one."""
    tables = [f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    first = "encoder.layer.0.intermediate.dense.weight"
    if missing := [key for key in (*tables, first) if key not in state]:
        raise BadInputError(f"{where}: not {what}: no {', '.join(missing)} among its {len(state)} tensors")
    (vocabulary, width), (positions, _), (kinds, _) = (state[key].shape for key in tables)
    depth = len({m[1] for m in (re.match(r"encoder\.layer\.(\d+)\.", key) for key in state) if m})
    if width % head_width:
        raise BadInputError(f"{where}: not {what}: width {width} is no multiple of the head width {head_width}")
    model = Bert(vocabulary, positions, kinds, width, width // head_width, depth, state[first].shape[0])
    return load_exactly(model, state, where, what, ignore=UNUSED).freeze()


class WordPiece:
    """Texts to padded ids, by the tokenizer.json or vocab.txt (uncased) of `folder`; needs the package tokenizers."""

    def __init__(self, folder: Path, longest: int, what: str):
        tokenizers = require("tokenizers", f"the text side of {what}")
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.txt").is_file():
            self.tokenizer = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
        else:
            raise MissingPartError(
                f"{what}: neither tokenizer.json nor vocab.txt in {folder}; put the text model's tokenizer there"
            )
        self.tokenizer.enable_truncation(longest)
        self.tokenizer.enable_padding()  # with id 0, [PAD]

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids (B, N) int64, mask (B, N) bool), N the longest text's number of tokens."""
        encoded = self.tokenizer.encode_batch([" ".join(text.split()) for text in texts])
        mask = torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)
        return torch.tensor([e.ids for e in encoded], dtype=torch.int64), mask
