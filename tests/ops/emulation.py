"""Builds the CUDA sources of an op with g++, so that they run on the CPU by fibers (tests/ops/cuda_emulation)."""

from __future__ import annotations

import ctypes
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .helpers import ROOT

# kernel<<<grid, threads, shared bytes, stream>>>(arguments);
LAUNCH = re.compile(r"(\w+(?:<[\w, ]+>)?)\s*<<<(.+?), (\w+), ([\w.]+), [^>]+>>>\(\s*(.*?)\);", re.DOTALL)
DYNAMIC_SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
HERE = Path(__file__).parent / "cuda_emulation"
FLAGS = "-std=c++17 -O1 -fPIC -ffp-contract=off -mfma -D__CUDACC__ -w -include cuda_runtime.h".split()


def translated(path: Path) -> str:
    text = LAUNCH.sub(r"emulation::emulate(\2, \3, \4, [&] { \1(\5); });", path.read_text())
    text = DYNAMIC_SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(emulation::shared);", text)
    assert "<<<" not in text and "extern __shared__" not in text, path
    return text


def build(folder: Path, op: str) -> ctypes.CDLL:
    """Every kernel of csrc/OP and the entries of cuda_emulation/OP_*.cpp, in one library."""
    (folder / op).mkdir()
    for header in (ROOT / "csrc" / op).glob("*.cuh"):
        (folder / op / header.name).write_text(translated(header))
    files = [*HERE.glob(f"{op}_*.cpp")]
    for source in [*(ROOT / "csrc" / op).glob("*.cu"), ROOT / f"csrc/{op}/{op}_cuda.cpp"]:
        files.append(folder / f"{source.name}.cpp")
        files[-1].write_text(translated(source))
    include = [f"-I{folder}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    objects = [folder / f"{file.name}.o" for file in files]

    def compile_one(file: Path, target: Path) -> None:
        result = subprocess.run(["g++", *FLAGS, *include, "-c", file, "-o", target], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, files, objects))
    library = folder / "libkernels.so"
    subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
    return ctypes.CDLL(str(library))
