"""vq_assign and vq_lookup in Triton: for CUDA devices on which the compiled kernels cannot run.

The answers are the canonical ones of csrc/vq/vq.h, bit for bit. As in csrc/vq/vq_filter.h a float32 filter with a
proven bound goes first, and what it leaves undecided is scored in float64, in index order, products and sums rounded
one by one (`enable_fp_fusion=False`). Per call:
  1. `_prepare_codes`, `_prepare_rows`: float32 copies, columns outermost, with norms and what is decided already.
  2. `_assign`: a program holds 64 rows against 64 codes at a time and keeps, for each row, the lower bound of the best
     score and how many codes reached it. Rows that one code reached are done; for the others the codes pass once more,
     and tiles that hold a candidate are scored in float64.
Extra memory: the float32 copies; never an N x K array. With TRITON_INTERPRET=1 the kernels run on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meditok.ops._library import METRICS

BLOCK = 64  # rows and codes of a tile
WARPS = 4
PAIRS = 128  # rows of a program of the lookup

# csrc/vq/vq_filter.h, the same numbers but one: the last term of the bound is 2^-120, not 2^-140, because a device may
# flush subnormal float32 (below 2^-126) to zero.
FLOOR = tl.constexpr(1e-12)
LARGEST_L2 = tl.constexpr(2.0**60)
LARGEST_COSINE = tl.constexpr(2.0**500)
SMALLEST_COSINE = tl.constexpr(2.0**-500)
LARGEST_WIDTH = 65536
SLACK = tl.constexpr(2.0**-21)
ROUND_UP = tl.constexpr(1.000001)
PRODUCT, SQUARE, TINY = 6.05e-8, 2.0**-53, 2.0**-120

FILTERED, CANONICAL, SETTLED = (tl.constexpr(kind) for kind in range(3))  # what is left to do for a row
NONE = tl.constexpr(2**31 - 1)  # no code


@triton.jit
def _is_finite(value):
    return value - value == 0.0


@triton.jit
def _wide(value):
    """float64, exactly; bfloat16 travels as int16 (see `_bits`)."""
    if value.dtype == tl.int16:
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
    return value.to(tl.float64)


@triton.jit
def _narrow(value, dtype: tl.constexpr):
    """float64 to float32, then to dtype, both to nearest even, as csrc/common/dtype.h has it."""
    if dtype == tl.float64:
        return value
    elif dtype == tl.int16:
        value = value.to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value == value, rounded, 0x7FC0).to(tl.int16)
    else:
        return value.to(tl.float32).to(dtype)


@triton.jit
def _bound(x_norm, radius, product, square, tiny):
    """E(X, R) of csrc/vq/vq_filter.h."""
    total = x_norm + radius
    return product * (x_norm * radius + 0.5 * radius * radius) + square * (total * total) + tiny * (1.0 + total)


@triton.jit
def _prepare_codes(
    codebook,  # (G, K, C), any strides
    filter_codes,  # (G, C, padded) float32: unit (cosine) or as given (l2); 0 where the filter must not look
    bias,  # (G, padded) float32: 0 (cosine) or -|c|^2 / 2 (l2); -inf: not to be found by the filter
    radius,  # (G, padded) float32: upper bound of the norm of the filter code; 0 where the bias is -inf
    reach,  # (G, tiles) float32: largest radius of the tile
    norms,  # (G, padded) float64: max(|c|, 1e-12); NaN marks a code that is never chosen
    codes, width, padded, group_stride, code_stride, column_stride,
    COSINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    code = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = code < codes
    address = codebook + group * group_stride + code * code_stride
    total = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float64)
    finite = present
    for i in range(width):
        value = _wide(tl.load(address + tl.cast(i, tl.int64) * column_stride, mask=present, other=0))
        finite = finite & _is_finite(value)
        largest = tl.maximum(largest, tl.abs(value))
        total = total + value * value
    norm = tl.sqrt(total)
    norm = tl.where(norm > FLOOR, norm, FLOOR)
    if COSINE:
        filtered = finite & (norm < LARGEST_COSINE) & ((largest == 0.0) | (largest > SMALLEST_COSINE))
        start = tl.where(filtered, 0.0, -float("inf"))
        size = tl.where(filtered, 1.0, 0.0)
        divisor = norm
    else:
        filtered = finite & (norm < LARGEST_L2)
        start = tl.where(filtered, -0.5 * norm * norm, -float("inf"))
        size = tl.where(filtered, norm.to(tl.float32) * ROUND_UP, 0.0)
        divisor = tl.full([BLOCK], 1.0, tl.float64)
    for i in range(width):
        column = tl.cast(i, tl.int64)
        value = _wide(tl.load(address + column * column_stride, mask=present, other=0))
        value = tl.where(filtered, value / divisor, 0.0)
        tl.store(filter_codes + (group * width + column) * padded + code, value.to(tl.float32))
    at = group * padded + code
    tl.store(bias + at, start.to(tl.float32))
    tl.store(radius + at, size.to(tl.float32))
    tl.store(norms + at, tl.where(finite, norm, float("nan")))
    tl.store(reach + group * (padded // BLOCK) + tile, tl.max(size.to(tl.float32), 0))


@triton.jit
def _prepare_rows(
    x,  # (N, G, C), any strides
    rows32,  # (G, C, padded) float32: the row, for cosine scaled by a power of two
    row_norms,  # (G, padded) float32: upper bound of the norm of the row in rows32
    kinds,  # (G, padded) int8: FILTERED, CANONICAL or SETTLED
    ids,  # (N, G) int64: written for the settled rows
    first_choosable,  # (G,) int64, -1 where no code may be chosen
    unsafe,  # (G,) bool: a code that the filter cannot be trusted with
    rows, groups, width, padded, row_stride, group_stride, column_stride,
    COSINE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = row < rows
    address = x + row * row_stride + group * group_stride
    largest = tl.zeros([BLOCK], tl.float64)
    finite = present
    for i in range(width):
        value = _wide(tl.load(address + tl.cast(i, tl.int64) * column_stride, mask=present, other=0))
        finite = finite & _is_finite(value)
        largest = tl.maximum(largest, tl.abs(value))
    first = tl.load(first_choosable + group)
    settled = ~finite | (first < 0)
    if COSINE:
        settled = settled | (largest == 0.0)  # every score is 0
        canonical = ~((largest < LARGEST_COSINE) & (largest > SMALLEST_COSINE))
        # 2^-e for largest = m 2^e with m in [0.5, 1)
        exponent = (largest.to(tl.int64, bitcast=True) >> 52) & 2047
        scale = ((2045 - tl.minimum(exponent, 2044)) << 52).to(tl.float64, bitcast=True)
    else:
        canonical = ~(largest < LARGEST_L2)
        scale = tl.full([BLOCK], 1.0, tl.float64)
    canonical = canonical | WIDE | (tl.load(unsafe + group) != 0)
    usable = ~(settled | canonical)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(width):
        column = tl.cast(i, tl.int64)
        value = _wide(tl.load(address + column * column_stride, mask=present, other=0))
        value = tl.where(usable, value * scale, 0.0)
        total = total + value * value
        tl.store(rows32 + (group * width + column) * padded + row, value.to(tl.float32))
    norm = tl.sqrt(total)
    canonical = canonical | ~(norm < LARGEST_L2)
    at = group * padded + row
    tl.store(row_norms + at, norm.to(tl.float32) * ROUND_UP)
    tl.store(kinds + at, tl.where(settled, SETTLED, tl.where(canonical, CANONICAL, FILTERED)).to(tl.int8))
    tl.store(ids + row * groups + group, tl.where(finite, first, -1), mask=present & settled)


@triton.jit
def _filter(rows32, code_address, start, row, code, width, padded_rows, padded_codes, BLOCK: tl.constexpr):
    """(rows, codes) float32: the products of a tile, summed onto the bias in float32."""
    values = start
    for first in range(0, width, 16):
        column = first + tl.arange(0, 16).to(tl.int64)
        inside = column < width
        a = tl.load(rows32 + column[None, :] * padded_rows + row[:, None], mask=inside[None, :], other=0.0)
        b = tl.load(code_address + column[:, None] * padded_codes + code[None, :], mask=inside[:, None], other=0.0)
        values = tl.dot(a, b, values, input_precision="ieee")
    return values


@triton.jit
def _assign(
    x, codebook,  # (N, G, C) and (G, K, C), any strides
    rows32, row_norms, kinds,  # see _prepare_rows
    filter_codes, bias, radius, reach, norms,  # see _prepare_codes
    ids,  # (N, G) int64
    rows, groups, codes, width, padded_rows, padded_codes,
    row_stride, x_group_stride, x_column_stride, group_stride, code_stride, column_stride,
    product, square, tiny,
    COSINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, BLOCK)
    kind = tl.load(kinds + group * padded_rows + row)
    x_norm = tl.load(row_norms + group * padded_rows + row)
    filtered = kind == FILTERED
    canonical = kind == CANONICAL
    row_base = rows32 + group * width * padded_rows
    code_base = filter_codes + group * width * padded_codes
    start = group * padded_codes

    # A row's `lower` is below its best score. `held` is the first of `count` codes whose upper bounds, of which
    # `upper` is the largest, were not under `lower` when they passed.
    lower = tl.full([BLOCK], -float("inf"), tl.float32)
    upper = tl.full([BLOCK], -float("inf"), tl.float32)
    held = tl.full([BLOCK], -1, tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, codes, BLOCK):
        code = first + lane
        biases = tl.load(bias + start + code)
        values = tl.broadcast_to(biases[None, :], [BLOCK, BLOCK])
        values = _filter(row_base, code_base, values, row, code, width, padded_rows, padded_codes, BLOCK)
        margin = _bound(x_norm, tl.load(reach + (start + first) // BLOCK), product, square, tiny)
        largest = tl.max(values, 1)
        reached = filtered & (largest + margin >= lower)
        if tl.max(reached.to(tl.int32), 0) > 0:
            certain = largest - margin
            lower = tl.where(reached, tl.maximum(lower, certain - SLACK * tl.abs(certain)), lower)
            radii = tl.load(radius + start + code)
            uppers = values + _bound(x_norm[:, None], radii[None, :], product, square, tiny)
            candidate = reached[:, None] & (values > -float("inf")) & (uppers >= lower[:, None])
            number = tl.sum(candidate.to(tl.int32), 1)
            out = upper < lower  # what is held is out by now
            held = tl.where(
                (number > 0) & (out | (count == 0)), tl.min(tl.where(candidate, code[None, :], NONE), 1), held
            )
            count = tl.where(out, 0, count) + number
            highest = tl.max(tl.where(candidate, uppers, -float("inf")), 1)
            upper = tl.maximum(tl.where(out, -float("inf"), upper), highest)

    # The canonical score, where more than one code is left or the filter cannot be used.
    undecided = canonical | (filtered & (count > 1))
    if tl.max(undecided.to(tl.int32), 0) > 0:
        held = tl.where(undecided, -1, held)
        best = tl.zeros([BLOCK], tl.float64)
        for first in range(0, codes, BLOCK):
            code = first + lane
            biases = tl.load(bias + start + code)
            values = tl.broadcast_to(biases[None, :], [BLOCK, BLOCK])
            values = _filter(row_base, code_base, values, row, code, width, padded_rows, padded_codes, BLOCK)
            radii = tl.load(radius + start + code)
            uppers = values + _bound(x_norm[:, None], radii[None, :], product, square, tiny)
            norm = tl.load(norms + start + code)
            candidate = (values > -float("inf")) & (uppers >= lower[:, None])
            candidate = undecided[:, None] & (canonical[:, None] | candidate) & (norm == norm)[None, :]
            if tl.max(tl.max(candidate.to(tl.int32), 1), 0) > 0:
                score = tl.zeros([BLOCK, BLOCK], tl.float64)
                x_address = x + row * row_stride + group * x_group_stride
                c_address = codebook + group * group_stride + code.to(tl.int64) * code_stride
                for i in range(width):
                    column = tl.cast(i, tl.int64)
                    a = _wide(tl.load(x_address + column * x_column_stride, mask=undecided, other=0))[:, None]
                    c = _wide(tl.load(c_address + column * column_stride, mask=code < codes, other=0))[None, :]
                    if COSINE:
                        score = score + a * c
                    else:
                        score = score + (a - c) * (a - c)
                score = score / norm[None, :] if COSINE else -score
                candidate = candidate & (score == score)
                score = tl.where(candidate, score, -float("inf"))
                top = tl.max(score, 1)
                index = tl.min(tl.where(candidate & (score == top[:, None]), code[None, :], NONE), 1)
                better = (index < NONE) & ((held < 0) | (top > best))
                held = tl.where(better, index, held)
                best = tl.where(better, top, best)
    tl.store(ids + row * groups + group, held.to(tl.int64), mask=filtered | canonical)


@triton.jit
def _lookup(
    ids,  # (N, G) int64, any strides
    codebook,  # (G, K, C), any strides
    out,  # (N, G, C) contiguous, of the codebook's type
    rows, groups, codes, width, row_stride, id_stride, group_stride, code_stride, column_stride,
    COSINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = pair < tl.cast(rows, tl.int64) * groups
    group = pair % groups
    id = tl.load(ids + pair // groups * row_stride + group * id_stride, mask=present, other=-1)
    inside = (id >= 0) & (id < codes)
    address = codebook + group * group_stride + id * code_stride
    norm = tl.full([BLOCK], 1.0, tl.float64)
    if COSINE:
        total = tl.zeros([BLOCK], tl.float64)
        for i in range(width):
            value = _wide(tl.load(address + tl.cast(i, tl.int64) * column_stride, mask=inside, other=0))
            total = total + value * value
        norm = tl.sqrt(total)
        norm = tl.where(norm < FLOOR, FLOOR, norm)
    for i in range(width):
        column = tl.cast(i, tl.int64)
        value = _wide(tl.load(address + column * column_stride, mask=inside, other=0)) / norm  # x / 1 is x
        value = _narrow(tl.where(inside, value, float("nan")), out.dtype.element_ty)
        tl.store(out + pair * width + column, value, mask=present)


def _bits(tensor: Tensor) -> Tensor:
    """bfloat16 as its bit patterns, which every device and Triton's interpreter convert alike."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def assign(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """x (N, G, C), codebook (G, K, C) on one device -> ids (N, G) int64."""
    rows, groups, width = x.shape
    codes = codebook.shape[1]
    ids = torch.full((rows, groups), -1, dtype=torch.int64, device=x.device)
    if ids.numel() == 0 or codes == 0:
        return ids
    row_tiles, code_tiles = triton.cdiv(rows, BLOCK), triton.cdiv(codes, BLOCK)
    padded_rows, padded_codes = row_tiles * BLOCK, code_tiles * BLOCK
    cosine = METRICS[metric] == METRICS["cosine"]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    filter_codes, rows32 = empty(groups, width, padded_codes), empty(groups, width, padded_rows)
    bias, radius, reach = empty(groups, padded_codes), empty(groups, padded_codes), empty(groups, code_tiles)
    norms = empty(groups, padded_codes, dtype=torch.float64)
    row_norms, kinds = empty(groups, padded_rows), empty(groups, padded_rows, dtype=torch.int8)
    packed = (filter_codes, bias, radius, reach, norms)
    options = dict(COSINE=cosine, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False)
    with torch.cuda.device_of(x):
        _prepare_codes[(code_tiles, groups)](
            _bits(codebook), *packed, codes, width, padded_codes, *codebook.stride(), **options
        )
        choosable = norms == norms
        first = torch.where(choosable.any(-1), choosable.to(torch.uint8).argmax(-1), -1)
        unsafe = (choosable & (bias == -torch.inf)).any(-1)
        _prepare_rows[(row_tiles, groups)](
            *(_bits(x), rows32, row_norms, kinds, ids, first, unsafe, rows, groups, width, padded_rows, *x.stride()),
            **options,
            WIDE=width > LARGEST_WIDTH,
        )
        bound = ((width + 4) * PRODUCT, (width + 4) * SQUARE, (width + 4) * TINY)
        _assign[(row_tiles, groups)](
            *(_bits(x), _bits(codebook), rows32, row_norms, kinds, *packed, ids, rows, groups, codes, width),
            *(padded_rows, padded_codes, *x.stride(), *codebook.stride(), *bound),
            **options,
        )
    return ids


def lookup(ids: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """ids (N, G) int64, codebook (G, K, C) on one device -> (N, G, C) of the codebook's dtype."""
    rows, groups = ids.shape
    codes, width = codebook.shape[1:]
    out = torch.empty((rows, groups, width), dtype=codebook.dtype, device=codebook.device)
    if out.numel() == 0:
        return out
    options = dict(COSINE=METRICS[metric] == METRICS["cosine"], BLOCK=PAIRS, num_warps=WARPS, enable_fp_fusion=False)
    with torch.cuda.device_of(codebook):
        _lookup[(triton.cdiv(rows * groups, PAIRS),)](
            ids, _bits(codebook), _bits(out), rows, groups, codes, width, *ids.stride(), *codebook.stride(), **options
        )
    return out
