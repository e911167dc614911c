"""The CPU kernels with the NEON sources, cross-compiled for 64-bit Arm and run under qemu-user, give the results of the
reference and, in training, those of this machine bit for bit."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess

import pytest
import torch

from meditok import ops
from meditok.ops import reference

from .helpers import CPU_SOURCES, METRICS, ROOT, adversarial_codebooks, has_native, near_ties, randn

SOURCES = (*CPU_SOURCES, "vq/vq_train_backward", "vq/vq_neon", "vq/vq_large_dim_neon")


def compiler() -> tuple[str, list[str]]:
    """(g++ for 64-bit Arm, what runs its programs)."""
    if os.uname().machine == "aarch64" and shutil.which("g++"):
        return "g++", []
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if shutil.which("aarch64-linux-gnu-g++") is None or emulator is None:
        pytest.skip("the Arm compiler is not installed (Debian packages g++-aarch64-linux-gnu and qemu-user)")
    return "aarch64-linux-gnu-g++", [emulator]


def trained(x, codebook, ids, metric) -> list[torch.Tensor]:
    """What check_ops.cpp computes of a training step, by the kernels of this machine."""
    _, _, loss, counts = ops.vq_quantize(x, codebook, metric=metric)
    settings = dict(metric=metric, commitment_weight=0.25, codebook_weight=1.0, rotation=False)
    gradients = torch.ops.meditok.vq_quantize_backward(x, torch.tensor(1.0), x, codebook, ids, None, **settings)
    moved, ema_counts, sums = codebook.clone(), torch.ones(codebook.shape[:2]), ops.vq_stats(x, ids, codebook.shape[1])
    ops.vq_update_(moved, ema_counts, codebook.clone(), *sums, decay=0.9, eps=1e-5, metric=metric)
    return [loss, counts, *gradients, sums[1], moved]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(cases, training): checks [(x, codebook, metric, threads)] on Arm; returns what it printed."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the C++ sources are not beside the tests")
    gxx, emulator = compiler()
    folder = tmp_path_factory.mktemp("neon")
    paths = [ROOT / "csrc" / f"{name}.cpp" for name in SOURCES]
    flags = "-std=c++17 -O2 -static -pthread -ffp-contract=off -Wall -Wextra -Werror -DMEDITOK_HAVE_NEON".split()
    objects = [folder / f"{i}.o" for i in range(len(paths) + 1)]
    program = folder / "check_ops"
    compiling = [
        subprocess.Popen(
            [gxx, *flags, f"-I{ROOT / 'csrc'}", "-c", path, "-o", output], stderr=subprocess.PIPE, text=True
        )
        for path, output in zip([*paths, ROOT / "tests/ops/neon/check_ops.cpp"], objects, strict=True)
    ]
    for process in compiling:
        message = process.communicate()[1]
        assert process.returncode == 0, message
    subprocess.run([gxx, "-static", "-pthread", *objects, "-o", program], check=True)

    def check(cases, training: bool = False) -> str:
        data = folder / "cases.bin"
        with data.open("wb") as file:
            for x, codebook, metric, threads in cases:
                x, codebook = x.contiguous(), codebook.contiguous()
                sizes = (*x.shape[:2], codebook.shape[1], x.shape[2], METRICS.index(metric), threads, training)
                file.write(struct.pack("<7q", *sizes))
                ids = reference.vq_assign(x, codebook, metric=metric)
                results = [ids, reference.vq_lookup(ids, codebook, metric=metric)]
                if training:
                    results += trained(x, codebook, ids, metric)
                for array in (x, codebook, *results):
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
    assert run(cases) == f"{len(cases)} cases, 0 wrong"


@pytest.mark.skipif(not has_native(), reason="the compiled core does not run")
def test_training_on_arm_gives_the_bits_of_this_machine(run):
    """Rows of ids, loss, counts, both gradients, statistics and moved codes, narrow and wide, sorted and in passing."""
    cases = [
        (randn(rows, groups, width), randn(groups, codes, width, seed=1), metric, threads)
        for rows, groups, codes, width in [(130, 2, 60, 8), (70, 1, 33, 5), (40, 1, 50, 70)]
        for metric in METRICS
        for threads in (1, 2)
    ]
    assert run(cases, training=True) == f"{len(cases)} cases, 0 wrong"
