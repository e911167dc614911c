"""The polynomial powers of two inside the CPU kernels, against float64 over their whole range."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess

import numpy as np
import pytest

from .helpers import ROOT, levels_here

FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mf16c"],
}


@pytest.fixture(scope="module", params=[(level, op) for level in FLAGS for op in ("attention", "linear")], ids="-".join)
def powers(request, tmp_path_factory):
    """2^t of a float32 array by one instruction-set file, and the file's op."""
    level, op = request.param
    if level not in levels_here():
        pytest.skip(f"this machine lacks {level}")
    if shutil.which("g++") is None or os.uname().machine != "x86_64" or not (ROOT / "csrc").is_dir():
        pytest.skip("g++ on x86_64 and the C++ sources are needed")
    library = tmp_path_factory.mktemp("powers") / "powers.so"
    source = f'-DSOURCE="{op}/{op}_{level}.cpp"'
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-ffp-contract=off", *FLAGS[level], source]
    command = ["g++", *options, f"-I{ROOT / 'csrc'}", ROOT / "tests/ops/powers.cpp", "-o", library]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library), mode=os.RTLD_LAZY).powers

    def run(t: np.ndarray) -> np.ndarray:
        t = np.concatenate([t, np.zeros(-len(t) % 16, np.float32)]).astype(np.float32)
        out = np.empty_like(t)
        function(ctypes.c_void_p(t.ctypes.data), ctypes.c_int64(len(t)), ctypes.c_void_p(out.ctypes.data))
        return out

    return op, run


def test_powers_of_two_are_right_over_the_whole_range(powers):
    """Within 1.1 units in the last place wherever the result is a normal number, and 1 exactly for 0."""
    op, run = powers
    top = 1 if op == "attention" else 126  # attention never raises 2 to more: its maximum is subtracted before
    t = np.linspace(-126, top, 1 << 20, dtype=np.float32)
    halves = np.arange(-252, 2 * top, dtype=np.float32) / 2  # where the whole part changes
    t = np.concatenate([t, halves, np.nextafter(halves, np.float32(-200)), np.nextafter(halves, np.float32(200))])
    t = t[(t >= -126) & (t <= top)]
    found, exact = run(t)[: len(t)].astype(np.float64), np.exp2(t.astype(np.float64))
    error = np.abs(found - exact) / np.exp2(np.floor(np.log2(exact)) - 23)
    assert error.max() <= 1.1, f"{error.max()} units at {t[error.argmax()]}"
    assert run(np.zeros(1, np.float32))[0] == 1


def test_powers_beyond_the_normal_numbers(powers):
    """Attention: right to a subnormal, or 0; -inf gives 0 and NaN stays. Elsewhere t is clamped to -126 and 126."""
    op, run = powers
    t = np.linspace(-200, -126, 10001, dtype=np.float32)
    if op == "attention":
        smallest = 2.0**-149
        flushed = 2.0**-126  # a level without subnormal powers gives 0 for them
        error = np.abs(run(t)[: len(t)].astype(np.float64) - np.exp2(t.astype(np.float64)))
        assert ((error <= smallest) | ((run(t)[: len(t)] == 0) & (np.exp2(t) < flushed))).all()
        special = run(np.array([-np.inf, np.nan], np.float32))
        assert special[0] == 0 and np.isnan(special[1])
    else:
        assert (run(t)[: len(t)] == np.float32(2.0**-126)).all()
        assert run(np.array([1000.0], np.float32))[0] == np.float32(2.0**126)
