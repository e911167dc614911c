"""Every vector-quantization op against the ways people do it today.

    python bench/bench_vq.py [--only assign,worst,ops,training,entropy,large,growth] [--threads 1] [--rounds 9]
                             [--device cpu|cuda] [--json FILE] [--save]

Prints p20/p50/p80, GFLOP/s (2 C for a row and a code), the share of the machine's measured peak, the memory a call
takes beyond its inputs, the ratio to ours, and how many ids differ from the float64 answer; --save appends the rows to
bench/results/vq.csv and draws the growth curves beside it.
"""

from __future__ import annotations

import argparse

import torch
from peers import assign_peers, eager_entropy, gradients, training_peers, training_step
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

from meditok import native, ops
from meditok.ops import reference

# Rows, codebooks, codes, width: 16 images of MedITok, on CUDA 256 of them.
MAIN = {"cpu": (4096, 8, 4096, 8), "cuda": (65536, 8, 4096, 8)}
LARGE = ((4096, 1, 512, 768), (4096, 1, 512, 1536), (2048, 1, 4096, 64), (2048, 1, 8192, 256))
GROWTH = {  # one axis at a time, the others fixed
    "rows": [(n, 1, 1024, 8) for n in (256, 1024, 4096, 16384, 65536, 262144, 1048576)],
    "codes": [(4096, 1, k, 8) for k in (256, 1024, 4096, 16384, 65536)],
    "width": [(1024, 1, 1024, c) for c in (4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1536)],
}
CHECKED = 256  # rows compared with the float64 answer, of the main shape all
SECTIONS = ("assign", "worst", "ops", "training", "entropy", "large", "growth")


class Bench:
    """Options, the machine, and the rows so far."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, options.device
        torch.set_num_threads(options.threads)
        cuda = self.device == "cuda"
        self.peak = measured_cuda_peak() if cuda else measured_peak(native.isa or "scalar") * options.threads
        self.main = MAIN[self.device]
        self.trained = (("cosine", self.main), ("l2", LARGE[0]))
        self.rows: list[dict] = []
        self.curves: dict = {}

    def inputs(self, shape, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """x (N, G, C) and codebook (G, K, C), normally distributed."""
        rows, groups, codes, width = shape
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, groups, width, generator=generator)
        codebook = torch.randn(groups, codes, width, generator=generator)
        return x.to(self.device), codebook.to(self.device)

    def compare(self, op: str, metric: str, shape, runs: dict, *, exact=None, note: str = "", factor: float = 1.0):
        """Times `runs` in turn, ours first; `exact` are the right ids of the first rows; `factor` scales the FLOPs."""
        rows, groups, codes, width = shape
        print(f"{op} {metric}, {rows} x {groups} x {codes} x {width} {note}")
        times = interleave(runs, self.options.rounds, self.device)
        ours = next(iter(times.values()))[1]
        flop = factor * 2.0 * rows * groups * codes * width
        for name, (p20, p50, p80) in times.items():
            wrong = ""
            if exact is not None and name != "faiss ProductQuantizer":  # its codes are packed bits
                wrong = int((_ids(runs[name](), groups)[: len(exact)] != exact).sum())
            memory = peak_memory(runs[name], self.device)
            row = {
                "commit": commit(), "device": processor(self.device), "torch": torch.__version__,
                "backend": native.isa if self.device == "cpu" else native.backend, "threads": self.options.threads,
                "op": op, "metric": metric, "note": note, "name": name,
                "rows": rows, "groups": groups, "codes": codes, "width": width,
                "p20_ms": round(p20 * 1e3, 4), "p50_ms": round(p50 * 1e3, 4), "p80_ms": round(p80 * 1e3, 4),
                "gflops": round(flop / p50 / 1e9, 2) if flop else "",
                "share_of_peak": round(flop / p50 / self.peak, 3) if flop else "",
                "memory_mib": round(memory, 1), "ratio_to_ours": round(p50 / ours, 2), "wrong_ids": wrong,
            }  # fmt: skip
            self.rows.append(row)
            share = f"{row['gflops']:8.1f} GFLOP/s {row['share_of_peak']:6.1%} of peak" if flop else ""
            print(
                f"  {name:26s} {p20 * 1e3:10.3f} {p50 * 1e3:10.3f} {p80 * 1e3:10.3f} ms {share} "
                f"{memory:8.1f} MiB {row['ratio_to_ours']:7.2f} x  {f'{wrong} wrong' if wrong != '' else ''}"
            )
        return times

    # ---- sections --------------------------------------------------------------------------------------------------

    def assign(self) -> None:
        for metric in ("cosine", "l2"):
            x, codebook = self.inputs(self.main)
            self._assign(x, codebook, metric, self.main, every=True)

    def _assign(self, x, codebook, metric, shape, *, every: bool, compiled: bool = True, note: str = ""):
        packed = ops.pack_codebook(codebook, metric=metric)
        runs = {
            "meditok packed": lambda: ops.vq_assign(x, packed, metric=metric),
            "meditok": lambda: ops.vq_assign(x, codebook, metric=metric),
        }
        runs |= assign_peers(x, codebook, metric, every=every, compiled=compiled)
        exact = reference.vq_assign(x if every else x[:CHECKED], codebook, metric=metric)
        return self.compare("vq_assign", metric, shape, runs, exact=exact, note=note)

    def worst(self) -> None:
        """Codebooks on which a shortcut would be slow, against the random one of the same shape."""
        x, codebook = self.inputs(self.main)
        for metric in ("cosine", "l2"):
            books = {"random": codebook, **worst_codebooks(codebook)}
            packed = {name: ops.pack_codebook(book, metric=metric) for name, book in books.items()}
            runs = {
                name: lambda book=book, metric=metric: ops.vq_assign(x, book, metric=metric)
                for name, book in packed.items()
            }
            self.compare("vq_assign", metric, self.main, runs, note="worst codebooks")

    def ops(self) -> None:
        x, codebook = self.inputs(self.main)
        ids = ops.vq_assign(x, codebook)
        groups, codes, width = codebook.shape
        counts, sums = ops.vq_stats(x, ids, codes)
        state = [t.clone() for t in (codebook, counts.float(), sums)]
        update = {"decay": 0.99, "eps": 1e-5}
        offset = torch.arange(groups, device=self.device) * codes

        def index_add():
            flat = (ids + offset).flatten()
            total = torch.zeros(groups * codes, width, device=self.device)
            return flat.bincount(minlength=groups * codes), total.index_add_(0, flat, x.reshape(-1, width))

        def gather():
            unit = torch.nn.functional.normalize(codebook, dim=-1)
            return unit[torch.arange(groups, device=self.device), ids]

        self.compare(
            "vq_lookup", "cosine", self.main, factor=0, runs={
                "meditok": lambda: ops.vq_lookup(ids, codebook), "torch eager": gather,
            },
        )  # fmt: skip
        self.compare(
            "vq_stats", "cosine", self.main, factor=0, runs={
                "meditok": lambda: ops.vq_stats(x, ids, codes), "torch eager": index_add,
            },
        )  # fmt: skip
        self.compare(
            "vq_update_", "cosine", self.main, factor=0, runs={
                "meditok": lambda: ops.vq_update_(*state, counts, sums, **update),
                "torch eager": lambda: reference.vq_update_(*state, counts, sums, **update),
            },
        )  # fmt: skip
        self.compare(
            "pack_codebook", "cosine", self.main, factor=0,
            runs={"meditok": lambda: ops.pack_codebook(codebook, metric="cosine")},
        )  # fmt: skip
        for metric, shape in self.trained:
            self._parts_of_training(metric, shape)

    def _parts_of_training(self, metric: str, shape) -> None:
        """What the training call of `training` is made of, one by one."""
        x, codebook = self.inputs(shape)
        packed = ops.pack_codebook(codebook, metric=metric)
        ids = ops.vq_assign(x, packed, metric=metric)
        grad = torch.ones_like(x), torch.ones((), device=self.device)
        settings = dict(metric=metric, commitment_weight=0.25, codebook_weight=1.0, rotation=False)
        backward = torch.ops.meditok.vq_quantize_backward
        self.compare(
            "vq_quantize", metric, shape, factor=0, runs={
                "meditok assign": lambda: ops.vq_assign(x, packed, metric=metric),
                "meditok quantize": lambda: ops.vq_quantize(x, packed, metric=metric),
                "meditok backward": lambda: backward(*grad, x, codebook, ids, None, **settings),
                "meditok backward to x": lambda: backward(
                    *grad, x, codebook, ids, None, codebook_needed=False, **settings
                ),
                "a copy of x": lambda: x.clone(),
            },
        )  # fmt: skip

    def entropy(self) -> None:
        """The regulariser, forward and backward, against the published way, which holds every probability."""
        shape = (512, *self.main[1:])
        x, codebook = self.inputs(shape)
        runs = {
            "meditok": gradients(lambda a, b: ops.vq_entropy(a, b), x, codebook),
            "torch eager": gradients(eager_entropy, x, codebook),
        }
        self.compare("vq_entropy forward + backward", "cosine", shape, runs, factor=0)

    def training(self) -> None:
        """Quantise, loss, counts and both gradients, against assign alone and against autograd's way."""
        for metric, shape in self.trained:
            x, codebook = self.inputs(shape)
            packed = ops.pack_codebook(codebook, metric=metric)

            def quantize(a, b, metric=metric, packed=packed):
                z, _, loss, _ = ops.vq_quantize(a, ops.PackedCodebook(b, metric, packed.packed), metric=metric)
                return z, loss

            def pack_too(a, b, metric=metric):
                z, _, loss, _ = ops.vq_quantize(a, b, metric=metric)
                return z, loss

            runs = {
                "meditok assign alone": lambda x=x, packed=packed, metric=metric: ops.vq_assign(
                    x, packed, metric=metric
                ),
                "meditok": training_step(quantize, x, codebook),
                "meditok, packing too": training_step(pack_too, x, codebook),
                **training_peers(x, codebook, metric),
            }
            self.compare("vq_quantize forward + backward", metric, shape, runs)

    def large(self) -> None:
        """Wide codes, where the product of x and the codebook alone (which gives no ids) is the yardstick."""
        for shape in LARGE:
            x, codebook = self.inputs(shape)
            self._assign(x, codebook, "l2", shape, every=False, note="large width")
            packed = ops.pack_codebook(codebook, metric="l2")
            runs = {
                "meditok packed": lambda x=x, packed=packed: ops.vq_assign(x, packed, metric="l2"),
                "torch.mm alone": lambda x=x, codebook=codebook: x[:, 0] @ codebook[0].T,
            }
            self.compare("vq_assign", "l2", shape, runs, note="against the product")

    def growth(self) -> None:
        curves = {}
        for axis, shapes in GROWTH.items():
            for shape in shapes:
                x, codebook = self.inputs(shape)
                times = self._assign(x, codebook, "cosine", shape, every=False, compiled=False, note=f"growth {axis}")
                curves.setdefault(axis, []).append((shape, times))
        self.curves = curves


def worst_codebooks(codebook: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codebooks (G, K, C) that defeat bounds and early exits."""
    outlier, dead = codebook.clone(), torch.zeros_like(codebook)
    middle = codebook.shape[1] // 2
    outlier[:, middle] *= 1e4 / outlier[:, middle].norm(dim=-1, keepdim=True)
    dead[:, ::100] = codebook[:, ::100]
    return {
        "all zero": torch.zeros_like(codebook),
        "all equal": codebook[:, :1].expand_as(codebook).contiguous(),
        "one code of norm 1e4": outlier,
        "99 % dead": dead,
        "each code twice": codebook[:, torch.arange(codebook.shape[1], device=codebook.device) // 2],
    }


def _ids(result, groups: int) -> torch.Tensor:
    """Ids (N, G) of whatever a peer returns: faiss and scikit-learn a list over codebooks, KeOps (G, N, 1)."""
    if isinstance(result, list):
        parts = [part[1] if isinstance(part, tuple) else part for part in result]
        return torch.stack([torch.as_tensor(part).flatten() for part in parts], 1)
    if result.ndim == 3 and result.shape[0] == groups and result.shape[2] == 1:
        return result[..., 0].T
    return result.reshape(-1, groups)


def draw(curves: dict, name: str) -> None:
    """Time against rows, codes and width, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from timing import RESULTS

    place = {"rows": 0, "codes": 2, "width": 3}
    figure, panels = pyplot.subplots(1, len(curves), figsize=(13, 4), layout="constrained")
    for panel, (axis, points) in zip(panels, curves.items(), strict=True):
        for method in sorted({name for _, times in points for name in times}):
            line = [(shape[place[axis]], times[method][1] * 1e3) for shape, times in points if method in times]
            panel.loglog(*zip(*line, strict=True), "o-", label=method, markersize=3)
        fixed = points[0][0]
        rest = ", ".join(f"{word} {fixed[i]:,}" for word, i in place.items() if word != axis)
        panel.set(xlabel=axis, ylabel="milliseconds", title=f"vq_assign; {rest}")
        panel.grid(True, which="major", alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(RESULTS / name, dpi=120)
    print(f"curves in {RESULTS.name}/{name}")


def main() -> None:
    options = section_options(__doc__, "vq", SECTIONS)
    bench = Bench(options)
    print(f"{processor(options.device)}, {native.backend} {native.isa}, {options.threads} thread(s), "
          f"peak {bench.peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    for section in options.only.split(","):
        before = len(bench.rows)
        getattr(bench, section)()
        if options.save:  # at once, so that a long run that is stopped keeps what it measured
            print(f"rows in {append_rows('vq', bench.rows[before:]).name}", flush=True)
        if options.json:  # so do these
            write_json(options.json, bench.rows)
    if options.save and bench.curves:  # last: it needs matplotlib
        draw(bench.curves, f"vq_growth_{options.device}.png")


if __name__ == "__main__":
    main()
