"""Fused operations on torch, NumPy and CuPy arrays; the result is of the same kind as the input.

`meditok.ops.checks` says when values (not only shapes) are checked: "auto" checks always on CPU and, on CUDA,
in eager calls with one synchronisation, but never under compilation, export, vmap or graph capture; "never"
leaves the values to the kernels, which give NaN rows for ids out of range and never fault.
"""

from meditok.ops.attention import attention, attention_qkv
from meditok.ops.entropy import vq_entropy
from meditok.ops.packed import PackedCodebook, pack_codebook
from meditok.ops.quantize import vq_quantize, vq_stats, vq_update_
from meditok.ops.vq import vq_assign, vq_lookup

checks = "auto"

__all__ = [
    "PackedCodebook",
    "attention",
    "attention_qkv",
    "checks",
    "pack_codebook",
    "vq_assign",
    "vq_entropy",
    "vq_lookup",
    "vq_quantize",
    "vq_stats",
    "vq_update_",
]
