"""What a built module holds: linkage, CUDA architectures, one PTX, no register spills.

The module examined is MEDITOK_BUILT_MODULE=path (an _core*.so or a wheel), else the loaded core. The CUDA
checks read its cubins with cuobjdump (PyPI package nvidia-cuda-cuobjdump, or a CUDA toolkit) and need no GPU.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest

from meditok import native

SPILL_FREE = (
    "assign_small_dim_kernel",
    "assign_large_dim_kernel",
    "lookup_kernel",
    "pack_kernel",
    # the training path; kernels of the same name in several files are all looked at
    "count_kernel",
    "place_kernel",
    "order_kernel",
    "finish_kernel",
    "loss_kernel",
    "step_kernel",
    "norms_kernel",
    "rows_kernel",
    "sum_kernel",
    "codes_kernel",
    "any_kernel",
    "counts_kernel",
    "find_copies_kernel",
    "template_op_kernel",
    "attention_forward_kernel",
    "attention_sm90_kernel",
    "attention_backward_kernel",
    "attention_simt_forward_kernel",
    "attention_simt_backward_kernel",
)
# CMake's name -> cubin architecture; "virtual" ones are PTX.
DEFAULT_ARCHITECTURES = {"sm_75", "sm_80", "sm_90a", "sm_100", "sm_120"}
DEFAULT_PTX = {"sm_80"}
# Products of the assign kernels for width 8 and for large widths, and the three-way maximum where there is one.
PRODUCTS = {
    "sm_75": ("HMMA.1688.F32", "HMMA.1688.F32", None),
    "sm_80": ("HMMA.1688.F32", "HMMA.16816.F32", None),
    "sm_90a": ("HMMA.1688.F32", "HMMA.16816.F32", "VIMNMX3"),
    "sm_100": ("HMMA.1688.F32", "HMMA.16816.F32", "FMNMX3"),
    "sm_120": ("HMMA.1688.F32", "HMMA.16816.F32", None),
}


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    given = os.environ.get("MEDITOK_BUILT_MODULE")
    if given and given.endswith(".whl"):
        folder = tmp_path_factory.mktemp("wheel")
        with zipfile.ZipFile(given) as wheel:
            names = [name for name in wheel.namelist() if re.fullmatch(r"meditok/_core.*\.so", name)]
            assert len(names) == 1, f"{given} holds {names or 'no compiled core'}"
            return Path(wheel.extract(names[0], folder))
    if given:
        return Path(given)
    if native.core is None:
        pytest.skip("the compiled core is not built, and MEDITOK_BUILT_MODULE names none")
    return Path(native.core.__file__)


@pytest.fixture(scope="module")
def cuobjdump(module):
    """cuobjdump(*options) -> its output for the module; skips where there is no CUDA code or no tool."""
    if b".nv_fatbin" not in module.read_bytes():
        pytest.skip(f"{module.name} was built without CUDA")
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    tool = shutil.which("cuobjdump") or (str(packaged[0]) if packaged else None)
    if tool is None:
        pytest.skip("cuobjdump is not installed (pip install nvidia-cuda-cuobjdump)")
    # It finds nvdisasm, which prints instructions, through the path.
    environment = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}

    def dump(*options: str) -> str:
        result = subprocess.run([tool, *options, module], capture_output=True, text=True, env=environment)
        return result.stdout

    return dump


def test_nothing_of_cuda_or_torch_is_linked(module):
    """The module needs the C and C++ runtimes only, so it loads without a driver and beside any torch."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed (Debian package binutils)")
    text = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", text)
    allowed = (
        "libc.",
        "libm.",
        "libstdc++.",
        "libgcc_s.",
        "libpthread.",
        "librt.",
        "libdl.",
        "ld-linux",
        "libasan.",
        "libubsan.",
    )
    assert needed and all(name.startswith(allowed) for name in needed), needed


def test_the_module_exports_its_init_function_only(module):
    """Hidden visibility: no symbol of ours can be taken for another library's."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed (Debian package binutils)")
    text = subprocess.run(["nm", "-D", "--defined-only", module], capture_output=True, text=True, check=True).stdout
    ours = [line.split()[-1] for line in text.splitlines() if "meditok" in line or "PyInit" in line]
    assert ours == ["PyInit__core"], ours


def test_architectures_and_one_ptx(cuobjdump):
    """Machine code for every default architecture, and PTX of exactly one for those to come."""
    assert set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("-lelf"))) == DEFAULT_ARCHITECTURES
    assert set(re.findall(r"\.(sm_\w+)\.ptx", cuobjdump("-lptx"))) == DEFAULT_PTX


def test_hot_kernels_do_not_spill(cuobjdump):
    """Neither stack nor local memory in any kernel, on any architecture."""
    usage = cuobjdump("-res-usage")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    for kernel in SPILL_FREE:
        copies = [entry for entry in found if kernel in entry[0]]
        assert len(copies) >= len(DEFAULT_ARCHITECTURES), f"{kernel} is missing on some architecture"
        spilled = [entry for entry in copies if entry[2] != "0" or entry[3] != "0"]
        assert not spilled, f"{kernel} uses stack or local memory: {spilled}"


def test_two_blocks_of_the_assign_kernels_fit_a_multiprocessor(cuobjdump):
    """At most 128 registers for 256 threads, for width 8 and for large widths; sm_75 has shared memory for one only."""
    usage = cuobjdump("-res-usage")
    for architecture, text in re.findall(r"arch = (sm_\w+)(.*?)(?=Fatbin elf code|\Z)", usage, re.DOTALL):
        registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", text))
        for kernel in ("assign_small_dim_kernelILi1E", "assign_large_dim_kernel"):
            for count in (int(count) for name, count in registers.items() if kernel in name):
                assert count <= 128 or architecture == "sm_75", f"{kernel} takes {count} registers on {architecture}"


@pytest.fixture(scope="module")
def machine_code(cuobjdump):
    """machine_code(architecture) -> {mangled name: instructions} of every kernel."""

    @functools.cache
    def disassemble(architecture: str) -> dict[str, str]:
        text = cuobjdump("-sass", "-arch", architecture)
        if "Function" not in text:
            pytest.skip("nvdisasm is not installed (pip install nvidia-cuda-nvdisasm)")
        return {part.split(None, 1)[0]: part for part in text.split("Function : ")[1:]}

    return disassemble


@pytest.mark.parametrize("architecture", sorted(DEFAULT_ARCHITECTURES))
def test_assign_runs_on_tensor_cores(machine_code, architecture):
    """The products and maxima that csrc/vq/vq_cuda.cpp promises are in the machine code, and no local memory is."""
    small, large, maximum = PRODUCTS[architecture]
    functions = machine_code(architecture)
    (narrow,) = (code for name, code in functions.items() if "assign_small_dim_kernelILi1E" in name)
    (wide,) = (code for name, code in functions.items() if "assign_large_dim_kernel" in name)
    # Codes by eights: 64 rows x 32 codes in the loop, once from zero and once from a start.
    assert narrow.count(small) == 2 * 4 * 4 and wide.count(large) >= 32 and "LDSM" in narrow and "LDSM" in wide
    assert maximum is None or re.search(rf"\b{maximum}\b", narrow)
    for code in (narrow, wide):
        assert not re.search(r"\b(LDL|STL)\b", code)


# Products of a 16-bit operand and of tf32, by architecture; where there is none, attention takes float32 ones.
ATTENTION_PRODUCTS = {
    "sm_75": {"HalfOperand": "HMMA.1688.F32"},
    **{
        name: {
            "HalfOperand": "HMMA.16816.F32",
            "Bfloat16Operand": "HMMA.16816.F32.BF16",
            "Tf32Operand": "HMMA.1688.F32.TF32",
        }
        for name in DEFAULT_ARCHITECTURES - {"sm_75"}
    },
}


@pytest.mark.parametrize("architecture", sorted(DEFAULT_ARCHITECTURES))
def test_attention_runs_on_tensor_cores(machine_code, architecture):
    """Every attention kernel multiplies with the instruction csrc/attention promises, feeds it by ldmatrix, and fetches
    asynchronously where there is such a copy; the float32 ones use no tensor core; none has local memory or atomics."""
    functions = {name: code for name, code in machine_code(architecture).items() if "attention_" in name}
    for kernel, variants in (("attention_forward_kernel", 2), ("attention_backward_kernel", 4)):
        for operand, product in ATTENTION_PRODUCTS[architecture].items():
            found = [code for name, code in functions.items() if kernel in name and operand in name]
            assert len(found) == variants
            for code in found:
                assert code.count(product + " ") >= 32 and "LDSM" in code
                assert ("LDGSTS" in code) == (architecture != "sm_75")
    for name, code in functions.items():
        assert "_simt_" not in name or ("HMMA" not in code and code.count("FFMA") >= 128), name
        assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", code), name


def test_only_hopper_multiplies_by_warpgroups(machine_code):
    """wgmma and the copy engine are in the code for sm_90a and nowhere else: eight products of 64 x 64 x 16 a box of
    keys, four with values as they lie in memory, and copies of boxes."""
    for architecture in sorted(DEFAULT_ARCHITECTURES):
        for name, code in machine_code(architecture).items():
            expected = 8 if architecture == "sm_90a" and "attention_sm90_kernel" in name else 0
            assert code.count("HGMMA.64x64x16.F32") == code.count("HGMMA") == expected, f"{name} on {architecture}"
            assert code.count(".tnspB") == expected // 2 and ("UTMALDG" in code) == (expected > 0)
