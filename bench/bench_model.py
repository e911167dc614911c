"""Images a second through a tokenizer, ours against the published way: python bench/bench_model.py [--model tiny ...]

Times tokenize, detokenize, reconstruct and a training step (forward, squared error, backward) of 256 x 256 images at
each batch size, against baseline_model.py on the same weights: eager fp32 on a CPU; on CUDA fp32 without TF32, torch's
default flags, bf16 autocast, and torch.compile(max-autotune) in bf16. Everything runs in turn, round by round. Printed
and appended to results/model.csv: p20/p50/p80, images/s, multiplications an image, share of the measured rate of
torch's own matrix product, memory peak, and how many times faster ours is; with --precision also how many tokens that
changes, and what it does to the picture of the same tokens. --parts times the stages one by one instead.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from baseline_model import Baseline
from timing import append_rows, commit, interleave, measured_gemm, peak_memory, processor, write_json
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import meditok
import meditok.ops.convolution  # registers the ops whose multiplications are counted
from meditok import native

COLUMNS = (
    *("call", "model", "who", "precision", "batch", "images_per_s", "p20_ms", "p50_ms", "p80_ms", "faster"),
    *("gmac", "gemm_share", "peak_mib", "threads", "backend", "isa", "device", "torch", "commit"),
)
CALLS = ("tokenize", "tokenize-stable", "detokenize", "reconstruct", "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["tiny"], help="models to load, or presets with random weights")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS[:-1]))
    parser.add_argument("--precision", nargs="+", help="ours; default fp32 on a CPU, bf16 and fp32 on CUDA")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--parts", action="store_true", help="the stages one by one, at fp32")
    parser.add_argument("--no-compiled", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--json", help="write the rows there instead of appending them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates = {False: measured_gemm(options.device)}
    if options.device == "cuda":
        rates[True] = measured_gemm("cuda", torch.bfloat16)
    named = ", ".join(f"{'bf16' if half else 'fp32'} {rate / 1e9:.0f}" for half, rate in rates.items())
    print(f"{processor(options.device)}, {options.threads} threads; torch's matrix product: {named} GFLOP/s")
    rows = []
    for name in options.model:
        model = load(name).to(options.device)
        measure = parts if options.parts else calls
        for batch in options.batch:
            for row in measure(model, batch, options):
                rate = rates.get("16" in row["precision"], rates[False])
                row["gemm_share"] = round(row["gmac"] * 2e9 * row["images_per_s"] / rate, 3)
                rows.append({key: (row | environment(name, options)).get(key, "") for key in COLUMNS})
                print(describe(rows[-1]), flush=True)
    if options.json:
        write_json(options.json, rows)
    else:
        print(f"rows appended to {append_rows('model', rows)}")


def load(name: str) -> meditok.Tokenizer:
    try:
        return meditok.load(name, device="cpu")
    except meditok.errors.MissingPartError:
        return meditok.build(name, seed=0)


def calls(model, batch: int, options) -> list[dict]:
    """A row for each call and way of computing it; ratios are against the published ways of the same call."""
    x = torch.rand(batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = x.to(options.device)
    tokens = model.tokenize(x)
    for precision in options.precision or ():
        print(f"{precision:<6}{agreement(model, precision, x, tokens)}")
    rows = []
    for call in options.calls:
        candidates = {}
        for precision in options.precision or (("bf16", "fp32") if options.device == "cuda" else ("fp32",)):
            candidates["ours", precision] = at(model, precision, runner(model, call, x, tokens))
        base = call.removesuffix("-stable")
        for way, baseline in baselines(model, options):
            candidates["published", way] = with_flags(way, runner(baseline, base, x, tokens))
        times = interleave(candidates, options.rounds, options.device)
        for (who, precision), (p20, p50, p80) in times.items():
            run = candidates[who, precision]
            row = {"call": call, "who": who, "precision": precision, "batch": batch}
            row |= figures(batch, p20, p50, p80, run, options.device)
            if who == "ours":
                others = {way: times["published", way][1] / p50 for other, way in times if other == "published"}
                row["faster"] = " ".join(f"{way}:{ratio:.2f}" for way, ratio in others.items())
            rows.append(row)
    return rows


def agreement(model, precision: str, x: torch.Tensor, tokens: torch.Tensor) -> str:
    """What a precision changes: tokens, and the picture made of the same tokens, against float32."""
    model.precision = "fp32"
    full = model.detokenize(tokens)
    model.precision = precision
    same = (model.tokenize(x) == tokens).double().mean()
    error = (model.detokenize(tokens) - full).square().mean()
    model.precision = "fp32"
    psnr = 10 * math.log10(4 / max(error, 1e-15))
    return f"{same:.1%} of the tokens are those of float32; {psnr:.1f} dB PSNR to its picture"


def at(model, precision: str, run: Callable[[], object]) -> Callable[[], object]:
    def call():
        model.precision = precision
        run()

    return call


def runner(model, call: str, x: torch.Tensor, tokens: torch.Tensor) -> Callable[[], object]:
    if call == "train":
        return lambda: step(model, x)
    if call == "detokenize":
        return lambda: model.detokenize(tokens)
    if call == "tokenize-stable":
        return lambda: model.tokenize(x, stable=True)
    return lambda: getattr(model, call)(x)


def step(model, x: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    out = model(x)
    (F.mse_loss(out[0], x) + (out[1] if isinstance(model, Baseline) else out.vq_loss)).backward()


def baselines(model, options):
    """(name, module) of every published way on this kind of device."""
    yield "fp32", Baseline(model)
    if options.device == "cuda":
        yield "tf32-default", Baseline(model)
        yield "bf16", Baseline(model, torch.bfloat16)
    if options.device == "cuda" and not options.no_compiled:
        compiled = Baseline(model, torch.bfloat16).to(memory_format=torch.channels_last)
        for name in ("encoder", "decoder", "quant_proj", "post_quant_proj"):
            setattr(compiled, name, torch.compile(getattr(compiled, name), mode="max-autotune"))
        yield "bf16-compiled", compiled


def with_flags(way: str, run: Callable[[], object]) -> Callable[[], object]:
    """torch's defaults (convolutions may use TF32, products may not), except for plain fp32."""

    def call():
        torch.backends.cudnn.allow_tf32 = way != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = False
        run()

    return call


@torch.no_grad()
def parts(model, batch: int, options) -> list[dict]:
    """A row for each stage, ours and published, both fed with what reaches it in our model."""
    x = torch.rand(batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x, base, grid = x.to(options.device), Baseline(model), (options.size // 16,) * 2
    convolved = base.encoder.convolve(x)
    hidden = base.encoder.norm(base.encoder.blocks(convolved))
    code = base.quant_proj(hidden)
    ids = base.quantizer.assign(code)
    z = base.quantizer.lookup(ids)
    post = base.post_quant_proj(z)
    deep = base.decoder.norm(base.decoder.blocks(post))
    maps, ours, cl = [deep.transpose(1, 2).unflatten(2, grid)], model.decoder, torch.channels_last
    patches = model.config.ends == "patches"
    stages = () if patches else ("up_conv1", "up_conv2", "up_conv3")
    for name in stages:
        maps.append(getattr(base.decoder, name)(maps[-1]))
    pairs = {
        "encoder convolutions": (lambda: model.encoder.patch_embed["backbone"](x), lambda: base.encoder.convolve(x)),
        "encoder blocks": (lambda: model.encoder.blocks(convolved), lambda: base.encoder.blocks(convolved)),
        "bottleneck": (lambda: model.quant_proj(hidden), lambda: base.quant_proj(hidden)),
        "assign": (lambda: model.quantizer.assign(code), lambda: base.quantizer.assign(code)),
        "post bottleneck": (lambda: model.post_quant_proj(z), lambda: base.post_quant_proj(z)),
        "decoder blocks": (lambda: model.decoder.blocks(post), lambda: base.decoder.blocks(post)),
    }
    for name, value in zip(stages, maps, strict=False):
        own = value.contiguous(memory_format=cl)
        pairs[name] = (
            lambda name=name, own=own: getattr(ours, name)(own),
            lambda name=name, value=value: getattr(base.decoder, name)(value),
        )
    last = maps[-1].contiguous(memory_format=cl)
    if patches:
        pairs["pixels"] = lambda: ours.pixels(last), lambda: base.decoder.convolve(deep)
    else:
        head = base.decoder.up_conv4
        pairs["up_conv4"] = (
            lambda: ours.up_conv4(last),
            lambda: head["conv2"](F.gelu(head["norm1"](head["conv1"](maps[-1])))),
        )
    candidates = {
        (name, who): run for name, pair in pairs.items() for who, run in zip(("ours", "published"), pair, strict=True)
    }
    times = interleave(candidates, options.rounds, options.device)
    rows = []
    for (name, who), (p20, p50, p80) in times.items():
        run = candidates[name, who]
        row = {"call": name, "who": who, "precision": "fp32", "batch": batch}
        row |= figures(batch, p20, p50, p80, run, options.device)
        if who == "ours":
            row["faster"] = f"fp32:{times[name, 'published'][1] / p50:.2f}"
        rows.append(row)
    return rows


@register_flop_formula(torch.ops.meditok.linear)
def _linear_flop(x, weight, bias, residual, gate, *_, out_shape=None) -> int:
    return 2 * math.prod(x) * weight[0] * (1 if gate is None else 2)


@register_flop_formula(torch.ops.meditok.depthwise_gelu)
def _depthwise_flop(*_, out_shape=None) -> int:
    return 2 * 9 * math.prod(out_shape)


def figures(batch: int, p20: float, p50: float, p80: float, run: Callable[[], object], device: str) -> dict:
    """gmac: thousands of millions of multiplications an image, in products, convolutions and attention; vector
    quantization is not counted."""
    with FlopCounterMode(display=False) as counter:
        run()
    return {
        "images_per_s": round(batch / p50, 3),
        **{f"{name}_ms": round(value * 1e3, 2) for name, value in (("p20", p20), ("p50", p50), ("p80", p80))},
        "gmac": round(counter.get_total_flops() / 2e9 / batch, 2),
        "peak_mib": round(peak_memory(run, device)),
    }


def environment(model: str, options) -> dict:
    return {
        "model": model,
        "threads": options.threads,
        "backend": native.backend,
        "isa": native.isa,
        "device": processor(options.device),
        "torch": torch.__version__,
        "commit": commit(),
    }


def describe(row: dict) -> str:
    times = f"p20 {row['p20_ms']:.1f} p50 {row['p50_ms']:.1f} p80 {row['p80_ms']:.1f} ms"
    return (
        f"{row['model']:<14}{row['call']:<21}{row['who']:<10}{row['precision']:<14}batch {row['batch']:>3}"
        f"{row['images_per_s']:9.2f} images/s  {times}  {row['gemm_share']:4.0%} of the product rate  "
        f"{row['gmac']:7.2f} GMAC  {row['peak_mib']:>5} MiB  {row['faster']}"
    )


if __name__ == "__main__":
    main()
