"""Images a second through a tokenizer: python bench/bench_model.py [--model tiny] [--threads 2] [--rounds 7]

Times tokenize and detokenize of 256 x 256 images at batch 1 and 16, and the batch-invariant mode that files are written
in; prints p20/p50/p80 and images/s, and appends the rows to bench/results/model.csv. Every mode runs in turn.
"""

from __future__ import annotations

import argparse

import torch
from timing import append_rows, commit, interleave, processor

import meditok
from meditok import native


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a model to load, or a preset to build with random weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        model = meditok.load(options.model)
    except meditok.errors.MissingPartError:
        model = meditok.build(options.model, seed=0)
    images = torch.rand(16, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = model.tokenize(images)
    modes = {
        ("tokenize", 1, False): lambda: model.tokenize(images[:1]),
        ("tokenize", 16, False): lambda: model.tokenize(images),
        ("tokenize", 16, True): lambda: model.tokenize(images, stable=True),
        ("detokenize", 1, False): lambda: model.detokenize(tokens[:1]),
        ("detokenize", 16, False): lambda: model.detokenize(tokens),
        ("detokenize", 16, True): lambda: model.detokenize(tokens, stable=True),
    }
    rows = []
    for (call, batch, stable), (p20, p50, p80) in interleave(modes, options.rounds).items():
        rows.append(
            {
                "call": call,
                "model": options.model,
                "batch": batch,
                "stable": stable,
                "images_per_s": round(batch / p50, 2),
                "p20_ms": round(p20 * 1e3, 2),
                "p50_ms": round(p50 * 1e3, 2),
                "p80_ms": round(p80 * 1e3, 2),
                "threads": options.threads,
                "backend": native.backend,
                "isa": native.isa,
                "device": processor(),
                "torch": torch.__version__,
                "commit": commit(),
            }
        )
        print(
            f"{call:<11} batch {batch:>2} {'stable' if stable else '':<7}{batch / p50:8.1f} images/s   "
            f"p20 {p20 * 1e3:.1f}  p50 {p50 * 1e3:.1f}  p80 {p80 * 1e3:.1f} ms"
        )
    print(f"rows appended to {append_rows('model', rows)}")


if __name__ == "__main__":
    main()
