"""The table and the JSON of bench/gpu_check.sh: python bench/gpu_report.py FOLDER

Exits with 1 if a step failed or ran out of time. A refused or absent tool is reported and is no failure.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from meditok import native

QUERY = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "vector-quantize-pytorch", "xformers", "pybind11")


def devices() -> list[dict[str, str]]:
    """What nvidia-smi tells of each GPU; nothing where it is not there."""
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(QUERY, (value.strip() for value in line.split(",")), strict=False)) for line in lines]


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    folder = Path(sys.argv[1])
    report_file = folder / "report.json"
    names = ("step", "outcome", "seconds", "note")
    rows = [dict(zip(names, line.split("\t"), strict=False)) for line in (folder / "rows.tsv").read_text().splitlines()]
    report = {
        "commit": os.environ.get("commit", "unknown"),
        "device": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "devices": devices(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
        "torch_cuda": torch.version.cuda,
        "kernels": native.report(),
        "steps": rows,
        **{
            name: json.loads(path.read_text())
            for name in ("bench", "growth", "attention", "model")
            if (path := folder / f"{name}.json").is_file()
        },
    }
    report_file.write_text(json.dumps(report, indent=1))
    print(f"\n{report['device']}, torch {torch.__version__}, commit {report['commit'][:12]}")
    for row in rows:
        print(f"{row['step']:20s} {row['outcome']:10s} {row['seconds']:>4s} s  {row.get('note', '')}")
    print(f"all of it: {report_file}")
    return int(any(row["outcome"] in ("failed", "timed out") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
