"""What a training run is made of: one flat dataclass, read from TOML, changed by `--key=value`.

A file may name a `base` whose values it starts from; its tables only group keys for the reader. A key that is not a
field, a value of the wrong type, and a base that is not there are errors.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. Weights of losses are 0 to leave a term out; steps are optimiser steps."""

    # what is trained
    preset: str = "tiny"
    model: dict = dataclasses.field(default_factory=dict)  # fields of TokenizerConfig to change
    init: str = ""  # weights to start from: a model name, directory or .safetensors file
    start: str = ""  # or pca: the transform codec of train/start.py, fitted to the first samples
    start_patches: int = 262_144  # that it is fitted to, about
    # data
    data: str = ""  # folder, manifest, tar, or several joined by commas
    include: str = ""  # pattern of the names of inputs to take, relative to theirs, e.g. "train/*"; "" takes all
    split: str = "train"  # rows of a manifest with another split are left out; "" takes all
    weights_ok: bool = False  # only rows whose licence lets weights made from them be published
    size: int = 256  # pixels a side
    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the area a random crop keeps
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width over height of that share
    grayscale: float = 0.1  # probability
    caption: str = "caption"  # column of the text; "modality" reads "A {modality} image"
    balance: float = 0.0  # 0: every image alike; 1: every modality alike; 0.5: by the square root
    workers: int = 2  # processes that read; 0: none beside this one
    check: str = "read"  # before the first step: read every image once, or only "open" it (header and size)
    cache: bool = False  # keep what was read in memory, in each process that reads
    # objectives
    l1: float = 0.2
    l2: float = 1.0
    log_l2: float = 0.0  # of each image, so that easy images count as hard ones do
    ssim: float = 0.0  # weight of 1 - SSIM
    perceptual: float = 1.0
    perceptual_net: str = "lpips-vgg16"  # lpips-vgg16 | stlpips-alexnet | stlpips-vgg16
    perceptual_weights: str = ""  # file of the VGG16 backbone, where the net needs one
    vq: float = 1.0
    entropy: float = 0.0  # weight of ops.vq_entropy inside the vq term
    entropy_temperature: float = 0.01
    adversarial: float = 0.4
    adversarial_start: int = 0  # step of the first discriminator update
    adversarial_ramp: int = 2000  # steps over which its loss fades in
    adversarial_fade: int = 4000  # steps over which the blur of its augmentation fades out
    consistency: float = 4.0
    discriminator: str = "dinov2-s"  # dinov2-s | efficientnet-lite0
    discriminator_weights: str = ""
    contrastive: float = 0.1
    target: str = "image"  # what images are aligned with: image (stage 1) | text (stage 2)
    teacher: str = "biomedclip"  # biomedclip | offline | timm:NAME | hf:NAME
    teacher_weights: str = ""
    teacher_view: str = (
        "crop"  # the vision teacher sees the model's crop | the whole picture, once, and keeps its features
    )
    heads_only: bool = False  # train the alignment heads alone, on whole pictures; all else stays as it is
    codebook_update: str = "gradient"  # gradient | ema | frozen
    revive: bool = False  # move dead codes onto recent rows
    # optimiser
    lr: float = 5e-4
    encoder_lr: float = 1.0  # share of lr for all that makes tokens, up to the quantiser; 0 keeps it as it is
    ends_lr: float = 1.0  # share of lr for the patch maps of a model with ends="patches"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.02
    clip: float = 10.0
    warmup: int = 650
    final_lr: float = 0.1  # share of lr at the end of the cosine
    disc_lr: float = 2e-5
    disc_betas: tuple[float, float] = (0.5, 0.9)
    disc_weight_decay: float = 0.2
    disc_warmup: int = 2000
    # run
    steps: int = 100_000
    batch: int = 512  # images a step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches a step
    precision: str = "bf16"  # fp32 | tf32 | bf16 | fp16; bottlenecks, quantiser and losses stay fp32
    drop_path: float = 0.0  # rate of stochastic depth at the last block, growing linearly from 0 at the first
    checkpointing: bool = False  # recompute activations in the backward pass
    sharded: bool = False  # spread the blocks' weights, gradients and moments over the processes (FSDP2)
    ema: float = 0.0  # decay of the average of the weights; 0: none
    seed: int = 0
    save_every: int = 1000
    keep: int = 3
    log_every: int = 10
    sheet_every: int = 1000
    store: str = "float32"  # float32 | float16: how the final weights are written
    track: str = ""  # beside log.csv: tensorboard, wandb, or both joined by a comma

    def __post_init__(self):
        checks = {
            "steps": self.steps >= 1,
            "accumulate": self.accumulate >= 1,
            "batch": self.batch >= 1 and self.batch % max(self.accumulate, 1) == 0,
            "size": self.size >= 16 and self.size % 16 == 0,
            "target": self.target in ("image", "text"),
            "teacher_view": self.teacher_view in ("crop", "whole"),
            "check": self.check in ("read", "open"),
            "precision": self.precision in ("fp32", "tf32", "bf16", "fp16"),
            "keep": self.keep >= 1,
            "store": self.store in ("float32", "float16"),
            "save_every": self.save_every >= 1,
            "log_every": self.log_every >= 1,
            "sheet_every": self.sheet_every >= 1,
            "workers": self.workers >= 0,
            "start_patches": self.start_patches >= 1,
            "crop_scale": 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1,
            "crop_ratio": 0 < self.crop_ratio[0] <= self.crop_ratio[1],
            "grayscale": 0 <= self.grayscale <= 1,
            "lr": self.lr >= 0,
            "disc_lr": self.disc_lr >= 0,
            "betas": all(0 <= beta < 1 for beta in self.betas),
            "disc_betas": all(0 <= beta < 1 for beta in self.disc_betas),
            "eps": self.eps > 0,
            "clip": self.clip > 0,
            "ema": 0 <= self.ema < 1,
            "drop_path": 0 <= self.drop_path < 1,
            "sharded": not (self.sharded and self.precision == "fp16"),
            "balance": 0 <= self.balance <= 1,
            "heads_only": not self.heads_only or (self.contrastive > 0 and not self.adversarial),
            "start": self.start in ("", "pca") and not (self.start and self.init),
        }
        wrong = [name for name, good in checks.items() if not good]
        if wrong:
            raise UsageError(
                f"config: {wrong[0]} = {getattr(self, wrong[0])!r} makes no sense; see meditok/train/config.py"
            )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def record(self) -> dict:
        """The settings as files tell them: without those that name files, which may be called after people.

        Which images a run is trained on is told by the hash of their list.
        """
        return {key: value for key, value in self.to_dict().items() if key not in PATHS}


PATHS = ("data", "include", "init", "perceptual_weights", "discriminator_weights", "teacher_weights")
# Settings that change nothing about the weights: a run may go on with others.
FREE = ("keep", "log_every", "sheet_every", "workers", "save_every", "check", "track", "cache")
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
TYPES = typing.get_type_hints(TrainConfig)


def bundled_configs() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def load_config(name: str, changes: typing.Iterable[str] = ()) -> TrainConfig:
    """The config of a path or a bundled name, with `key=value` changes. UsageError as the module says."""
    values = _read(name)
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator:
            raise UsageError(f"--{change}: write --key=value")
        values[_field(key, "the command line")] = _parse(key, text)
    return TrainConfig(**{key: _typed(key, value, name) for key, value in values.items()})


def _read(name: str, seen: tuple[str, ...] = ()) -> dict:
    path = CONFIGS / f"{name}.toml" if name in bundled_configs() else Path(name)
    if not path.is_file():
        raise UsageError(f"config {name!r}: neither a file nor one of {', '.join(bundled_configs())}")
    if name in seen:
        raise UsageError(f"config {name!r}: its base leads back to itself")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"config {path}: not TOML ({error})") from None
    base = table.pop("base", None)
    values = {} if base is None else _read(_base(base, path), (*seen, name))
    for key, value in table.items():
        grouped = isinstance(value, dict) and TYPES.get(key) is not dict
        for inner, content in (value if grouped else {key: value}).items():
            values[_field(inner, str(path))] = content
    return values


def _base(base: str, path: Path) -> str:
    return base if base in bundled_configs() else str(path.parent / base)


def _field(key: str, where: str) -> str:
    name = key.replace("-", "_")
    if name not in FIELDS:
        close = ", ".join(sorted(FIELDS, key=lambda known: -_common(known, name))[:3])
        raise UsageError(f"{where}: there is no setting {key}; near it: {close}")
    return name


def _common(a: str, b: str) -> float:
    import difflib

    return difflib.SequenceMatcher(None, a, b).ratio()


def _parse(key: str, text: str) -> object:
    """A value from the command line: JSON where it is one, else the text itself."""
    if TYPES[_field(key, "the command line")] is str:
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _typed(key: str, value: object, where: str) -> object:
    wanted = TYPES[key]
    kind = typing.get_origin(wanted) or wanted
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple and isinstance(value, (list, tuple)) and len(value) == len(typing.get_args(wanted)):
        return tuple(float(part) for part in value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    name = wanted if isinstance(wanted, types.GenericAlias) else kind.__name__
    raise UsageError(f"config {where}: {key} = {value!r} should be {name}")
