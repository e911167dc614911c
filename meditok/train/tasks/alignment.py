"""MedITok's two stages (arXiv 2505.19225): reconstruction with an adversary, and alignment with a frozen teacher.

Both stages are this one task; a config says what images are aligned with: the features of a frozen vision tower on the
same image (stage 1), or those of a frozen text tower on its caption (stage 2).

    generator       l1 |r - x| + l2 (r - x)^2 + log_l2 ln mean (r - x)^2 + ssim (1 - SSIM) + perceptual + vq
                    + g w adversarial + contrastive InfoNCE
    discriminator   hinge + consistency, on the reconstructions of the generator's phase
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...models.config import TokenizerConfig
from ...models.discriminator import build_discriminator
from ...models.files import build as build_model
from ...models.files import load, model_from_state, write_model
from ...models.patches import Patches, PatchesBack
from ...models.precision import check_precision
from ...models.teachers import CARDS, Card, load_text, load_vision
from ...models.tokenizer import Tokenizer, TrainingOutput
from ...objectives import adversarial, contrastive, diffaug, reconstruction
from ...objectives.perceptual import build_perceptual
from ..config import TrainConfig
from ..data import Batch, resize
from ..distributed import World
from ..optim import learning_rate, parameter_groups

HEADS = ("logit_scale", "fc_norm.", "projection.")  # of the tokenizer, towards the shared space


class Outputs(NamedTuple):
    """A training pass of the generator."""

    model: TrainingOutput | None  # None where the heads alone are trained
    features: Tensor | None  # (B, E) the model's in the shared space
    target: Tensor | None  # (B, E) the teacher's features in the shared space
    scale: Tensor | None  # () logarithm of the temperature's inverse


class Aligned(nn.Module):
    """The tokenizer and the trained head on the teacher's features: LayerNorm and a linear map to the shared space."""

    def __init__(self, tokenizer: Tokenizer, teacher_width: int):
        super().__init__()
        self.core = tokenizer
        self.aligns = teacher_width > 0
        if self.aligns:
            self.text_fc_norm = nn.LayerNorm(teacher_width, eps=1e-6)
            self.text_projection = nn.Linear(teacher_width, tokenizer.config.embed_dim)

    def forward(self, images: Tensor, teacher: Tensor | None, pooled: bool = False) -> Outputs:
        """images (B, 3, H, W) in [-1, 1], or mean decoder inputs (B, width) of them; teacher (B, teacher_width)."""
        out = None if pooled else self.core(images)
        features = self.core.aligned(images) if pooled else out.features
        if not self.aligns:
            return Outputs(out, features, None, None)
        return Outputs(out, features, self.text_projection(self.text_fc_norm(teacher)), self.core.logit_scale)


class TextHead(NamedTuple):
    """The trained way from a text tower's features to the shared space."""

    towers: tuple[str, int]  # name and width of the tower
    norm: nn.LayerNorm
    projection: nn.Linear


def take_text_head(core: Tokenizer) -> TextHead | None:
    """Remove the text head from a tokenizer that has one, and return it."""
    config = core.config
    if not config.text_width:
        return None
    head = TextHead((config.text_teacher, config.text_width), core.text_fc_norm, core.text_projection)
    del core.text_fc_norm, core.text_projection
    core.config = dataclasses.replace(config, text_teacher="", text_width=0)
    return head


def _say_what_init_decides(config: TrainConfig, found: TokenizerConfig) -> None:
    made = json.loads(json.dumps(found.to_dict()))  # tuples as lists, as a file has them
    asked = json.loads(json.dumps(config.model))
    other = [f"{key} {made[key]}, not {value}" for key, value in asked.items() if made.get(key, value) != value]
    if other:
        warnings.warn(f"the weights of --init decide the model: {'; '.join(other)}", stacklevel=2)


def drop_paths(core: Tokenizer, rate: float) -> None:
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): each side's blocks drop at rates from 0 to `rate`."""
    for blocks in (core.encoder.blocks, core.decoder.blocks):
        for place, block in enumerate(blocks):
            block.drop_path.rate = rate * place / max(len(blocks) - 1, 1)


def recompute(core: Tokenizer) -> None:
    """Keep only the inputs of each block for the backward pass, and compute the rest again there."""
    decoder = core.decoder
    for block in (*core.encoder.blocks, *decoder.blocks, *decoder.convolution_blocks()):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class Alignment:
    """The task of both stages; see train.loop.Task."""

    averaged = "generator"

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world = config, world
        torch.manual_seed(config.seed)  # heads and discriminator start alike on every rank and in every process
        core = (
            load(config.init, device="cpu")
            if config.init
            else build_model(config.preset, seed=config.seed, **config.model)
        )
        if config.init:
            _say_what_init_decides(config, core.config)
        core.precision = check_precision(config.precision, world.device)
        core.quantizer.save_state = True
        core.quantizer.revive = config.revive
        core.quantizer.entropy_weight, core.quantizer.entropy_temperature = config.entropy, config.entropy_temperature
        # From here on the state is part of checkpoints.
        core.quantizer.codebook_update = "frozen" if config.heads_only else config.codebook_update
        drop_paths(core, config.drop_path)
        if config.checkpointing:
            recompute(core)
        self.teacher = self._teacher() if config.contrastive else None
        head = take_text_head(core)  # what stage 2 trained, if `init` is its result
        generator = Aligned(core.train(), self.teacher.width if self.teacher else 0)
        if head and self._towers() == head.towers:
            generator.text_fc_norm, generator.text_projection = head.norm, head.projection
        if not self.teacher and core.config.embed_dim:  # heads that no loss reaches
            for part in (core.fc_norm, core.projection):
                part.requires_grad_(False)
            core.logit_scale.requires_grad_(False)
        if config.heads_only:
            for name, parameter in core.named_parameters():
                parameter.requires_grad_(name.startswith(HEADS))
        elif not config.encoder_lr:
            core.encoder.requires_grad_(False)
            core.quant_proj.requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"generator": generator}
        weighed = (name for name in ("l1", "l2", "vq") if getattr(config, name))
        self.terms: tuple[str, ...] = () if config.heads_only else tuple(weighed)
        self.terms += ("log_l2",) if config.log_l2 else ()
        self.terms += ("ssim",) if config.ssim else ()
        self.perceptual = None
        if config.perceptual and not config.heads_only:
            self.perceptual = build_perceptual(config.perceptual_net, config.perceptual_weights).to(world.device)
            self.terms += ("perceptual",)
        if config.contrastive:
            self.terms += ("contrastive",)
        if config.adversarial:
            discriminator = build_discriminator(config.discriminator, config.discriminator_weights)
            self.modules["discriminator"] = discriminator.train()
            self.terms += ("adversarial", "hinge", "consistency")
        self.weight = 0.0  # the adaptive one, last used
        self.usage = 0.0
        self.whole: Callable[[int], Tensor] | None = None  # the picture (3, H, W) at a place of the list of items
        self._known: dict[str | int, Tensor] = {}  # the teacher's features of captions, or of whole pictures
        self._means: dict[int, Tensor] = {}  # the model's of whole pictures
        self._pairs: list[tuple[Tensor, Tensor]] = []  # images and reconstructions of this step's micro-batches

    def _towers(self) -> tuple[str, int]:
        """Name and width of the text tower that images are aligned with; ("", 0) without one."""
        if self.teacher is None or self.config.target != "text":
            return "", 0
        return self.config.teacher, self.teacher.width

    def _teacher(self):
        load_teacher = load_vision if self.config.target == "image" else load_text
        return load_teacher(self.config.teacher, self.config.teacher_weights).to(self.world.device)

    # ---- what the loop asks --------------------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        core = self.modules["generator"].core
        return [*core.encoder.blocks, *core.decoder.blocks]

    def optimizer(self, phase: str) -> torch.optim.Optimizer:
        config = self.config
        if phase == "generator":
            ends = [part for part in self.modules[phase].modules() if isinstance(part, Patches | PatchesBack)]
            slow = [(part.proj.parameters(), config.ends_lr) for part in ends if config.ends_lr != 1]
            core = self.modules[phase].core
            if config.encoder_lr != 1:
                slow += [(part.parameters(), config.encoder_lr) for part in (core.encoder, core.quant_proj)]
            groups = parameter_groups(self.modules[phase], config.weight_decay, slow)
            return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        groups = parameter_groups(self.modules[phase], config.disc_weight_decay)
        return torch.optim.AdamW(groups, lr=config.disc_lr, betas=config.disc_betas, eps=config.eps)

    def learning_rate(self, phase: str, step: int) -> float:
        config = self.config
        if phase == "generator":
            peak, warmup, first = config.lr, config.warmup, 0
        else:
            peak, warmup, first = config.disc_lr, config.disc_warmup, config.adversarial_start
        return learning_rate(step - first, peak=peak, warmup=warmup, steps=config.steps - first, final=config.final_lr)

    def active(self, phase: str, step: int) -> bool:
        return phase == "generator" or step >= self.config.adversarial_start

    @torch.no_grad()
    def prepare(self, batch: Batch) -> None:
        """What is kept of pictures and captions, each computed by itself so that neither batches nor interruptions
        change it."""
        if self.teacher and self._keeps:
            text = self.config.target == "text"
            for key in set(batch.captions if text else batch.pictures) - set(self._known):
                seen = [key] if text else self.whole(key)[None].to(self.world.device)
                self._known[key] = self.teacher(seen)[0]
        if self.config.heads_only and batch.tokens is None:
            core = self.modules["generator"].core
            for key in set(batch.pictures) - set(self._means):
                picture = resize(self.whole(key), self.config.size)[None].to(core.device)
                self._means[key] = core.latents(picture, "post")[0].mean(0)

    def losses(self, phase: str, call: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        if phase == "generator":
            return self._generator(call["generator"], batch, step)
        return self._discriminator(call["discriminator"], batch, step)

    def finish_step(self, step: int) -> None:
        core = self.modules["generator"].core
        if not self.config.heads_only:
            core.quantizer.update()
        if self.teacher:
            contrastive.clamp_log_scale_(core.logit_scale)
        self._pairs.clear()

    def health(self) -> dict[str, float]:
        """Per cent of codes in use in the last batch, the worst codebook of the running window, and the guard rails."""
        scale = (
            {"logit_scale": float(self.modules["generator"].core.logit_scale.detach().exp())} if self.teacher else {}
        )
        if self.config.heads_only:
            return scale
        window = self.modules["generator"].core.quantizer.health()
        values = scale | {
            "usage": self.usage,
            "usage_min": 100 * window.usage_min,
            "perplexity_min": window.perplexity_min,
            "dead_max": 100 * window.dead_max,
            "revived": window.revived,
        }
        if self.config.adversarial:
            values["adversarial_weight"] = self.weight
        return values

    def cards(self) -> list[Card]:
        """The frozen networks that took part."""
        config = self.config
        names = ["lpips", "vgg16"] if config.perceptual_net.startswith("lpips") else ["stlpips"]
        found = [CARDS[name] for name in (names if self.perceptual else [])]
        found += [CARDS[config.discriminator]] if config.adversarial else []
        return list(dict.fromkeys([*([self.teacher.card] if self.teacher else []), *found]))

    def export(self, path: Path, weights: dict[str, Tensor]) -> None:
        """The tokenizer; after stage 2 with the head that takes the text tower's features to the shared space."""
        config, (text_teacher, text_width) = self.modules["generator"].core.config, self._towers()
        state = {key.removeprefix("core."): value.cpu() for key, value in weights.items()}
        state = {key: value for key, value in state.items() if not key.startswith("quantizer.state.")}
        if text_width:
            config = dataclasses.replace(config, text_teacher=text_teacher, text_width=text_width)
        else:
            state = {key: value for key, value in state.items() if not key.startswith("text_")}
        write_model(model_from_state(config, state, str(path)), path, getattr(torch, self.config.store))

    # ---- phases --------------------------------------------------------------------------------------------------

    def _generator(self, generator: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        config, images = self.config, batch.images
        target = self._target(batch) if self.teacher else None
        if config.heads_only:
            outputs = generator(self._pooled(batch), target, pooled=True)
            return {"contrastive": self._contrastive(outputs, batch)}
        outputs = generator(images, target)
        out, r = outputs.model, outputs.model.reconstruction
        self.usage = float(out.usage)
        terms = {
            "l1": config.l1 * reconstruction.l1(r, images),
            "l2": config.l2 * reconstruction.l2(r, images),
        }
        if config.log_l2:
            terms["log_l2"] = config.log_l2 * reconstruction.log_l2(r, images)
        if config.ssim:
            terms["ssim"] = config.ssim * (1 - reconstruction.ssim(r, images))
        if self.perceptual:
            distance = config.perceptual * self.perceptual(r, images)
            if distance.requires_grad:  # not of images too small for it
                # Settled at r: the network is gone through backward once, however often the sum is differentiated.
                distance, _ = adversarial.settle(distance, r)
            terms["perceptual"] = distance
        likelihood = torch.stack(list(terms.values())).sum()
        terms["vq"] = config.vq * out.vq_loss
        if self.teacher:
            terms["contrastive"] = self._contrastive(outputs, batch)
        if config.adversarial:
            self._pairs.append((images, r.detach()))
            ramp = adversarial.ramp(step, config.adversarial_ramp, config.adversarial_start)
            if ramp:
                terms["adversarial"] = ramp * config.adversarial * self._fool(r, likelihood, batch, step)
        return {name: term for name, term in terms.items() if name in self.terms}

    def _contrastive(self, outputs: Outputs, batch: Batch) -> Tensor:
        same = None
        if self.config.target == "text":
            same = contrastive.caption_keys(batch.captions)
        elif self.config.teacher_view == "whole" or self.config.heads_only:
            same = torch.tensor(batch.pictures)
        same = None if same is None else same.to(outputs.features.device)
        return self.config.contrastive * contrastive.info_nce(outputs.features, outputs.target, outputs.scale, same)

    def _pooled(self, batch: Batch) -> Tensor:
        """Mean decoder inputs (B, width), which heads alone do not change: of tokens, or of the whole pictures."""
        if batch.tokens is None:
            return torch.stack([self._means[key] for key in batch.pictures])
        with torch.no_grad():
            return self.modules["generator"].core.latents(batch.tokens, "post").mean(1)

    def _target(self, batch: Batch) -> Tensor:
        """The teacher's features (B, width) of what the model sees, of whole pictures, or of captions; elsewhere than
        among those kept, a caption that several images share is read once a batch."""
        text = self.config.target == "text"
        if self._keeps:
            keys = batch.captions if text else batch.pictures
            return torch.stack([self._known[key] for key in keys])
        if not text:
            return self.teacher(batch.images)
        captions = list(dict.fromkeys(batch.captions))
        place = {caption: index for index, caption in enumerate(captions)}
        return self.teacher(captions)[[place[caption] for caption in batch.captions]]

    @property
    def _keeps(self) -> bool:
        """Whether the teacher's features are kept: those of whole pictures, and of captions for the heads alone."""
        config = self.config
        return config.heads_only or (config.teacher_view == "whole" and config.target == "image")

    def _fool(self, r: Tensor, likelihood: Tensor, batch: Batch, step: int) -> Tensor:
        """The adversarial term with its adaptive weight; the discriminator itself takes no gradient from it."""
        judge = self.modules["discriminator"].requires_grad_(False)
        drawn, fade = self._drawn(batch, 0), self._fade(step)
        loss = adversarial.hinge_generator(judge(diffaug.augment(r, drawn, fade), self._trim(batch, 0)))
        judge.requires_grad_(True)
        (likelihood_at,) = torch.autograd.grad(likelihood, r, retain_graph=True)
        loss, adversarial_at = adversarial.settle(loss, r)
        last = self.modules["generator"].core.decoder.last_layer.weight
        weight = adversarial.adaptive_weight(r, likelihood_at, adversarial_at, last)
        self.weight = float(weight)
        return weight * loss

    def _discriminator(self, discriminator: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        images, r = self._pairs.pop(0)
        both = torch.cat([images, r])
        views = []
        for turn, fade in ((1, self._fade(step)), (2, 0.0)):
            drawn = self._drawn(batch, turn)
            views += [diffaug.augment(images, drawn, fade), diffaug.augment(r, drawn, fade)]
        real, fake, real_again, fake_again = discriminator(torch.cat(views), self._trim(batch, 1)).split(len(both) // 2)
        return {
            "hinge": adversarial.hinge_discriminator(real, fake),
            "consistency": self.config.consistency
            * adversarial.balanced_consistency(real, real_again, fake, fake_again),
        }

    # ---- what is drawn: from the sample numbers, so that the number of processes does not matter ------------------

    def _drawn(self, batch: Batch, turn: int) -> diffaug.Drawn:
        """Parameters of this rank's images, drawn for the whole micro-batch."""
        share = len(batch.samples)
        whole = diffaug.draw(
            share * self.world.size, *batch.images.shape[2:], generator=self._generator_of(batch, turn)
        )
        return whole[self.world.rank * share : (self.world.rank + 1) * share]

    def _trim(self, batch: Batch, turn: int) -> torch.Generator:
        return self._generator_of(batch, 8 + turn)

    def _generator_of(self, batch: Batch, turn: int) -> torch.Generator:
        first = batch.samples[0] - self.world.rank * len(batch.samples)  # of the micro-batch over all ranks
        return torch.Generator().manual_seed((self.config.seed * 1_000_003 + first) * 16 + turn)

    def _fade(self, step: int) -> float:
        return adversarial.fade(step, self.config.adversarial_fade, self.config.adversarial_start)
