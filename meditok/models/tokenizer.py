"""The MedITok tokenizer: images to discrete tokens and back (arXiv 2505.19225)."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import MissingPartError, UsageError
from ..nn.blocks import EPS, BottleneckBlock
from ..nn.linear import Linear
from ..nn.quantizer import MultiCodebookQuantizer
from ..nn.versions import version
from ..ops.linear import fused
from .checks import as_ids, as_images, is_described, square_grid
from .config import PATCH, TokenizerConfig
from .graphs import GraphCache
from .precision import precision_scope
from .vitamin import Decoder, Encoder, init_weights

if TYPE_CHECKING:
    from ..data import MedicalImage, Processor
    from ..tokens import Tokens

STABLE_CHUNK = {
    "cpu": 1,
    "cuda": 16,
}  # images per pass in stable mode: fixed, so that no result depends on the batch


class TrainingOutput(NamedTuple):
    """What a training step needs of one forward pass."""

    reconstruction: torch.Tensor  # (B, 3, H, W), unclamped
    ids: torch.Tensor  # (B, G, N) int64
    vq_loss: torch.Tensor  # () float32
    usage: torch.Tensor  # () float32, per cent of codes in use
    features: torch.Tensor | None  # (B, E), unit length; None without an alignment head
    logit_scale: torch.Tensor | None  # (), exponentiated


class Tokenizer(nn.Module):
    """ViTamin encoder, bottleneck, eight cosine codebooks, bottleneck, ViTamin decoder.

    Shapes: images (B, 3, H, W) float in [-1, 1], H and W multiples of 16; tokens (B, G, N) int64,
    N = (H/16) * (W/16) in raster order. State-dict keys are those of the published checkpoints.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.precision = "fp32"
        self.graphs: GraphCache | None = None  # set one to replay repeated shapes on CUDA as graphs
        if config.embed_dim:
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.encoder = Encoder(config)
        self.quant_proj = self._projection(config.width, config.code_width)
        self.quantizer = MultiCodebookQuantizer(
            config.num_codebooks, config.codebook_size, config.code_dim, config.commitment_weight
        )
        self.post_quant_proj = self._projection(config.code_width, config.width)
        self.decoder = Decoder(config)
        if config.embed_dim:
            self.fc_norm = nn.LayerNorm(config.width, eps=EPS)
            self.projection = nn.Linear(config.width, config.embed_dim)
        self.text_weights = ""  # file of the text tower, where it is not one that a package ships
        self._tower: tuple = None, None  # (file it was read from, frozen text tower): no submodule, it is not saved
        if config.text_width:
            self.text_fc_norm = nn.LayerNorm(config.text_width, eps=EPS)
            self.text_projection = nn.Linear(config.text_width, config.embed_dim)

    def _projection(self, in_width: int, out_width: int) -> nn.Module:
        if self.config.projection == "linear":
            return Linear(in_width, out_width)
        block = BottleneckBlock(in_width, out_width, self.config.heads, causal=self.config.attention == "causal")
        return block.apply(init_weights)

    # -- the chain, stage by stage -------------------------------------------------------------------------------
    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, N, width) float32"""
        with precision_scope(images.device, self.precision):
            return self.encoder(images).float()

    def _code(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> (B, N, G*C), not yet normalised; float32 whatever the precision."""
        with precision_scope(hidden.device, "fp32"):
            return self.quant_proj(hidden)

    def _post(self, code: torch.Tensor) -> torch.Tensor:
        """(B, N, G*C) -> (B, N, width) float32"""
        with precision_scope(code.device, "fp32"):
            return self.post_quant_proj(code)

    def _decode(self, post: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, width) -> (B, 3, 16h, 16w) float32, unclamped"""
        with precision_scope(post.device, self.precision):
            return self.decoder(post, grid).float()

    def forward(self, images: torch.Tensor) -> TrainingOutput:
        """Training pass over images (B, 3, H, W) in [-1, 1]."""
        grid = images.shape[-2] // PATCH, images.shape[-1] // PATCH
        quantized = self.quantizer(self._code(self._encode(images)))
        post = self._post(quantized.z)
        features = scale = None
        if self.config.embed_dim:
            features, scale = self.aligned(post.mean(1)), self.logit_scale.exp()
        return TrainingOutput(self._decode(post, grid), quantized.ids, quantized.loss, quantized.usage, features, scale)

    # -- public calls --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def tokenize(self, images: torch.Tensor, *, stable: bool = False) -> torch.Tensor:
        """Images (B, 3, H, W) float in [-1, 1] to tokens (B, G, N) int64.

        `stable` computes in chunks of fixed size, so that an image's tokens do not depend on its batch.
        ShapeError: H or W no multiple of 16, or not three channels; DtypeError: integers other than uint8 (read as
        0..255), or values outside [-1, 1]; NonFiniteError.
        """
        images = as_images(images, self.device)
        return self._in_chunks("tokenize", lambda x: self.quantizer.assign(self._code(self._encode(x))), images, stable)

    @torch.no_grad()
    def detokenize(
        self, tokens: torch.Tensor | Tokens, grid: tuple[int, int] | None = None, *, stable: bool = False
    ) -> torch.Tensor:
        """Tokens (B, G, N) to images (B, 3, 16h, 16w) float32 in [-1, 1]; grid=(h, w) is needed where N is no square.

        TokenShapeError: another rank, number of codebooks or grid; TokenRangeError: ids outside 0..K-1;
        CodebookMismatchError: Tokens made with another codebook.
        """
        if grid is None and is_described(tokens):
            grid = tokens.info.grid
        tokens = as_ids(tokens, self)
        grid = square_grid(tokens.shape[2], grid)
        return self._in_chunks(
            f"detokenize {grid}",
            lambda t: self._decode(self._post(self.quantizer.lookup(t)), grid).clamp(-1, 1),
            tokens,
            stable,
        )

    def reconstruct(self, images: torch.Tensor, *, stable: bool = False) -> torch.Tensor:
        """detokenize(tokenize(images)), bit for bit; (B, 3, H, W) float32 in [-1, 1]."""
        tokens = self.tokenize(images, stable=stable)
        return self.detokenize(tokens, (images.shape[2] // PATCH, images.shape[3] // PATCH), stable=stable)

    @torch.no_grad()
    def lookup(self, tokens: torch.Tensor | Tokens) -> torch.Tensor:
        """Normalised code vectors (B, N, G*C) float32 of tokens (B, G, N); errors as in detokenize."""
        return self.quantizer.lookup(as_ids(tokens, self))

    @torch.no_grad()
    def latents(self, x: torch.Tensor | Tokens, stage: str = "encoder") -> torch.Tensor:
        """Hidden states of images (B, 3, H, W) or tokens (B, G, N).

        stage "encoder": (B, N, width), images only; "code": (B, N, G*C), the chosen unit rows; "post": (B, N, width),
        what the decoder receives. UsageError for another stage, or for the encoder's states of tokens.
        """
        if stage not in ("encoder", "code", "post"):
            raise UsageError(f"latents: stage {stage!r} is unknown; choose encoder, code or post")
        if is_described(x) or getattr(x, "ndim", 4) == 3:
            if stage == "encoder":
                raise UsageError("latents: tokens hold no encoder states; give images, or stage 'code' or 'post'")
            tokens = as_ids(x, self)
        elif stage == "encoder":
            return self._encode(as_images(x, self.device))
        else:
            tokens = self.tokenize(x)
        code = self.quantizer.lookup(tokens)
        return code if stage == "code" else self._post(code)

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, E) of images (B, 3, H, W) in the text-aligned space, taken after quantisation.

        MissingPartError where the model was made without an alignment head.
        """
        if not self.config.embed_dim:
            raise MissingPartError(
                f"embed: model {self.config.name} has no text-aligned space (embed_dim 0); "
                "use features(), or load a model trained with alignment"
            )
        post = self.latents(images, "post")
        return self.aligned(post.mean(1))

    def aligned(self, pooled: torch.Tensor) -> torch.Tensor:
        """Mean decoder inputs (B, width) to unit vectors (B, E) of the text-aligned space."""
        return F.normalize(self.projection(self.fc_norm(pooled)), dim=-1)

    @torch.no_grad()
    def embed_text(self, text: list[str]) -> torch.Tensor:
        """Unit vectors (B, E) of texts, in the space of `embed`: the frozen text tower that stage 2 aligned with, then
        the head trained there. The tower is read at the first call; one that no package ships needs its file's path in
        `text_weights`. MissingPartError: the model was not aligned with texts, or the tower is not here.
        """
        if not self.config.text_width:
            raise MissingPartError(
                f"embed_text: model {self.config.name} holds no text tower; only images can be embedded"
            )
        if isinstance(text, str):
            raise UsageError("embed_text: one string given; give a list of strings")
        if not text:
            return torch.zeros(0, self.config.embed_dim, device=self.device)
        features = self._text_tower()(list(text))
        return F.normalize(self.text_projection(self.text_fc_norm(features)), dim=-1)

    def _text_tower(self):
        from .teachers import load_text

        path, tower = self._tower
        if tower is None or path != self.text_weights:
            passed = "--text-weights=FILE, or set text_weights of the model"
            tower = load_text(self.config.text_teacher, self.text_weights, passed)
        self._tower = self.text_weights, tower.to(self.device)
        return tower

    @torch.no_grad()
    def features(self, x: torch.Tensor | Tokens | MedicalImage | list[MedicalImage]) -> torch.Tensor:
        """Mean token (B, width): the encoder's of images (B, 3, H, W), the decoder's input of Tokens.

        Of Tokens and MedicalImages (fitted by `processor` first) only positions that are not padding count.
        """
        from ..data.fit import unpadded_mask

        if hasattr(x, "ndim"):
            return self.latents(x, "encoder").mean(1)
        if is_described(x):
            hidden, geometries, (rows, columns) = self.latents(x, "post"), [row.geometry for row in x.rows], x.info.grid
        else:
            batch = self.processor(x)
            hidden, geometries = self.latents(batch["pixel_values"], "encoder"), batch["geometry"]
            rows, columns = (side // PATCH for side in batch["pixel_values"].shape[-2:])
        weights = hidden.new_ones(hidden.shape[:2])  # (B, N)
        for weight, geometry in zip(weights, geometries, strict=True):
            if geometry is not None:  # generated tokens have no source that could have been padded
                weight.copy_(unpadded_mask(geometry, rows * PATCH, columns * PATCH, PATCH).flatten())
        return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)

    def _in_chunks(
        self, call: str, run: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, stable: bool
    ) -> torch.Tensor:
        if self.graphs is not None:
            run = functools.partial(self.graphs, (call, self.precision, self._versions()), run)
        if not stable or not len(batch) or self._any_batch_is_stable():
            return run(batch)
        size = STABLE_CHUNK.get(batch.device.type, 1)
        parts = []
        for chunk in batch.split(size):
            padded = torch.cat([chunk, chunk[:1].expand(size - len(chunk), *chunk.shape[1:])])
            parts.append(run(padded)[: len(chunk)])
        return torch.cat(parts)

    def _any_batch_is_stable(self) -> bool:
        """Whether an image's result is the same bits in any batch, so that stable mode need not cut batches up.

        In float32 on a CPU our kernels, norms and element-wise sums treat every row alike wherever it stands, and what
        is left to PyTorch's convolutions and products takes one image at a time (plan.py). Ranges of int8, PyTorch's
        own products and compiled graphs depend on the batch.
        """
        return self.precision == "fp32" and fused(self.codebook) and not torch.compiler.is_compiling()

    # -- description ---------------------------------------------------------------------------------------------
    @property
    def codebook(self) -> torch.Tensor:
        """(G, K, C) float32, rows as stored (not normalised)."""
        return self.quantizer.codebook.detach()

    @property
    def device(self) -> torch.device:
        return self.quantizer.codebook.device

    @property
    def processor(self) -> Processor:
        """Fits images to this model and undoes it."""
        from ..data import Processor

        return Processor(size=self.config.image_size, multiple=PATCH)

    @property
    def codebook_hash(self) -> str:
        """64 hex digits: SHA-256 of the codebook's float32 values. Tokens decode only with the same codebook."""
        return hashlib.sha256(_bytes(self.codebook)).hexdigest()

    def _versions(self) -> tuple:
        return tuple(version(p) for p in (*self.parameters(), self.quantizer.codebook))  # perhaps no parameter

    @property
    def hash(self) -> str:
        """64 hex digits: SHA-256 of every weight (no statistics, no training state) and what changes the arithmetic.

        Kept until a weight changes. Writes that nothing counts (through `.data`: averaged weights) show in the sums.
        """
        weights = {
            key: value.detach()
            for key, value in sorted(self.state_dict().items())
            if not (key.endswith("vocab_usage") or key.startswith("quantizer.state."))
        }
        sums = torch.stack([weight.sum().float() for weight in weights.values()]).tolist()
        seen = self._versions(), repr(sums)  # as text NaN equals itself
        if getattr(self, "_hash", (None,))[0] != seen:
            arithmetic = {"projection": self.config.projection, "attention": self.config.attention}
            digest = hashlib.sha256(json.dumps(arithmetic, sort_keys=True).encode())
            for key, value in weights.items():
                digest.update(f"{key}{tuple(value.shape)}".encode())
                digest.update(_bytes(value))
            self._hash = seen, digest.hexdigest()
        return self._hash[1]

    def save_pretrained(self, directory) -> None:
        """Write config.json, model.safetensors, preprocessor_config.json and README.md into a directory."""
        from .files import save_pretrained

        save_pretrained(self, directory)

    @classmethod
    def from_pretrained(
        cls, name, *, revision: str | None = None, local_files_only: bool = False, device="auto"
    ) -> Tokenizer:
        """Load a directory written by save_pretrained, or a Hugging Face repository (extra `hub`)."""
        from .files import from_pretrained

        return from_pretrained(name, revision=revision, local_files_only=local_files_only, device=device)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().float().cpu().contiguous().numpy()).cast("B")
