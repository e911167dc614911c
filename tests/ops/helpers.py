"""Seeded inputs and comparisons for the op tests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from meditok import native

ROOT = Path(__file__).resolve().parents[2]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
METRICS = ("cosine", "l2")
# The CPU kernels without those of an instruction set, as csrc/NAME.cpp.
CPU_SOURCES = ("common/isa", "common/threads", "vq/vq_scalar", "vq/vq_pack", "vq/vq_cpu", "vq/vq_large_dim")
CPU_SOURCES += ("vq/vq_lookup", "vq/vq_train_quantize", "vq/vq_train_stats", "vq/vq_train_rows_scalar")
LEVELS = ("scalar", "neon", "avx2", "avx512", "avx512vnni")  # worst first


def has_native() -> bool:
    return native.backend == "native"


def levels_here() -> list[str]:
    """Levels that this build and this machine share; none without the compiled core."""
    if native.backend != "native":
        return []
    info = native.core.build_info()
    return [name for name in LEVELS if name in info["isa_compiled"] and name in info["isa_detected"]]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def assert_same_ids(found: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Exact equality; a failure names the first row and codebook that differ."""
    if torch.equal(torch.as_tensor(found), torch.as_tensor(expected)):
        return
    wrong = (torch.as_tensor(found) != torch.as_tensor(expected)).nonzero()
    row, group = wrong[0].tolist()
    raise AssertionError(
        f"{what}: {len(wrong)} ids differ, first at row {row}, codebook {group}: "
        f"{int(found[row, group])} instead of {int(expected[row, group])}"
    )


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal element by element, NaN equal to NaN."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    assert found.dtype == expected.dtype and found.shape == expected.shape, what
    assert bool(same.all()), f"{what}: {int((~same).sum())} elements differ"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that sees this source tree or the installed package as this one
    does."""
    import meditok

    path = str(Path(meditok.__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)


def adversarial_codebooks(codes: int, width: int) -> dict[str, torch.Tensor]:
    """(1, K, C) codebooks on which shortcuts fail."""
    base = randn(1, codes, width, seed=7)
    outlier = base.clone()
    outlier[0, codes // 2] *= 1e4 / outlier[0, codes // 2].norm()
    dead = torch.zeros_like(base)
    dead[0, ::100] = base[0, ::100]
    duplicates = base[:, torch.arange(codes) % max(1, codes // 3)]
    scaled = base.clone()
    scaled[0, codes // 2 :] = 2 * scaled[0, : codes - codes // 2]
    nan = base.clone()
    nan[0, ::3, 0] = torch.nan
    infinite = base.clone()
    infinite[0, 1::2, -1] = torch.inf
    lengths = torch.logspace(-20, 20, codes).view(1, codes, 1)
    return {
        "random": base,
        "all zero": torch.zeros_like(base),
        "all equal": base[:, :1].expand(1, codes, width).clone(),
        "one outlier of 1e4": outlier,
        "mostly dead": dead,
        "duplicates": duplicates,
        "multiples": scaled,
        "NaN rows": nan,
        "infinite rows": infinite,
        "all NaN": torch.full_like(base, torch.nan),
        "lengths over forty decades": base * lengths,
        "beyond the filter's range": base * 1e25,
        "subnormal": base * 1e-42,
    }


def near_ties(codes: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, 1, C) off the codes, codebook (1, K, C) whose rows differ from a few by one or two ulp in one
    element."""
    generator = np.random.default_rng(seed)
    base = generator.standard_normal((max(1, codes // 8), width)).astype(np.float32)
    rows = base[np.arange(codes) % len(base)]
    for row in rows:
        column = generator.integers(width)
        for _ in range(generator.integers(0, 3)):
            row[column] = np.nextafter(row[column], np.float32(np.inf if generator.integers(2) else -np.inf))
    x = base[generator.integers(len(base), size=64)] + 0.3 * generator.standard_normal((64, width)).astype(np.float32)
    return torch.from_numpy(x)[:, None].contiguous(), torch.from_numpy(rows)[None].contiguous()


def quantisation_edges(width: int, seed: int, rows: int = 48, steps: int = 32764) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, 1, C) and codebook (1, K, C) on which rounding to `steps` of the length errs as much as it can:
    those of the 16-bit filter, or 127, those of 8 bits.

    Elements are (integer + 1/2) / steps of the length, rounded apart by neighbours in one float32 ulp, so that codes
    which tie after rounding, or swap, differ in truth; single large elements use the whole range.
    """
    generator = np.random.default_rng(seed)
    direction = generator.standard_normal((6, width))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    halves = (np.floor(direction * steps) + 0.5) / steps
    offsets = generator.integers(-1, 2, size=(40, 6, width)) * generator.choice(
        [0.0, 0.25, 0.4999, 0.5, 1.0], (40, 6, 1)
    )
    codes = (halves + offsets / steps).reshape(-1, width)
    single = np.eye(width)[generator.integers(width, size=20)] * generator.choice([-1.0, 1.0], (20, 1))
    codes = np.concatenate([codes, single, single + 0.5 / steps, np.ones((1, width)) / np.sqrt(width)])
    codes = codes[generator.permutation(len(codes))]
    near = codes[generator.integers(len(codes), size=rows)] + generator.integers(-1, 2, (rows, width)) * 0.5 / steps
    x = np.concatenate([near, near * steps, near * 1e-3, np.sign(near), single])
    return torch.from_numpy(x.astype(np.float32))[:, None], torch.from_numpy(codes.astype(np.float32))[None]


def load_module(path: str | Path):
    """An extension module `_core` from a file."""
    spec = importlib.util.spec_from_file_location("_core", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
