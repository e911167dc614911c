"""Tokens a second from a store to int64 batches, against Hugging Face datasets over the same file, in one process.

python bench/bench_store.py [--rows 16384] [--rounds 5]: a synthetic store of 8 x 16 x 16 random ids of 4,096 a row.
Appends to results/store.csv.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import torch
from timing import append_rows, commit, interleave, processor

from meditok import TokenDataset, TokenStream
from meditok.tokens import Description, TokenInfo
from meditok.tokens.store import StoreWriter

BATCH = 256


def make_store(path: Path, rows: int) -> None:
    info = TokenInfo("bench", "a" * 64, "b" * 64, 8, 4096, (16, 16))
    rng = np.random.default_rng(0)
    with StoreWriter(path, info) as writer:
        for start in range(0, rows, 512):
            ids = rng.integers(0, 4096, (512, 8, 256)).astype(np.uint16)
            writer.write(ids, [Description(f"{i:032x}", 256, 256) for i in range(start, start + 512)])
        writer.close("bench")


def main() -> None:
    import datasets

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        make_store(store, options.rows)
        order = np.random.default_rng(1).permutation(options.rows).reshape(-1, BATCH).tolist()
        data = TokenDataset(store)
        theirs = datasets.load_dataset(
            "parquet", data_files=str(store / "*.parquet"), split="train", cache_dir=str(Path(folder) / "cache")
        )
        theirs = theirs.select_columns("tokens").with_format("torch")
        candidates = {
            "TokenStream, in order": lambda: sum(ids.shape[0] for ids in TokenStream(store, BATCH)),
            "TokenStream, shuffled": lambda: sum(ids.shape[0] for ids in TokenStream(store, BATCH, shuffle=True)),
            "TokenStream, shuffled, as sequences": lambda: sum(
                ids.shape[0] for ids in TokenStream(store, BATCH, "position", shuffle=True)
            ),
            "TokenDataset, opening": lambda: TokenDataset(store),
            "TokenDataset, random batches": lambda: [torch.stack(data.__getitems__(batch)) for batch in order],
            "datasets, random batches": lambda: [theirs[batch]["tokens"] for batch in order],
        }
        found = interleave(candidates, options.rounds)
    tokens, rows = options.rows * 2048, []
    for name, (p20, p50, p80) in found.items():
        times = f"p20 {p20:.3f} s, p50 {p50:.3f} s, p80 {p80:.3f} s"
        print(f"{name:<36} {tokens / p50 / 1e6:8.1f} million tokens/s  ({times})")
        rows.append(
            {
                "name": name,
                "rows": options.rows,
                "batch": BATCH,
                "mtokens_per_s": round(tokens / p50 / 1e6, 1),
                "p20_s": round(p20, 4),
                "p50_s": round(p50, 4),
                "p80_s": round(p80, 4),
                "threads": 1,
                "load": round(os.getloadavg()[0], 1),
                "device": processor(),
                "torch": torch.__version__,
                "pyarrow": pyarrow.__version__,
                "datasets": datasets.__version__,
                "commit": commit(),
            }
        )
    print(f"rows appended to {append_rows('store', rows)}")


if __name__ == "__main__":
    main()
