"""Small tokenizers of equal bytes side by side: python bench/bench_tiny_candidates.py --data DIR [--candidates A B ...]

Each is trained by the recipe of tiny-stage1 (without its teacher, whose cost is the same for all) for the same number
of steps, and scored by `meditok evaluate` on the held-out split: PSNR, SSIM, ST-LPIPS, the least used codebook, and
images tokenised a second at 256 px. Every one writes 96 bits a patch of 16 px and stays under 12 MB in float16. Rows
are appended to results/tiny_candidates.csv; a candidate takes some two minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from timing import append_rows, commit, interleave, processor

import meditok
from meditok.cli import run as command
from meditok.train import run
from meditok.train.config import load_config

COLUMNS = (
    *("candidate", "what", "parameters_m", "steps", "fit_s", "train_s", "psnr", "ssim", "stlpips", "usage_min"),
    *("tokenized_per_s", "threads", "device", "commit"),
)
CANDIDATES = {
    "tiny": ("the bundled architecture", {}),
    "convolutions": ("3 convolution blocks on the token grid at each end in place of the decoder's transformer",
                     {"decoder_depth": 0, "grid_depth": 3}),
    "wide-overlap": ("patches that reach 8 px beyond their own", {"overlap": 8}),
    "no-overlap": ("patches that do not overlap", {"overlap": 0}),
    "16-books": ("16 codebooks of 64 codes and 4 dims", {"num_codebooks": 16, "codebook_size": 64, "code_dim": 4}),
    "stages": ("ViTamin's convolution stages for ends, from random weights", {
        "ends": "stages", "overlap": 0, "grid_depth": 0, "stem_width": 32, "stage_widths": [32, 64],
        "stage_depths": [1, 2], "decoder_widths": [64, 32], "decoder_depths": [2, 1]}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--patches", type=int, default=32_768, help="that the start is fitted to")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.candidates:
        row = measured(name, options)
        print(row)
        append_rows("tiny_candidates", [{key: row.get(key, "") for key in COLUMNS}])


def measured(name: str, options) -> dict:
    what, changes = CANDIDATES[name]
    settings = {
        "data": options.data, "include": "train/*", "weights_ok": "true", "check": "open", "steps": options.steps,
        "contrastive": 0.0, "start_patches": options.patches, "store": "float16",
        "model": json.dumps({"embed_dim": 0} | changes),
        "sheet_every": options.steps + 1, "log_every": options.steps,
    }  # fmt: skip
    if changes.get("ends") == "stages":  # nothing is fitted: everything learns, at the rates of a random start
        settings |= {"start": "", "encoder_lr": 1.0, "codebook_update": "ema", "vq": 1.0}
    config = load_config("tiny-stage1", [f"{key}={value}" for key, value in settings.items()])
    with tempfile.TemporaryDirectory() as folder:
        began, told = time.perf_counter(), []
        path = run.start(config, Path(folder), device="cpu", report=told.append)
        spent, trained = time.perf_counter() - began, options.steps * config.batch / told[-1]["images_per_s"]
        scores = evaluated(path, options.data)
        model = meditok.load(path, device="cpu")
    x = torch.rand(8, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    p50 = interleave({"tokenize": lambda: model.tokenize(x)}, 7, "cpu")["tokenize"][1]
    return {
        "candidate": name,
        "what": what,
        "parameters_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "steps": options.steps,
        "fit_s": round(spent - trained),
        "train_s": round(trained),
        **scores,
        "tokenized_per_s": round(len(x) / p50, 1),
        "threads": options.threads,
        "device": processor("cpu"),
        "commit": commit(),
    }


def evaluated(path: Path, data: str) -> dict:
    report = path.with_name("metrics.json")
    arguments = ["evaluate", str(Path(data, "train")), "--model", str(path), "--json", str(report), "--quiet"]
    if code := command([*arguments, "--perceptual", "stlpips-alexnet"]):
        raise SystemExit(f"meditok evaluate ended with {code}")
    found = json.loads(report.read_text())["models"][0]
    overall = found["overall"]
    return {
        "psnr": round(overall["psnr"], 2),
        "ssim": round(overall["ssim"], 4),
        "stlpips": round(overall["st_lpips"], 4),
        "usage_min": round(found["codebook"]["usage_min"], 4),
    }


if __name__ == "__main__":
    main()
