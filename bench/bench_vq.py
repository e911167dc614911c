"""vq_assign against the ways people do it today: python bench/bench_vq.py [--threads 1] [--rows 4096] [--rounds 9]

Prints p20/p50/p80, GFLOP/s (2 C per pair), the share of the machine's measured multiply-add peak, the ratio to ours,
and how many ids differ from the float64 answer; appends the rows to bench/results/vq.csv.
"""

from __future__ import annotations

import argparse

import torch
from timing import append_rows, commit, interleave, measured_peak, processor

from meditok import native, ops
from meditok.ops import reference


def eager(x: torch.Tensor, codebook: torch.Tensor, metric: str) -> torch.Tensor:
    """The published way: normalise, one product, argmax (or the expanded distance and argmin)."""
    if metric == "cosine":
        unit = torch.nn.functional.normalize(codebook, dim=-1)
        return torch.einsum("ngc,gkc->ngk", torch.nn.functional.normalize(x, dim=-1), unit).argmax(-1)
    product = torch.einsum("ngc,gkc->ngk", x, codebook)
    return (codebook.square().sum(-1) - 2 * product).argmin(-1)


def product_quantizer(x: torch.Tensor, codebook: torch.Tensor):
    """faiss.ProductQuantizer.compute_codes on the same (normalised) codebooks, or None without faiss."""
    try:
        import faiss
    except ImportError:
        return None
    groups, codes, width = codebook.shape
    bits = codes.bit_length() - 1
    if 1 << bits != codes:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    quantizer = faiss.ProductQuantizer(groups * width, groups, bits)
    unit = torch.nn.functional.normalize(codebook, dim=-1)
    faiss.copy_array_to_vector(unit.reshape(-1).numpy(), quantizer.centroids)
    rows = torch.nn.functional.normalize(x, dim=-1).reshape(x.shape[0], -1).numpy()
    return lambda: quantizer.compute_codes(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shape", default="8,4096,8", help="codebooks, codes, width")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    groups, codes, width = map(int, options.shape.split(","))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.rows, groups, width, generator=generator)
    codebook = torch.randn(groups, codes, width, generator=generator)
    peak = measured_peak(native.isa or "scalar") * options.threads
    flop = 2.0 * options.rows * groups * codes * width
    rows = []
    for metric in ("cosine", "l2"):
        packed = ops.pack_codebook(codebook, metric=metric)
        candidates = {
            "meditok packed": lambda packed=packed, metric=metric: ops.vq_assign(x, packed, metric=metric),
            "meditok": lambda metric=metric: ops.vq_assign(x, codebook, metric=metric),
            "torch eager": lambda metric=metric: eager(x, codebook, metric),
        }
        quantizer = product_quantizer(x, codebook) if metric == "cosine" else None
        if quantizer is not None:
            candidates["faiss ProductQuantizer"] = quantizer
        exact = reference.vq_assign(x[:512], codebook, metric=metric)
        times = interleave(candidates, options.rounds)
        ours = times["meditok packed"][1]
        print(f"{metric}, {options.rows} x {groups} x {codes} x {width}, {options.threads} thread(s), isa {native.isa}")
        for name, (p20, p50, p80) in times.items():
            wrong = ""
            if "faiss" not in name:
                wrong = int((candidates[name]()[:512] != exact).sum())
            print(
                f"  {name:24s} {p20 * 1e3:9.2f} {p50 * 1e3:9.2f} {p80 * 1e3:9.2f} ms {flop / p50 / 1e9:7.1f} GFLOP/s "
                f"{flop / p50 / peak:5.0%} of peak {p50 / ours:6.2f} x  wrong {wrong}"
            )
            rows.append(
                {
                    "commit": commit(), "device": processor(), "torch": torch.__version__, "isa": native.isa,
                    "threads": options.threads, "op": "vq_assign", "metric": metric, "name": name,
                    "rows": options.rows, "groups": groups, "codes": codes, "width": width,
                    "p20_ms": round(p20 * 1e3, 3), "p50_ms": round(p50 * 1e3, 3), "p80_ms": round(p80 * 1e3, 3),
                    "gflops": round(flop / p50 / 1e9, 1), "share_of_peak": round(flop / p50 / peak, 3),
                    "ratio_to_packed": round(p50 / ours, 2), "wrong_of_512_rows": wrong,
                }
            )  # fmt: skip
    print(f"peak {peak / 1e9:.1f} GFLOP/s; rows in {append_rows('vq', rows).name}")


if __name__ == "__main__":
    main()
