"""The NEON source, cross-compiled for 64-bit Arm and run under qemu-user, gives the ids of the reference."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess

import pytest
import torch

from meditok.ops import reference

from .helpers import CPU_SOURCES, METRICS, ROOT, adversarial_codebooks, near_ties, randn

SOURCES = (*CPU_SOURCES, "vq/vq_neon", "vq/vq_large_dim_neon")


def compiler() -> tuple[str, list[str]]:
    """(g++ for 64-bit Arm, what runs its programs)."""
    if os.uname().machine == "aarch64" and shutil.which("g++"):
        return "g++", []
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if shutil.which("aarch64-linux-gnu-g++") is None or emulator is None:
        pytest.skip("the Arm compiler is not installed (Debian packages g++-aarch64-linux-gnu and qemu-user)")
    return "aarch64-linux-gnu-g++", [emulator]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(cases): checks [(x, codebook, metric, threads)] against the reference on Arm; returns what it printed."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the C++ sources are not beside the tests")
    gxx, emulator = compiler()
    folder = tmp_path_factory.mktemp("neon")
    paths = [ROOT / "csrc" / f"{name}.cpp" for name in SOURCES]
    flags = "-std=c++17 -O2 -static -pthread -ffp-contract=off -Wall -Wextra -Werror -DMEDITOK_HAVE_NEON".split()
    objects = [folder / f"{i}.o" for i in range(len(paths) + 1)]
    program = folder / "check_ids"
    compiling = [
        subprocess.Popen(
            [gxx, *flags, f"-I{ROOT / 'csrc'}", "-c", path, "-o", output], stderr=subprocess.PIPE, text=True
        )
        for path, output in zip([*paths, ROOT / "tests/ops/neon/check_ids.cpp"], objects, strict=True)
    ]
    for process in compiling:
        message = process.communicate()[1]
        assert process.returncode == 0, message
    subprocess.run([gxx, "-static", "-pthread", *objects, "-o", program], check=True)

    def check(cases) -> str:
        data = folder / "cases.bin"
        with data.open("wb") as file:
            for x, codebook, metric, threads in cases:
                x, codebook = x.contiguous(), codebook.contiguous()
                sizes = (*x.shape[:2], codebook.shape[1], x.shape[2], METRICS.index(metric), threads)
                file.write(struct.pack("<6q", *sizes))
                for array in (x, codebook, reference.vq_assign(x, codebook, metric=metric)):
                    file.write(array.numpy().tobytes())
        result = subprocess.run([*emulator, program, "neon", data], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.strip()

    return check


@pytest.mark.parametrize("metric", METRICS)
def test_the_neon_source_gives_the_same_ids(run, metric):
    """Tile edges, ties, copies, NaN, zero and huge rows, on one thread and on two."""
    cases = []
    shapes = [
        (0, 1, 5, 4),
        (1, 1, 1, 1),
        (7, 2, 31, 3),
        (8, 1, 32, 8),
        (9, 1, 33, 8),
        (17, 2, 257, 5),
        (50, 1, 1025, 8),
    ]
    for rows, groups, codes, width in [*shapes, (11, 1, 100, 40), (3, 1, 70, 600)]:
        cases.append((randn(rows, groups, width), randn(groups, codes, width, seed=1), metric, 1))
        cases.append((randn(rows, groups, width).round(), randn(groups, codes, width, seed=1).round(), metric, 1))
    broken = randn(3, 1, 8)
    broken[0, 0, 3], broken[1, 0, 0], broken[2, 0, 7] = torch.nan, torch.inf, -torch.inf
    ordinary = randn(20, 1, 8, seed=3)
    x = torch.cat([ordinary, torch.zeros(1, 1, 8), broken, ordinary * 1e20, ordinary * 1e-20])
    cases += [(x, codebook, metric, 1) for codebook in adversarial_codebooks(130, 8).values()]
    for seed in range(3):
        x, codebook = near_ties(300, 8, seed)
        cases += [(x.repeat(12, 1, 1), codebook, metric, threads) for threads in (1, 2)]
    assert run(cases) == f"{len(cases)} cases, 0 wrong ids"
