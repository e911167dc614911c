"""Where training starts from, for models with ends="patches": the transform codec that their linear parts can be.

Channel j of encoder and decoder holds the coefficient of the j-th principal component of a patch, half whitened
(divided by the root of its standard deviation); every residual branch starts at zero. A codebook of width C quantises
C - 1 coefficients f as the unit vector of (SPREAD f / |f|rms, 1): a small SPREAD keeps it near the pole, where the
sphere is flat and the nearest code by cosine is the nearest by distance. The coefficients go to the codebooks as in
parametric optimised product quantisation (Ge et al. 2013, "eigenvalue allocation"): each next one to the codebook whose
product of variances is smallest. The codes are spherical k-means of those vectors (Dhillon & Modha 2001), and the way
back is fitted by least squares: codes to coefficients, then the coefficients of a patch and its neighbours to pixels,
so that overlapping patches soften the edges between blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .. import ops
from ..errors import UsageError
from ..models.config import PATCH
from ..models.tokenizer import Tokenizer
from ..models.vitamin import Encoder
from ..nn.attention import ProjectionAttention, SelfAttention
from ..nn.blocks import GeGLU, InvertedBottleneck

ROUNDS = 15  # of k-means
RARE = 0.4  # codes with less than this share of the mean count move to where the patches are
SPREAD = 0.1
CONSTANTS = 16  # channels that hold +-CONSTANT, by which later layers undo what layer norms take away
CONSTANT = 2.0


@torch.no_grad()
def principal_components(core: Tokenizer, images: Sequence[torch.Tensor]) -> None:
    """Set every weight of `core` but its alignment heads from images (3, S, S) in [-1, 1], S a multiple of 16.

    Draws from torch's global generator. UsageError for a model with other ends, or whose width has no room.
    """
    c = core.config
    if c.ends != "patches" or c.projection != "attention" or c.width < c.code_width + CONSTANTS:
        raise UsageError(
            f"start=pca: model {c.name} has ends={c.ends!r}, projection={c.projection!r}, width {c.width}; "
            f"it needs patches, attention and at least {c.code_width + CONSTANTS}"
        )
    for part in core.modules():
        _quiet(part)
    patches = torch.cat([_patches(image) for image in images])  # (n, 3 * 16 * 16)
    colour = patches.unflatten(1, (3, -1)).mean((0, 2))  # (3,)
    centred = (patches.unflatten(1, (3, -1)) - colour[:, None]).flatten(1)
    basis, deviation = _components(centred, c.width - CONSTANTS)
    scale = deviation.sqrt()
    _set_encoder(core.encoder, basis / scale, colour)
    groups = _allocate(deviation, c.num_codebooks, c.code_dim - 1)
    _set_quantiser_input(core, groups, deviation, scale)

    features = centred @ basis / scale  # (n, width - CONSTANTS)
    code = core.quant_proj.proj(core.quant_proj.norm3(core.encoder.norm(_stream(features))))
    pieces = F.normalize(code.unflatten(1, (c.num_codebooks, c.code_dim)), dim=-1)  # (n, G, C)
    codes = _spherical_means(pieces, c.codebook_size)
    core.quantizer.codebook.copy_(codes)
    core.quantizer.codebook_update = core.quantizer.codebook_update  # training state anew, from these codes
    found = ops.vq_lookup(ops.vq_assign(pieces, codes), codes).flatten(1)
    heard = c.num_codebooks * (c.code_dim - 1)  # components that the codebooks carry
    decoded = _set_dequantiser(core, core.post_quant_proj.norm3(found), features[:, :heard])
    pixels = core.decoder.pixels.proj
    _kernel(pixels, basis * scale)
    pixels.bias.copy_(colour)
    sides = [(image.shape[1] // PATCH, image.shape[2] // PATCH) for image in images]
    _soften(pixels, decoded, centred, sides, c.overlap)


def _quiet(part: torch.nn.Module) -> None:
    """Residual branches to zero: their last layer."""
    if isinstance(part, (SelfAttention, ProjectionAttention)):
        last = part.proj
    elif isinstance(part, GeGLU):
        last = part.w2
    elif isinstance(part, InvertedBottleneck):
        last = part.conv3_1x1
    else:
        return
    last.weight.zero_()
    last.bias.zero_()


def _patches(image: torch.Tensor) -> torch.Tensor:
    """(3, S, S) -> (N, 3 * 16 * 16), each as a convolution's kernel is laid out."""
    return image.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)


def _components(centred: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit columns (d, count) of largest variance, and their standard deviations (count,)."""
    values, vectors = torch.linalg.eigh(_products(centred, centred) / len(centred))
    order = torch.arange(len(values) - 1, len(values) - 1 - count, -1)
    return vectors[:, order].to(centred.dtype), values[order].clamp_min(1e-8).sqrt().to(centred.dtype)


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a^T b of rows (n, p) and (n, q), in float64, a part at a time."""
    parts = zip(a.split(8192), b.split(8192), strict=True)
    return sum(x.double().T @ y.double() for x, y in parts)


def _allocate(deviation: torch.Tensor, codebooks: int, each: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(codebooks)]
    log = deviation.log() - deviation[codebooks * each - 1].log()
    for j in range(codebooks * each):
        room = [group for group in groups if len(group) < each]
        min(room, key=lambda group: sum(float(log[i]) for i in group)).append(j)
    return groups


def _stream(features: torch.Tensor) -> torch.Tensor:
    """The encoder's tokens before its norm: components, then constants of either sign."""
    half = features.new_full((len(features), CONSTANTS // 2), CONSTANT)
    return torch.cat([features, half, -half], 1)


def _kernel(layer: torch.nn.Module, columns: torch.Tensor) -> None:
    """Weights (width, 3, side, side) of a patch layer: columns (768, components) in the middle, zero elsewhere."""
    side = layer.kernel_size[0]
    edge = (side - PATCH) // 2
    layer.weight.zero_()
    middle = layer.weight[: columns.shape[1], :, edge : side - edge, edge : side - edge]
    middle.copy_(columns.T.unflatten(1, (3, PATCH, PATCH)))


def _set_encoder(encoder: Encoder, basis: torch.Tensor, colour: torch.Tensor) -> None:
    proj = encoder.patch_embed["backbone"].proj
    _kernel(proj, basis)
    shift = colour.repeat_interleave(PATCH**2) @ basis
    proj.bias.copy_(_stream(-shift[None])[0])
    encoder.norm.reset_parameters()


def _set_quantiser_input(
    core: Tokenizer, groups: list[list[int]], deviation: torch.Tensor, scale: torch.Tensor
) -> None:
    """Rows of quant_proj: the layer norms before it divide each token by a number of its own, which normalising the
    pieces removes, and subtract its mean, which the constants know."""
    layer = core.quant_proj.proj
    core.quant_proj.norm3.reset_parameters()
    layer.weight.zero_()
    layer.bias.zero_()
    rows = layer.weight.unflatten(0, (len(groups), -1))  # (G, C, width)
    for row, group in zip(rows, groups, strict=True):
        weight = scale[group] / deviation[group].norm()
        row[torch.arange(len(group)), group] = weight
        row[:-1, -CONSTANTS:] = -weight[:, None] / CONSTANTS
        row[-1, -CONSTANTS : -CONSTANTS // 2] = 1 / (SPREAD * CONSTANTS * CONSTANT)
        row[-1, -CONSTANTS // 2 :] = -1 / (SPREAD * CONSTANTS * CONSTANT)


def _spherical_means(pieces: torch.Tensor, count: int) -> torch.Tensor:
    """Unit codes (G, count, C) of unit rows (n, G, C)."""

    def some(number: int) -> torch.Tensor:
        return pieces[torch.randint(len(pieces), (number,))].transpose(0, 1)

    codes = pieces[torch.randperm(len(pieces))[:count].repeat(-(-count // len(pieces)))[:count]].transpose(0, 1)
    for _ in range(ROUNDS):
        counts, sums = ops.vq_stats(pieces, ops.vq_assign(pieces, codes.contiguous()), count)
        codes = torch.where((counts > RARE * len(pieces) / count)[..., None], F.normalize(sums, dim=-1), some(count))
    return codes.contiguous()


def _least_squares(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """Weights (p, q) of p inputs for q outputs, from products (p, p) and (p, q) in float64; a slight ridge."""
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, cross)


def _set_dequantiser(core: Tokenizer, found: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """From normed codes (n, G*C) back to components (n, k), which are returned as fitted."""
    layer, k = core.post_quant_proj.proj, features.shape[1]
    core.post_quant_proj.norm3.reset_parameters()
    known = torch.cat([found, torch.ones(len(found), 1)], 1)
    fit = _least_squares(_products(known, known), _products(known, features)).to(found.dtype)
    layer.weight.zero_()
    layer.bias.zero_()
    layer.weight[:k].copy_(fit[:-1].T)
    layer.bias[:k].copy_(fit[-1])
    return known @ fit


def _soften(
    layer: torch.nn.ConvTranspose2d,
    decoded: torch.Tensor,
    centred: torch.Tensor,
    sides: list[tuple[int, int]],
    overlap: int,
) -> None:
    """Fit the kernels of decoded components (n, k) to patches (n, 768) of images with `sides` = rows, columns of them.

    A pixel nearer than `overlap` to an edge hears the patch beyond it too; each of the nine kinds of pixels has its own
    least squares, all from one table of products over a patch's 3 x 3 neighbourhood.
    """
    k = decoded.shape[1]
    gram = cross = 0
    for near, target, side in zip(_split(decoded, sides), _split(centred, sides), sides, strict=True):
        around = _neighbourhoods(near, *side).double()
        gram, cross = gram + around.T @ around, cross + around.T @ target.double()
    reach = {-1: range(overlap), 0: range(overlap, PATCH - overlap), 1: range(PATCH - overlap, PATCH)}
    place = torch.arange(3 * PATCH**2).view(3, PATCH, PATCH)
    for (down, rows), (right, columns) in itertools.product(reach.items(), repeat=2):
        if not rows or not columns:
            continue
        heard = [(dy, dx) for dy in sorted({0, down}) for dx in sorted({0, right})]
        inputs = torch.cat([torch.arange(k) + ((dy + 1) * 3 + dx + 1) * k for dy, dx in heard])
        outputs = place[:, rows.start : rows.stop, columns.start : columns.stop].flatten()
        fit = _least_squares(gram[inputs][:, inputs], cross[inputs][:, outputs])
        for (dy, dx), weight in zip(heard, fit.split(k), strict=True):
            top, left = (first.start + overlap - PATCH * d for first, d in ((rows, dy), (columns, dx)))
            part = layer.weight[:k, :, top : top + len(rows), left : left + len(columns)]
            part.copy_(weight.unflatten(1, (3, len(rows), len(columns))))


def _split(rows: torch.Tensor, sides: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    return rows.split([height * width for height, width in sides])


def _neighbourhoods(rows: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(height * width, k) -> (height * width, 9 * k): each patch's 3 x 3 neighbourhood in raster order, 0 outside."""
    padded = F.pad(rows.view(height, width, -1), (0, 0, 1, 1, 1, 1))
    shifted = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return torch.cat(shifted, -1).flatten(0, 1)
