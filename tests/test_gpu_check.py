"""bench/gpu_check.sh where there is nothing to check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench/gpu_check.sh"


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_without_a_cuda_device_it_says_so_and_fails(tmp_path):
    """One line, a non-zero exit, and nothing is built or written."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(["bash", SCRIPT, tmp_path / "out"], capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("gpu_check: no CUDA device is here") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
