"""Interleaved timing on a noisy machine, and the peak it is measured against.

All candidates of a comparison run round by round in turn, so that a slow minute hits each of them, with the caches
flushed before each; medians and the 20th and 80th percentile of the rounds are reported, and ratios of medians.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
FLUSH_BYTES = 128 << 20  # more than any last-level cache met so far

PEAK_SOURCE = """
#include <chrono>
extern "C" double peak(long rounds) {
    typedef float vec __attribute__((vector_size(WIDTH * 4)));
    vec sums[CHAINS];
    for (int i = 0; i < CHAINS; ++i) sums[i] = vec{} + 1.0f;
    vec a = vec{} + 0.999999f, b = vec{} + 1e-7f;
    auto start = std::chrono::steady_clock::now();
    for (long r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * a + b;
    }
    for (int i = 0; i < CHAINS; ++i) asm volatile("" ::"x"(sums[i]));  // done before the clock is read
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    float total = 0;
    for (int i = 0; i < CHAINS; ++i) total += sums[i][0];
    return total == 12345 ? 0 : 2.0 * WIDTH * CHAINS * rounds / seconds;
}
"""


def measured_peak(isa: str) -> float:
    """Multiply-adds of one thread in registers, in FLOP/s, at the vector width of `isa`; nan without g++."""
    if shutil.which("g++") is None:
        return float("nan")
    width, flags = (16, ["-mavx512f"]) if isa.startswith("avx512") else (8, ["-mavx2", "-mfma"])
    if isa in ("scalar", "neon"):
        width, flags = 4, []
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.cpp"), Path(folder, "peak.so")
        source.write_text(PEAK_SOURCE)
        options = [*flags, "-O3", "-ffp-contract=fast", f"-DWIDTH={width}", "-DCHAINS=12", "-shared", "-fPIC"]
        subprocess.run(["g++", *options, source, "-o", library], check=True)
        entry = ctypes.CDLL(str(library)).peak
    entry.restype, entry.argtypes = ctypes.c_double, [ctypes.c_long]
    return max(entry(2_000_000) for _ in range(7))


def measured_cuda_peak() -> float:
    """Rate of torch's float32 product of 8,192 x 8,192 matrices with TF32 off, in FLOP/s."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a = torch.randn(8192, 8192, device="cuda")
    seconds = interleave({"mm": lambda: a @ a}, 7, "cuda")["mm"][1]
    return 2.0 * 8192**3 / seconds


def measured_gemm(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Rate of torch's own product of square matrices (2,048 on a CPU, 8,192 on CUDA, TF32 off), in FLOP/s."""
    if device == "cuda" and dtype == torch.float32:
        return measured_cuda_peak()
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / interleave({"mm": lambda: a @ a}, 5, device)["mm"][0]


def interleave(candidates: dict[str, Callable[[], object]], rounds: int = 7, device: str = "cpu"):
    """{name: (p20, p50, p80)} in seconds over `rounds` rounds in turn, after one warm-up of each; on CUDA by events."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    flush = torch.zeros(FLUSH_BYTES // 4, device=device)
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            flush.add_(1)
            times[name].append(_cuda_seconds(run) if device == "cuda" else _seconds(run))
    return {name: tuple(np.percentile(values, (20, 50, 80))) for name, values in times.items()}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_memory(run: Callable[[], object], device: str = "cpu") -> float:
    """MiB that one call holds at most beyond what was held before; nan where the system does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is given back, and counts again where it is needed
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over
    except OSError:
        return float("nan")
    before = _status("VmRSS")
    run()
    return max(0.0, _status("VmHWM") - before) / 1024


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field)))


def processor(device: str = "cpu") -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def section_options(doc: str, name: str, sections) -> argparse.Namespace:
    """What a bench made of named sections is asked on the command line; an unknown section ends it."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--only", default=",".join(sections), help=f"sections, of {', '.join(sections)}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="write the rows there as JSON")
    parser.add_argument("--save", action="store_true", help=f"append the rows to bench/results/{name}.csv")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - set(sections)
    if unknown:
        parser.error(f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    return options


def append_rows(name: str, rows: list[dict]) -> Path:
    """Appends rows to results/NAME.csv, with a header when the file is new; other columns there are an error."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    new = not path.exists()
    if not new and path.open().readline().strip().split(",") != list(rows[0]):
        raise SystemExit(f"{path}: has other columns than these rows; move it away first")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: str | Path, rows: list[dict]) -> None:
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")
