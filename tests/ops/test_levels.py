"""Every instruction set: chosen by the environment in a fresh interpreter, or emulated where the machine
lacks it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from meditok import native
from meditok.ops import reference
from meditok.ops._library import FLOATS

from .helpers import (
    CPU_SOURCES,
    LEVELS,
    METRICS,
    ROOT,
    adversarial_codebooks,
    assert_same_ids,
    levels_here,
    near_ties,
    quantisation_edges,
    randn,
    run_python,
)

needs_core = pytest.mark.skipif(native.backend != "native", reason="the compiled core does not run")

ASSIGN = """
import torch
from meditok import native, ops
from meditok.ops import reference
generator = torch.Generator().manual_seed(5)
x, codebook = torch.randn(300, 2, 8, generator=generator), torch.randn(2, 1000, 8, generator=generator)
for metric in ("cosine", "l2"):
    assert torch.equal(ops.vq_assign(x, codebook, metric=metric), reference.vq_assign(x, codebook,
    metric=metric))
qkv = torch.randn(2, 40, 3, 3, 24, generator=generator)
for reduce in (None, "mean"):
    found, right = (op(qkv, is_causal=True, reduce=reduce) for op in (ops.attention_qkv, reference.attention_qkv))
    torch.testing.assert_close(found, right)
assert native.core.call_counts()["attention"] == (0 if native.isa == "neon" else 2)
print(native.backend, native.isa)
"""


@needs_core
@pytest.mark.parametrize("level", LEVELS)
def test_each_level_by_environment(level):
    """MEDITOK_ISA chooses the level of a fresh interpreter; one that is not there is an error naming what
    is."""
    result = run_python(ASSIGN, MEDITOK_ISA=level)
    if level in levels_here():
        assert result.stdout.split() == ["native", level], result.stderr
    else:
        assert result.returncode != 0
        message = result.stderr.strip().splitlines()[-1]
        assert level in message and "this machine has" in message and "scalar" in message


@needs_core
def test_the_best_level_is_chosen_without_a_wish():
    """No MEDITOK_ISA: the best level that is compiled and present."""
    assert run_python(ASSIGN, MEDITOK_ISA="").stdout.split() == ["native", levels_here()[-1]]


FORK = """
import os, torch, warnings
from meditok import ops
from meditok.ops import reference
warnings.simplefilter("ignore")
torch.set_num_threads(2)
x, codebook = torch.randn(2000, 1, 8), torch.randn(1, 1000, 8)
expected = ops.vq_assign(x, codebook)
for generation in range(3):
    child = os.fork()
    if child == 0:
        same = torch.equal(ops.vq_assign(x, codebook), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
assert torch.equal(ops.vq_assign(x, codebook), expected)
print("fine")
"""


@needs_core
def test_the_thread_pool_survives_fork():
    """A forked child computes with a pool of its own, and the parent goes on with its own."""
    result = run_python(FORK)
    assert result.stdout.strip() == "fine", result.stderr


PARALLEL = """
import threading, torch
from meditok import ops
torch.set_num_threads(2)
x, codebook = torch.randn(2000, 1, 8), torch.randn(1, 1000, 8)
expected, found = ops.vq_assign(x, codebook), []
def work():
    for _ in range(20):
        found.append(torch.equal(ops.vq_assign(x, codebook), expected))
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
assert len(found) == 80 and all(found)
print("fine")
"""


@needs_core
def test_callers_in_many_threads_share_the_pool():
    """Four Python threads call at once; nobody waits forever and every answer is right."""
    result = run_python(PARALLEL)
    assert result.stdout.strip() == "fine", result.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The CPU kernels with both AVX-512 sources on SIMDe."""
    header = Path("/usr/include/simde/x86/avx512.h")
    if not header.exists():
        pytest.skip("SIMDe is not installed (Debian package libsimde-dev)")
    if shutil.which("g++") is None or os.uname().machine != "x86_64":
        pytest.skip("g++ on x86_64 is needed")
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the C++ sources are not beside the tests")
    folder = tmp_path_factory.mktemp("simde")
    names = [*CPU_SOURCES, "attention/attention_scalar", "attention/attention_cpu", "attention/attention_avx512"]
    names += [
        "vq/vq_avx512",
        "vq/vq_avx512vnni",
        "vq/vq_large_dim_avx512",
        "vq/vq_large_dim_avx512vnni",
        "vq/vq_train_rows_avx512",
    ]
    sources = [*(ROOT / "csrc" / f"{name}.cpp" for name in names), ROOT / "tests/ops/simde_assign.cpp"]
    sources.append(ROOT / "tests/ops/simde_attention.cpp")
    objects = [folder / f"{source.stem}.o" for source in sources]
    library = folder / "libassign.so"
    flags = "-std=c++17 -O1 -fPIC -pthread -mavx2 -mfma -mf16c -ffp-contract=off -DMEDITOK_SIMDE".split()
    flags += [
        "-DMEDITOK_HAVE_AVX512",
        "-DMEDITOK_HAVE_AVX512VNNI",
        f"-I{ROOT / 'tests/ops/simde'}",
        f"-I{ROOT / 'csrc'}",
    ]
    compiling = [
        subprocess.Popen(["g++", *flags, "-c", source, "-o", output], stderr=subprocess.PIPE, text=True)
        for source, output in zip(sources, objects, strict=True)
    ]
    for process in compiling:
        message = process.communicate()[1]
        assert process.returncode == 0, message
    subprocess.run(["g++", "-shared", "-pthread", *objects, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.assign.argtypes = [
        ctypes.c_char_p,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_long] * 4,
        *[ctypes.c_int] * 2,
        ctypes.c_void_p,
    ]
    loaded.attend.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_long] * 4, ctypes.c_int, ctypes.c_void_p]
    return loaded


@pytest.fixture(params=["avx512", "avx512vnni"])
def emulated(library, request):
    """assign(x, codebook, metric, threads) through one of them."""

    def assign(x, codebook, metric, threads=1):
        x, codebook = x.contiguous(), codebook.contiguous()
        ids = torch.empty(x.shape[:2], dtype=torch.int64)
        sizes = (*x.shape[:2], codebook.shape[1], x.shape[2])
        code = METRICS.index(metric)
        level = request.param.encode()
        assert library.assign(level, x.data_ptr(), codebook.data_ptr(), *sizes, code, threads, ids.data_ptr()) == 0
        return ids

    return assign


@pytest.mark.parametrize("metric", METRICS)
def test_the_avx512_sources_give_the_same_ids(emulated, metric):
    """Shapes around the tile edges, adversarial codebooks and near ties through the emulated AVX-512 files."""
    for rows, codes, width in [
        (100, 130, 33),  # wide rows: their own kernels
        (25, 33, 330),
        (1, 1, 3),
        (5, 31, 2),
        (9, 130, 5),
        (13, 70, 12),
        (11, 65, 17),
        (5, 64, 32),
        (1, 1, 1),
        (7, 33, 3),
        (8, 257, 8),
        (9, 4099, 8),
        (17, 100, 40),
        (50, 1025, 4),
        (100, 130, 33),  # wide rows: their own kernels
        (25, 33, 330),
    ]:
        x, codebook = randn(rows, 2, width), randn(2, codes, width, seed=1)
        expected = reference.vq_assign(x, codebook, metric=metric)
        assert_same_ids(emulated(x, codebook, metric), expected, f"{rows} {codes} {width}")
    for width in (3, 8, 31, 32):
        x, codebook = quantisation_edges(width, seed=width)
        assert_same_ids(
            emulated(x, codebook, metric), reference.vq_assign(x, codebook, metric=metric), f"edges {width}"
        )
        x, codebook = quantisation_edges(width, seed=width, steps=127)
        codebook = torch.cat([codebook, randn(1, 1500, width, seed=1)], dim=1)  # enough for the 8-bit filter
        expected = reference.vq_assign(x, codebook, metric=metric)
        assert_same_ids(emulated(x, codebook, metric), expected, f"edges of 8 bits {width}")
    ordinary = randn(40, 1, 8, seed=3)
    x = torch.cat([ordinary, torch.zeros(1, 1, 8), ordinary * 1e20, torch.full((1, 1, 8), torch.nan)])
    for name, codebook in adversarial_codebooks(333, 8).items():
        assert_same_ids(emulated(x, codebook, metric), reference.vq_assign(x, codebook, metric=metric), name)
    cone = randn(1, 1, 8, seed=1) + 0.01 * randn(1, 500, 8, seed=2)
    x = torch.cat([ordinary, cone[0, ::9, None] + 0.005 * randn(56, 1, 8, seed=3)])
    assert_same_ids(emulated(x, cone, metric), reference.vq_assign(x, cone, metric=metric), "a narrow cone")
    for seed in range(4):
        x, codebook = near_ties(300, 8, seed)
        x = x.repeat(20, 1, 1)
        expected = reference.vq_assign(x, codebook, metric=metric)
        for threads in (1, 2, 3):
            assert_same_ids(emulated(x, codebook, metric, threads), expected, "near ties")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_avx512_attention_is_right(library, dtype, causal):
    """Result and gradients of the emulated attention around its tiles and blocks, as near as PyTorch's."""
    for queries, keys, width in [(1, 1, 1), (13, 33, 17), (25, 12, 64), (50, 300, 24)]:
        q, k, v, weight = (
            randn(2, n, width, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys, queries))
        )
        results = [torch.empty_like(x) for x in (q, q, k, v)]
        addresses = (x.data_ptr() for x in (q, k, v, weight))
        outputs = (ctypes.c_void_p * 4)(*(x.data_ptr() for x in results))
        assert library.attend(*addresses, 2, queries, keys, width, FLOATS[dtype] + 8 * causal, outputs) == 0
        right = [x.double().requires_grad_() for x in (q, k, v)]
        out = reference.attention(*(x[None] for x in right), is_causal=causal)[0]
        grads = torch.autograd.grad((out * weight.double()).sum(), right)
        for found, expected in zip(results, (out, *grads), strict=True):
            error = float((found.double() - expected.detach()).abs().max())
            allowed = 16 * torch.finfo(dtype).eps * max(1.0, float(expected.detach().abs().max()))
            assert error <= allowed, f"{queries} x {keys} x {width}: {error:.1e}"
