"""Attention against PyTorch's own ways, forward and forward + backward.

    python bench/bench_attention.py [--only main,sizes,widths,batch,mean,half,small] [--threads 1] [--rounds 9]
                                    [--device cpu|cuda] [--json FILE] [--save]

Everybody reads the same packed projections (B, N, 3, H, D) and owes (B, N, H * D), as a transformer has it. Prints
p20/p50/p80, GFLOP/s (4 N M D a head forward, 10 more backward, half of it where causal), the share of the machine's
measured multiply-add peak, the memory a call takes beyond its inputs and the ratio to ours; --save appends the rows to
bench/results/attention.csv.
"""

from __future__ import annotations

import argparse
import importlib.util

import torch
import torch.nn.functional as F
from timing import (
    append_rows,
    commit,
    interleave,
    measured_cuda_peak,
    measured_peak,
    peak_memory,
    processor,
    section_options,
    write_json,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from meditok import native, ops

MAIN = (4, 256, 16, 64)  # batch, tokens, heads, width: four images of vitamin-large
SIZES = [(4, n, 16, 64) for n in (16, 64, 128, 196, 257, 512, 1024)] + [(1, 4096, 4, 64)]
WIDTHS = [(4, 256, 16, d) for d in (8, 32, 48, 96, 128)]
BATCHES = [(b, 256, 16, 64) for b in (1, 16)]
SECTIONS = ("main", "sizes", "widths", "batch", "mean", "half", "small")
LIBRARIES = {"cpu": ("FLASH_ATTENTION", "MATH"), "cuda": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")}


def peers(device: str, causal: bool, reduce: str | None) -> dict:
    """{name: function of qkv} of what PyTorch, and xformers where installed, have."""

    def sdpa(backend):
        def run(qkv):
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            with sdpa_kernel(backend):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
            return y.mean(2) if reduce else y.flatten(2)

        return run

    found = {f"SDPA {name.split('_')[0].lower()}": sdpa(getattr(SDPBackend, name)) for name in LIBRARIES[device]}
    if device == "cuda" and importlib.util.find_spec("xformers"):
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        def xformers(qkv):
            y = memory_efficient_attention(*qkv.unbind(2), attn_bias=LowerTriangularMask() if causal else None)
            return y.mean(2) if reduce else y.flatten(2)

        found["xformers"] = xformers
    return found


def with_backward(function, qkv: torch.Tensor):
    """A call that runs forward and backward; a new leaf each time, so that nothing is accumulated."""
    weight = torch.randn_like(function(qkv))

    def run():
        x = qkv.detach().requires_grad_()
        return torch.autograd.grad(function(x), x, weight)[0]

    return run


class Bench:
    """Options, the machine, and the rows so far."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, options.device
        torch.set_num_threads(options.threads)
        cuda = self.device == "cuda"
        self.peak = measured_cuda_peak() if cuda else measured_peak(native.isa or "scalar") * options.threads
        self.rows: list[dict] = []

    def compare(self, shape, *, causal=False, reduce=None, dtype=torch.float32, backward=(False, True)) -> None:
        batch, tokens, heads, width = shape
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator).to(self.device, dtype)

        def ours(x):
            return ops.attention_qkv(x, is_causal=causal, reduce=reduce)

        functions = {"meditok": ours, **peers(self.device, causal, reduce)}
        for both in backward:
            runs = {name: with_backward(f, qkv) if both else (lambda f=f: f(qkv)) for name, f in functions.items()}
            runs = {name: run for name, run in runs.items() if _works(name, run)}
            flop = (14 if both else 4) * batch * heads * width * tokens * ((tokens + 1) / 2 if causal else tokens)
            self.report(shape, causal, reduce, dtype, both, flop, runs)

    def report(self, shape, causal, reduce, dtype, both, flop, runs) -> None:
        batch, tokens, heads, width = shape
        op = "attention_qkv forward + backward" if both else "attention_qkv forward"
        kind = "causal" if causal else "full"
        name_of_type = str(dtype).removeprefix("torch.")
        print(f"{op}, {kind} {reduce or ''} {name_of_type}, {batch} x {tokens} x {heads} x {width}")
        times = interleave(runs, self.options.rounds, self.device)
        reference = times["meditok"][1]
        for name, (p20, p50, p80) in times.items():
            row = {
                "commit": commit(), "device": processor(self.device), "torch": torch.__version__,
                "backend": native.isa if self.device == "cpu" else native.backend, "threads": self.options.threads,
                "op": op, "mask": kind, "reduce": reduce or "", "dtype": name_of_type, "name": name,
                "batch": batch, "tokens": tokens, "heads": heads, "width": width,
                "p20_ms": round(p20 * 1e3, 4), "p50_ms": round(p50 * 1e3, 4), "p80_ms": round(p80 * 1e3, 4),
                "gflops": round(flop / p50 / 1e9, 2), "share_of_peak": round(flop / p50 / self.peak, 3),
                "memory_mib": round(peak_memory(runs[name], self.device), 1),
                "ratio_to_ours": round(p50 / reference, 2),
            }  # fmt: skip
            self.rows.append(row)
            print(
                f"  {name:16s} {p20 * 1e3:10.3f} {p50 * 1e3:10.3f} {p80 * 1e3:10.3f} ms {row['gflops']:8.1f} GFLOP/s "
                f"{row['share_of_peak']:6.1%} of peak {row['memory_mib']:8.1f} MiB {row['ratio_to_ours']:7.2f} x"
            )

    # ---- sections --------------------------------------------------------------------------------------------------

    def main(self) -> None:
        for causal in (False, True):
            self.compare(MAIN, causal=causal)

    def sizes(self) -> None:
        for shape in SIZES:
            for causal in (False, True):
                self.compare(shape, causal=causal)

    def widths(self) -> None:
        for shape in WIDTHS:
            self.compare(shape)

    def batch(self) -> None:
        for shape in BATCHES:
            self.compare(shape)

    def mean(self) -> None:
        """The projection's causal attention, averaged over heads."""
        self.compare(MAIN, causal=True, reduce="mean")

    def half(self) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            for causal in (False, True):
                self.compare(MAIN, causal=causal, dtype=dtype)

    def small(self) -> None:
        """The bundled model's shape."""
        self.compare((1, 256, 4, 48))


def _works(name: str, run) -> bool:
    """Whether a peer covers this input at all; ours must."""
    try:
        run()
    except (RuntimeError, NotImplementedError) as error:
        if name == "meditok":
            raise
        print(f"  {name}: {str(error).splitlines()[0][:90]}")
        return False
    return True


def main() -> None:
    options = section_options(__doc__, "attention", SECTIONS)
    bench = Bench(options)
    print(f"{processor(options.device)}, {native.backend} {native.isa}, {options.threads} thread(s), "
          f"peak {bench.peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    for section in options.only.split(","):
        getattr(bench, section)()
    if options.save:
        print(f"rows in {append_rows('attention', bench.rows).name}")
    if options.json:
        write_json(options.json, bench.rows)


if __name__ == "__main__":
    main()
