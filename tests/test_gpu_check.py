"""bench/gpu_check.sh without a GPU: what it says, and its steps with stand-ins for the programs that need one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench/gpu_check.sh"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell script")


def test_without_a_cuda_device_it_says_so_and_fails(tmp_path):
    """One line, a non-zero exit, and nothing is built or written."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(["bash", SCRIPT, tmp_path / "out"], capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("gpu_check: no CUDA device is here") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


PYTHON = """#!/bin/bash
# A python that sees an sm_90 device; the programs it is given end at once.
case "$*" in
    -c*) echo 90 ;;
    *gpu_report.py*) cp "$2/rows.tsv" "$2/seen.tsv" ;;
    *bench_model.py*) echo "broken"; exit 3 ;;
    *) echo "ran $*" ;;
esac
"""
CMAKE = """#!/bin/bash
[[ $1 == --build ]] && touch "$2/_core.so" || { mkdir -p "$4"; echo "$@" > "$4/arguments"; }
"""
SANITIZER = """#!/bin/bash
# One tool passes, under one the program breaks, and one is refused.
case $2 in
    memcheck) printf 'every op ran\n========= ERROR SUMMARY: 0 errors\n' ;;
    racecheck) printf 'Traceback\n========= RACECHECK SUMMARY: 0 hazards displayed\n'; exit 1 ;;
    initcheck) echo "Device not supported"; exit 1 ;;
esac
"""


def test_every_step_is_run_and_its_outcome_noted(tmp_path):
    """Built for the GPU at hand; a refused sanitizer is no failure, one under which the program broke is; a step that
    fails does not end the others; each section of the bench that concerns a GPU is asked for."""
    for name, text in (("python", PYTHON), ("cmake", CMAKE), ("compute-sanitizer", SANITIZER)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": str(tmp_path / "bin/python")}
    result = subprocess.run(["bash", SCRIPT, tmp_path / "out"], capture_output=True, text=True, env=environment)
    assert result.stderr == ""
    rows = [line.split("\t") for line in (tmp_path / "out/seen.tsv").read_text().splitlines()]
    outcomes = {step: outcome for step, outcome, _, _ in rows}
    assert outcomes == {
        **{"build": "ok", "tests": "ok", "bench": "ok", "attention": "ok", "growth": "ok", "model": "failed"},
        **{"sanitizer-memcheck": "ok", "sanitizer-racecheck": "failed", "sanitizer-initcheck": "refused"},
    }
    assert "-DMEDITOK_CUDA_ARCHITECTURES=90a-real" in (tmp_path / "out/build/arguments").read_text()
    asked = (tmp_path / "out/bench.log").read_text()
    assert all(section in asked for section in ("ops", "assign", "worst", "entropy", "training", "large"))
