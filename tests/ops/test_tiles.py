"""The AMX kernel of the linear layers with its tiles in plain memory, on machines with and without AMX."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from meditok.ops import reference

from .helpers import ROOT, levels_here, randn

SIMDE = Path("/usr/include/simde/x86/avx512.h")


@pytest.fixture(scope="module")
def on_tiles(tmp_path_factory):
    """linear(x, norm, weight, gate, bias) by csrc/linear/linear_amx.cpp; its vectors by SIMDe where need be."""
    if shutil.which("g++") is None or os.uname().machine != "x86_64" or not (ROOT / "csrc").is_dir():
        pytest.skip("g++ on x86_64 and the C++ sources are needed")
    if "avx512" in levels_here():
        flags = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]
    elif SIMDE.exists():
        flags = ["-mavx2", "-mfma", f"-I{ROOT / 'tests/ops/simde'}"]
    else:
        pytest.skip("SIMDe is not installed (Debian package libsimde-dev)")
    library = tmp_path_factory.mktemp("tiles") / "tiles.so"
    names = ("tests/ops/tiles", "csrc/linear/linear_cpu", "csrc/linear/linear_scalar", "csrc/common/threads")
    sources = [ROOT / f"{name}.cpp" for name in (*names, "csrc/common/memory")]
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-w", "-ffp-contract=off"]
    defined = ["-DMEDITOK_HAVE_AVX512", "-DMEDITOK_HAVE_AMX", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *options, *defined, *flags, *sources, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).linear_on_tiles

    def run(x, norm, weight, gate, bias):
        out = torch.full((len(x), len(weight)), torch.nan)
        gain, shift = norm or (None, None)
        address = [
            None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (x, gain, shift, weight, gate, bias, out)
        ]
        sizes = [ctypes.c_long(n) for n in (*x.shape, len(weight))]
        function(address[0], *sizes[:2], *address[1:6], sizes[2], address[6])
        return out

    return run


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_products_of_parts_are_as_exact_as_float32(on_tiles, gated, normed):
    """Around tiles of 16 rows, steps of 32 values and panels of 32 columns: error at most twice that of PyTorch."""
    for rows, width, columns in [(1, 1, 1), (15, 31, 17), (16, 32, 16), (17, 33, 31), (33, 65, 33), (50, 200, 100)]:
        x, bias = randn(rows, width, scale=2), randn(columns, seed=1)
        weight, gate = (randn(columns, width, seed=seed, scale=width**-0.5) for seed in (2, 3))
        gate, norm = gate if gated else None, (randn(width, seed=4), randn(width, seed=5)) if normed else None
        found = on_tiles(x, norm, weight, gate, bias)

        def plain(dtype, x=x, norm=norm, weight=weight, gate=gate, bias=bias):
            cast = [None if t is None else t.to(dtype) for t in (x, weight, bias, None, gate, bias)]
            norms = [] if norm is None else [t.to(dtype) for t in norm]
            return reference.linear(*cast, norms, [1e-6] * bool(norms), "none" if gate is not None else "gelu")

        exact = plain(torch.float64)
        error, peer = (found - exact).abs().max(), (plain(torch.float32) - exact).abs().max()
        assert error <= max(2 * peer, 1e-6 * exact.abs().max()), (
            f"{rows} x {width} x {columns}: {error:.1e}, {peer:.1e}"
        )


def test_infinities_are_what_they_are_in_float32(on_tiles):
    """Infinity has no parts: rows that meet one are computed by plain loops, and no other row is touched."""
    x, weight, bias = randn(20, 40), randn(10, 40, seed=1), randn(10, seed=2)
    x[3, 5], x[7, 1] = torch.inf, torch.nan
    found, wanted = (
        on_tiles(x, None, weight, None, bias),
        torch.nn.functional.gelu(x.double() @ weight.double().T + bias),
    )
    torch.testing.assert_close(found, wanted.float(), equal_nan=True, rtol=1e-5, atol=1e-6)
