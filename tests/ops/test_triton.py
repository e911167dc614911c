"""The Triton kernels give the canonical answers: run by Triton's interpreter on the CPU, and compiled for real devices.

What a GPU adds is left to the tests marked `gpu`.
"""

from __future__ import annotations

import itertools
import platform
import re
import sys

import pytest
import torch

from meditok.ops import reference

from .helpers import (
    FLOATS,
    METRICS,
    ROOT,
    adversarial_codebooks,
    assert_same_bits,
    assert_same_ids,
    near_ties,
    randn,
    run_python,
)

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="Triton is made for Linux on x86-64"
)

INTERPRETED = """
import sys, warnings
import torch
from meditok import native, ops
warnings.simplefilter("ignore")
cases = torch.load("{cases}")
results = []
ops.checks = "never"
for x, codebook, ids, metric in cases:
    found = ops.vq_assign(x, codebook, metric=metric)
    results.append((found, ops.vq_lookup(found if ids is None else ids, codebook, metric=metric)))
torch.save(results, "{results}")
print(native.backend, native.cpu_backend(), "meditok.ops.triton_vq" in sys.modules)
"""


def interpreted(folder, cases):
    """[(ids, rows)] of ops.vq_assign and ops.vq_lookup for [(x, codebook, ids or None, metric)], in a process whose
    CPU runs the Triton kernels."""
    torch.save(cases, folder / "cases.pt")
    code = INTERPRETED.format(cases=folder / "cases.pt", results=folder / "results.pt")
    result = run_python(code, MEDITOK_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.stdout.split() == ["triton", "triton", "True"], result.stderr
    return torch.load(folder / "results.pt")


def check(folder, cases):
    """cases: {name: (x, codebook, ids or None, metric)}; everything equals the reference, bit for bit."""
    for (name, (x, codebook, ids, metric)), (found, rows) in zip(
        cases.items(), interpreted(folder, list(cases.values())), strict=True
    ):
        assert_same_ids(found, reference.vq_assign(x, codebook, metric=metric), name)
        expected = reference.vq_lookup(found if ids is None else ids, codebook, metric=metric)
        assert_same_bits(rows, expected, name)


def test_shapes_dtypes_and_strides(tmp_path):
    """Sizes around the tiles, every pair of a dtype for x and the codebook, any strides, and empty arrays."""
    cases = {}
    shapes = [(1, 1, 1, 1), (65, 2, 129, 5), (3, 1, 64, 8), (2, 1, 70, 33), (0, 1, 5, 4), (4, 0, 5, 4), (4, 1, 0, 4)]
    for metric, (rows, groups, codes, width) in itertools.product(METRICS, [*shapes, (4, 1, 5, 0)]):
        cases[f"{metric} {rows} {groups} {codes} {width}"] = (
            *(randn(rows, groups, width), randn(groups, codes, width, seed=1)),
            *(None, metric),
        )
    outside = torch.arange(-2, 9)[:, None]
    for index, (a, b) in enumerate(zip(FLOATS, FLOATS[1:] + FLOATS[:1], strict=True)):
        metric = METRICS[index % 2]
        cases[f"{a} {b}"] = randn(6, 1, 8, dtype=a), randn(1, 7, 8, seed=1, dtype=b), outside, metric
    for metric in METRICS:
        x, codebook = randn(8, 2, 6).transpose(0, 2), randn(2, 5, 16)[:, ::2, ::2]
        assert not x.is_contiguous() and not codebook.is_contiguous()
        cases[f"{metric} strides"] = x, codebook, torch.arange(3).expand(2, 3).t()[:, :2], metric
    check(tmp_path, cases)


@pytest.mark.parametrize("metric", METRICS)
def test_adversarial_codebooks_and_near_ties(tmp_path, metric):
    """What defeats shortcuts: duplicates, dead and broken codes, outliers, extreme lengths, ties of an ulp."""
    codebooks = adversarial_codebooks(70, 8)
    ordinary = randn(3, 1, 8, seed=3)
    broken = ordinary[:2].clone()
    broken[0, 0, 1], broken[1, 0, 2] = torch.nan, torch.inf
    extreme = [scale * ordinary[:1] for scale in (1e30, 1e-30, 1e-42)]
    x = torch.cat([ordinary, torch.zeros(1, 1, 8), broken, *extreme]).expand(-1, len(codebooks), -1)
    cases = {
        ", ".join(codebooks): (x, torch.cat(list(codebooks.values())), None, metric),
        "beyond float32": (x[:, :1].double() * 1e200, randn(1, 9, 8).double() * 1e-170, None, metric),
    }
    for seed in range(2):
        near, codes = near_ties(150, 8, seed)
        cases[f"near ties {seed}"] = near[:20], codes, None, metric
    check(tmp_path, cases)


def test_the_cpu_runs_the_reference_where_nothing_interprets():
    """MEDITOK_BACKEND=triton without the interpreter: Triton has no CPU, so CPU tensors take the reference."""
    code = "from meditok import native, ops; import torch; x = torch.ones(2, 1, 3); ops.vq_assign(x, x.view(1, 2, 3));"
    code += "import sys; print(native.backend, native.cpu_backend(), 'triton' in sys.modules)"
    result = run_python(code, MEDITOK_BACKEND="triton", TRITON_INTERPRET="0")
    assert result.stdout.split() == ["triton", "reference", "False"], result.stderr


def test_triton_asked_for_and_missing_is_one_line():
    """MEDITOK_BACKEND=triton without Triton is an ImportError at import."""
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: n != 'triton' and find(n, *a);"
    result = run_python(hide + "import meditok.ops", MEDITOK_BACKEND="triton")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last == "ImportError: MEDITOK_BACKEND=triton, but Triton is not installed (pip install triton)"


def test_the_bound_is_that_of_the_compiled_kernels():
    """The filter's constants are those of csrc/vq/vq_filter.h; only the smallest term is larger."""
    from meditok.ops import triton_vq

    text = (ROOT / "csrc/vq/vq_filter.h").read_text()
    found = {name: float(value) for name, value in re.findall(r"constexpr \w+ (k\w+) = ([\d.e+-]+)f?;", text)}
    assert found["kFloor"] == triton_vq.FLOOR.value and found["kLargestL2"] == triton_vq.LARGEST_L2.value
    assert found["kLargestCosine"] == triton_vq.LARGEST_COSINE.value
    assert found["kSmallestCosine"] == triton_vq.SMALLEST_COSINE.value
    assert found["kLargestWidth"] == triton_vq.LARGEST_WIDTH
    assert found["kSlack"] == triton_vq.SLACK.value and found["kRoundUp"] == pytest.approx(triton_vq.ROUND_UP.value)
    product, square, tiny = map(float, re.findall(r"terms \* ([\d.e+-]+)\)", text))
    assert product == triton_vq.PRODUCT and square == pytest.approx(triton_vq.SQUARE) and tiny < triton_vq.TINY


POINTERS = {
    "ids": "*i64", "first_choosable": "*i64", "unsafe": "*i1", "kinds": "*i8", "norms": "*fp64",
    **dict.fromkeys(("rows32", "row_norms", "filter_codes", "bias", "radius", "reach"), "*fp32"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, dtype, architecture, metric",
    [
        ("_assign", "*i16", 90, "cosine"),
        ("_prepare_codes", "*fp16", 75, "cosine"),
        ("_prepare_codes", "*fp64", 120, "l2"),
        ("_prepare_rows", "*i16", 80, "cosine"),
        ("_prepare_rows", "*fp32", 100, "l2"),
        ("_lookup", "*i16", 75, "cosine"),
        ("_lookup", "*fp16", 120, "l2"),
    ],
)
def test_kernels_compile_without_fused_float64(name, dtype, architecture, metric):
    """Each kernel becomes machine code without a GPU; no product and sum of the canonical score are fused, and no
    float32 result is flushed to zero."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from meditok.ops import triton_vq

    kernel = getattr(triton_vq, name)
    constants = {"COSINE": metric == "cosine", "BLOCK": triton_vq.BLOCK, "WIDE": False}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {key: "i32" if key in ("rows", "groups", "codes", "width") else "i64" for key in kernel.arg_names}
    types |= dict.fromkeys(("x", "codebook", "out"), dtype) | POINTERS
    types |= dict.fromkeys(("product", "square", "tiny"), "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {key: types[key] for key in kernel.arg_names}
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    options = dict(num_warps=triton_vq.WARPS, enable_fp_fusion=False)
    source = ASTSource(kernel, signature, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert len(compiled.asm["cubin"]) > 1000
    assert "fma.rn.f64" not in compiled.asm["ptx"] and ".ftz" not in compiled.asm["ptx"]
    if name == "_assign":
        assert "mul.rn.f64" in compiled.asm["ptx"] and "add.rn.f64" in compiled.asm["ptx"]
