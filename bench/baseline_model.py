"""The tokenizer written the published way in plain PyTorch: what bench_model.py measures ours against.

Same weights, same keys, same mathematics: feature maps in NCHW with a permutation around every norm, nearest-neighbour
doubling before dense 3x3 convolutions, one scaled_dot_product_attention a block with heads split and joined by copies,
heads averaged one by one, cosine similarities of all codes written out before their argmax. Nothing of ours is called.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Norm2d(nn.LayerNorm):
    """Over the channels of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.w0, self.w1 = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.w2 = nn.Linear(2 * width, width)

    def forward(self, x):
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BottleneckAttention(nn.Module):
    def __init__(self, in_width: int, out_width: int, heads: int, causal: bool):
        super().__init__()
        wide = max(in_width, out_width)
        self.heads, self.causal, self.narrowing = heads, causal, in_width > out_width
        self.qkv, self.proj = nn.Linear(in_width, 3 * wide, bias=False), nn.Linear(out_width, out_width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(wide)), nn.Parameter(torch.zeros(wide))
        self.register_buffer("zero_k_bias", torch.zeros(wide))

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.zero_k_bias, self.v_bias]))
        q, k, v = qkv.reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(x.mean(1) if self.narrowing else x.transpose(1, 2).reshape(batch, length, -1))


class Bottleneck(nn.Module):
    def __init__(self, in_width: int, out_width: int, heads: int, causal: bool):
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(in_width), nn.LayerNorm(in_width)
        self.attn = BottleneckAttention(in_width, out_width, heads, causal)
        self.proj, self.norm2, self.mlp = nn.Linear(in_width, out_width), nn.LayerNorm(out_width), Mlp(out_width)

    def forward(self, x):
        x = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Upsample(nn.Module):
    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.expand = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else nn.Identity()

    def forward(self, x):
        return self.expand(F.avg_pool2d(x, 3, 2, 1, count_include_pad=False))


class ConvBlock(nn.Module):
    def __init__(self, in_width: int, out_width: int, resample: str, expansion: int):
        super().__init__()
        hidden = expansion * out_width
        self.pre_norm, self.conv1_1x1 = Norm2d(in_width), nn.Conv2d(in_width, hidden, 1)
        self.up = Upsample(hidden, hidden) if resample == "up" else nn.Identity()
        self.conv2_kxk = nn.Conv2d(hidden, hidden, 3, 2 if resample == "down" else 1, 1, groups=hidden)
        self.conv3_1x1 = nn.Conv2d(hidden, out_width, 1)
        self.shortcut = {"none": nn.Identity, "down": Downsample, "up": Upsample}[resample](in_width, out_width)

    def forward(self, x):
        y = self.up(F.gelu(self.conv1_1x1(self.pre_norm(x))))
        return self.conv3_1x1(F.gelu(self.conv2_kxk(y))) + self.shortcut(x)


def _stage(in_width: int, out_width: int, depth: int, resample: str, expansion: int) -> nn.Sequential:
    rest = [ConvBlock(out_width, out_width, "none", expansion) for _ in range(depth - 1)]
    return nn.Sequential(ConvBlock(in_width, out_width, resample, expansion), *rest)


def _patches(c, layer: type[nn.Module], in_width: int, out_width: int) -> nn.ModuleDict:
    grid = nn.Sequential(*[ConvBlock(c.width, c.width, "none", c.expansion) for _ in range(c.grid_depth)])
    return nn.ModuleDict({"proj": layer(in_width, out_width, 16 + 2 * c.overlap, 16, c.overlap), "grid": grid})


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 1, c.width), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(c.width, c.heads) for _ in range(c.encoder_depth)])
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        backbone = _patches(c, nn.Conv2d, 3, c.width) if c.ends == "patches" else self._stages(c)
        self.patch_embed = nn.ModuleDict({"backbone": backbone})

    def _stages(self, c) -> nn.ModuleDict:
        (w1, w2), (d1, d2) = c.stage_widths, c.stage_depths
        stem = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(3, c.stem_width, 3, 2, 1),
                "norm1": Norm2d(c.stem_width),
                "conv2": nn.Conv2d(c.stem_width, c.stem_width, 3, 1, 1),
            }
        )
        stages = (_stage(c.stem_width, w1, d1, "down", c.expansion), _stage(w1, w2, d2, "down", c.expansion))
        pool = nn.ModuleDict({"norm": Norm2d(w2), "proj": nn.Conv2d(w2, c.width, 3, 2, 1)})
        return nn.ModuleDict({"stem": stem, "stages": nn.Sequential(*stages), "pool": pool})

    def convolve(self, x):  # (B, 3, H, W) -> (B, N, C)
        backbone = self.patch_embed["backbone"]
        if "stem" in backbone:
            stem, pool = backbone["stem"], backbone["pool"]
            x = stem["conv2"](F.gelu(stem["norm1"](stem["conv1"](x))))
            x = pool["proj"](pool["norm"](backbone["stages"](x)))
        else:
            x = backbone["grid"](backbone["proj"](x))
        return x.flatten(2).transpose(1, 2) + self.pos_embed

    def forward(self, x):
        return self.norm(self.blocks(self.convolve(x)))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(c.width, c.heads) for _ in range(c.decoder_depth)])
        if c.ends == "patches":
            self.norm, self.pixels = nn.Identity(), _patches(c, nn.ConvTranspose2d, c.width, 3)
            return
        (w2, w1), (d2, d1) = c.decoder_widths, c.decoder_depths
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        self.up_conv1 = Upsample(c.width, w2)
        self.up_conv2 = _stage(w2, w2, d2, "up", c.expansion)
        self.up_conv3 = _stage(w2, w1, d1, "up", c.expansion)
        self.up_conv4 = nn.ModuleDict(
            {"conv1": Upsample(w1, w1), "norm1": Norm2d(w1), "conv2": nn.Conv2d(w1, 3, 3, 1, 1)}
        )

    @property
    def last_layer(self):
        return self.pixels["proj"] if hasattr(self, "pixels") else self.up_conv4["conv2"]

    def convolve(self, x):  # (B, N, C) -> (B, 3, H, W), N a square
        side = math.isqrt(x.shape[1])
        x = x.transpose(1, 2).reshape(x.shape[0], -1, side, side)
        if hasattr(self, "pixels"):
            return self.last_layer(self.pixels["grid"](x))
        x = self.up_conv3(self.up_conv2(self.up_conv1(x)))
        head = self.up_conv4
        return self.last_layer(F.gelu(head["norm1"](head["conv1"](x))))

    def forward(self, x):
        return self.convolve(self.norm(self.blocks(x)))


class Codebook(nn.Module):
    def __init__(self, codes: int, width: int):
        super().__init__()
        self.codebook = nn.Embedding(codes, width)
        self.register_buffer("vocab_usage", torch.zeros(codes))


class Quantizer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.beta = c.commitment_weight
        self.codebooks = nn.ModuleList([Codebook(c.codebook_size, c.code_dim) for _ in range(c.num_codebooks)])

    def assign(self, x):  # (B, N, G*C) -> (B, G, N)
        ids = []
        for part, book in zip(x.float().chunk(len(self.codebooks), -1), self.codebooks, strict=True):
            rows, codes = F.normalize(part, dim=-1), F.normalize(book.codebook.weight, dim=-1)
            ids.append((rows @ codes.T).argmax(-1))
        return torch.stack(ids, 1)

    def lookup(self, ids):  # (B, G, N) -> (B, N, G*C)
        parts = [
            F.normalize(F.embedding(ids[:, i], book.codebook.weight), dim=-1) for i, book in enumerate(self.codebooks)
        ]
        return torch.cat(parts, -1)

    def forward(self, x):  # straight-through values (B, N, G*C) and the loss ()
        codes = self.lookup(self.assign(x))
        rows = F.normalize(x.float().unflatten(-1, (len(self.codebooks), -1)), dim=-1).flatten(-2)
        loss = self.beta * F.mse_loss(codes.detach(), rows) + F.mse_loss(codes, rows.detach())
        return rows + (codes - rows).detach(), loss


class Baseline(nn.Module):
    """`Baseline(model)` has the weights of a meditok Tokenizer; calls take and give what its calls do.

    autocast: a half dtype in which encoder and decoder run; bottlenecks and quantiser stay float32 as published.
    """

    def __init__(self, model, autocast: torch.dtype | None = None):
        super().__init__()
        c = model.config
        if c.projection != "attention":
            raise SystemExit(f"{c.name}: the baseline has attention bottlenecks only")
        self.autocast, causal = autocast, c.attention == "causal"
        with torch.device("meta"):
            self.encoder, self.decoder, self.quantizer = Encoder(c), Decoder(c), Quantizer(c)
            self.quant_proj = Bottleneck(c.width, c.code_width, c.heads, causal)
            self.post_quant_proj = Bottleneck(c.code_width, c.width, c.heads, causal)
        # Of the aligned space: not on any path measured.
        heads = ("logit_scale", "fc_norm.", "projection.", "text_fc_norm.", "text_projection.")
        state = {key: value for key, value in model.state_dict().items() if not key.startswith(heads)}
        self.load_state_dict(state, assign=True)  # the very memory of the other model
        self.requires_grad_(True).train(model.training)

    def _half(self, module, x):
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return module(x).float()

    @torch.no_grad()
    def tokenize(self, images):
        return self.quantizer.assign(self.quant_proj(self._half(self.encoder, images)))

    @torch.no_grad()
    def detokenize(self, tokens):
        return self._half(self.decoder, self.post_quant_proj(self.quantizer.lookup(tokens))).clamp(-1, 1)

    def reconstruct(self, images):
        return self.detokenize(self.tokenize(images))

    def forward(self, images):
        """(reconstruction, quantiser's loss) of a training step."""
        z, loss = self.quantizer(self.quant_proj(self._half(self.encoder, images)))
        return self._half(self.decoder, self.post_quant_proj(z)), loss
