"""How many images the convolution stages take at once, so that a batch of any size fits.

The transformers gain from large batches and need little memory; the maps at full resolution need nearly all of it. On
a CPU one image at a time is also fastest: its maps stay in the last-level cache, and freed memory is used again instead
of being fetched fresh from the system, page by page. And PyTorch's convolutions and products then always see one shape,
so that an image's bits do not depend on its batch: stable mode counts on that (tokenizer.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .config import TokenizerConfig

SHARE = (
    0.8  # of the free memory that maps may take; the rest is fragmentation, workspaces and whoever shares the device
)


def image_bytes(config: TokenizerConfig, height: int, width: int, itemsize: int = 4) -> int:
    """Bytes that the maps of one image hold at most, over all convolution stages of encoder and decoder."""
    pixels = height * width
    hidden1, hidden2 = (config.expansion * w for w in config.stage_widths)
    wide2, wide1 = (config.expansion * w for w in config.decoder_widths)
    # Floats a pixel of the image. An upsampling holds its result, and on the small map, a quarter of it, the input,
    # three maps of differences and nine products; a block holds its expansion before and after the depthwise step.
    upsampled = 1 + (1 + 3 + 9) / 4
    floats = max(
        config.stem_width / 4 * 3,
        hidden1 * (1 / 4 + 1 / 16) + config.stem_width / 4,
        hidden2 * (1 / 16 + 1 / 64) + config.stage_widths[0] / 16,
        wide2 * upsampled / 16,
        wide1 * upsampled / 4 + config.decoder_widths[0] / 16,
        wide1 / 4 * 2 + config.decoder_widths[1] / 4,
        config.decoder_widths[1] * upsampled,
    )
    return int((floats + 3) * pixels * itemsize)


def images_at_once(config: TokenizerConfig, height: int, width: int, device: torch.device, itemsize: int = 4) -> int:
    """At least 1: one on a CPU, on CUDA as many as fit into what is free now."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, int(SHARE * free) // image_bytes(config, height, width, itemsize))


def in_parts(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, config: TokenizerConfig, height: int, width: int
):
    """run(x) for a batch x, computed in parts that fit; height and width of the image it belongs to, in pixels.

    Whole where a gradient keeps all maps anyway, and in a graph, whose shapes are the caller's choice.
    """
    graph = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    if graph or torch.is_grad_enabled() or len(x) < 2:
        return run(x)
    half = torch.is_autocast_enabled(x.device.type)
    size = images_at_once(config, height, width, x.device, 2 if half else x.dtype.itemsize)
    return run(x) if len(x) <= size else torch.cat([run(part) for part in x.split(size)])
