"""What a tokenizer is made of, and the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..errors import BadInputError, UsageError

INTENDED_USE = "research use, not a medical device"
PATCH = 16  # pixels a token covers along each side: stem 2 x two stages 2 x strided convolution 2


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a MedITok tokenizer; widths in channels, depths in blocks. Stored in every checkpoint's header."""

    name: str = "vitamin-large"
    image_size: int = 256  # pixels a side the weights were trained at; any multiple of 16 works
    stem_width: int = 160
    stage_widths: tuple[int, int] = (160, 320)
    stage_depths: tuple[int, int] = (2, 4)
    width: int = 1024
    encoder_depth: int = 31
    decoder_depth: int = 31
    decoder_widths: tuple[int, int] = (320, 160)
    decoder_depths: tuple[int, int] = (4, 2)
    expansion: int = 4  # hidden width of the convolution blocks over their output width
    ends: str = "stages"  # from pixels and back: ViTamin's convolution stages | patches (models/patches.py)
    overlap: int = 0  # patches: pixels that the linear map reaches beyond its patch on each side
    grid_depth: int = 0  # patches: convolution blocks on the token grid at each end
    num_codebooks: int = 8
    codebook_size: int = 4096
    code_dim: int = 8
    projection: str = "attention"  # how the width changes around the quantiser: attention | linear
    attention: str = "causal"  # within that projection: causal (MedITok) | full (UniTok)
    embed_dim: int = 768  # width of the text-aligned space; 0: the model has no such head
    text_teacher: str = ""  # frozen text tower that space was aligned with, as teachers.load_text names it
    text_width: int = 0  # width of its features; 0: the model holds no way from texts to that space
    commitment_weight: float = 0.25
    drop_path: float = 0.0
    licence: str = "unstated"
    intended_use: str = INTENDED_USE

    def __post_init__(self):
        for name in ("stage_widths", "stage_depths", "decoder_widths", "decoder_depths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON brings lists
        if self.projection not in ("attention", "linear") or self.attention not in ("causal", "full"):
            raise BadInputError(
                f"model description {self.name}: projection={self.projection!r}, "
                f"attention={self.attention!r}; expected attention|linear and causal|full"
            )
        if self.ends not in ("stages", "patches") or not 0 <= self.overlap <= PATCH // 2:
            raise BadInputError(
                f"model description {self.name}: ends={self.ends!r}, overlap={self.overlap}; "
                f"expected stages|patches and 0 to {PATCH // 2} pixels"
            )
        if self.image_size < PATCH or self.image_size % PATCH:
            raise BadInputError(
                f"model description {self.name}: image_size {self.image_size} is not a positive multiple of {PATCH}"
            )
        if self.width % 64:
            raise BadInputError(
                f"model description {self.name}: width {self.width} is not a multiple of the head width 64"
            )

    @property
    def heads(self) -> int:
        """Attention heads of every block; a head is 64 wide in the whole family."""
        return self.width // 64

    @property
    def code_width(self) -> int:
        """Channels of the quantised representation, all codebooks together."""
        return self.num_codebooks * self.code_dim

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> TokenizerConfig:
        """Inverse of to_dict; a field this version does not know is refused (BadInputError)."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise BadInputError(
                f"model description: unknown fields {', '.join(unknown)}; made by a newer meditok? upgrade"
            )
        return cls(**values)


PRESETS = {
    "vitamin-small": TokenizerConfig(
        "vitamin-small",
        stem_width=64,
        stage_widths=(64, 128),
        width=384,
        encoder_depth=14,
        decoder_depth=14,
        decoder_widths=(128, 64),
    ),
    "vitamin-base": TokenizerConfig(
        "vitamin-base",
        stem_width=128,
        stage_widths=(128, 256),
        width=768,
        encoder_depth=14,
        decoder_depth=14,
        decoder_widths=(256, 128),
    ),
    "vitamin-large": TokenizerConfig("vitamin-large"),
    "tiny": TokenizerConfig(
        "tiny",
        width=256,
        encoder_depth=1,
        decoder_depth=3,
        expansion=3,
        ends="patches",
        overlap=4,
        grid_depth=1,
        embed_dim=0,
        licence="Apache-2.0",
    ),
}


def preset(name: str, **changes) -> TokenizerConfig:
    """The named preset, with fields replaced by `changes`. UsageError for an unknown name or field."""
    if name not in PRESETS:
        raise UsageError(f"preset {name!r}: unknown; choose one of {', '.join(PRESETS)}")
    try:
        return dataclasses.replace(PRESETS[name], **changes)
    except TypeError as error:
        raise UsageError(f"preset {name!r}: {error}") from None
